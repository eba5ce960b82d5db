"""HTML of the token preferences: the coloured outline, its figures, and what the page's script shows of a token."""

from __future__ import annotations

import json
import math
import re
from html import escape

from app.preferences import END
from app.words import HTML_LANGUAGES, Say

SHOWN_REJECTS = 10  # of those drawn, likeliest first
FIGURES = {
    "mean_reward": lambda result: f"{result['mean_reward']:.2f}",
    "preference_term": lambda result: f"{result['preference']:.2f}",
    "cross_entropy": lambda result: f"{result['cross_entropy']:.2f}",
    "accuracy": lambda result: f"{100 * result['accuracy']:.0f} %",
}
INVISIBLE = {"\n": "⏎", "\t": "⇥", " ": "␣"}


def tokens(say: Say, result: dict | None, lang: str | None = None) -> str:
    """The coloured outline with the figures of its loss, and an empty panel that the page's script fills.

    result: of `app.preferences.token_preferences`; lang: of the outline.
    """
    if not result:
        return f'<div class="tokens-empty faint">{escape(say("empty_preferences"))}</div>'
    true, flipped = (say(f"name_{result[key]}") for key in ("style", "flipped"))
    marks = "".join(_token(i, token) for i, token in enumerate(result["tokens"]))
    scale = "".join(f'<i style="{_colour(step)}"></i>' for step in (-3, -1.5, -0.5, 0, 0.5, 1.5, 3))
    legend = (
        f'<p class="legend"><span>{escape(say("likelier", style=flipped))}</span>'
        f'<span class="scale" aria-hidden="true">{scale}</span>'
        f"<span>{escape(say('likelier', style=true))}</span></p>"
    )
    cut = f'<p class="note">{escape(say("preferences_cut", cut=result["cut"]))}</p>' if result["cut"] else ""
    data = escape(json.dumps(_panel_words(say, result, true, flipped), ensure_ascii=False), quote=True)
    html_lang = f' lang="{HTML_LANGUAGES[lang]}"' if lang else ""
    return (
        f'<div class="loss-view"><div><ul class="facts">{_figures(say, result)}</ul>{legend}'
        f'<div class="tokens" role="group" aria-label="{escape(say("outline"))}"{html_lang} data-words="{data}">'
        f'{marks}</div>{cut}</div><aside class="token-panel" aria-live="polite"><p class="faint">'
        f"{escape(say('choose_token'))}</p></aside></div>"
    )


def _figures(say: Say, result: dict) -> str:
    """The four figures; each says what it is on hover, on focus and to screen readers."""
    items = ""
    for key, value in FIGURES.items():
        name, explained = escape(say(key)), escape(say(f"{key}_explained"))
        items += (
            f'<li tabindex="0" class="term" aria-describedby="about-{key}"><b>{value(result)}</b> {name}'
            f'<span role="tooltip" id="about-{key}">{explained}</span></li>'
        )
    return items


def _panel_words(say: Say, result: dict, true: str, flipped: str) -> dict[str, str]:
    """What the page's script says about a chosen token."""
    drawn = len(result["tokens"][0]["rejects"])
    return {
        "number": say("token_number", number="{number}", count=len(result["tokens"])),
        "true": say("true_prompt", style=true),
        "flipped": say("flipped_prompt", style=flipped),
        "rejects": say("rejects", shown=min(SHOWN_REJECTS, drawn), drawn=drawn),
        "tie": say("reward_help", baseline=f"{1 / (drawn + 1):.2f}", count=drawn),
        "end": say("end_token"),
    }


def _token(place: int, token: dict) -> str:
    log_ratio = math.log(max(token["p"], 1e-12) / max(token["p_flipped"], 1e-12))
    data = [token["p"], token["p_flipped"], token["reward"]]
    data.append([[visible(r["text"]), r["p"], r["p_flipped"]] for r in token["rejects"][:SHOWN_REJECTS]])
    compact = json.dumps(data, ensure_ascii=False, default=float, separators=(",", ":"))
    compact = re.sub(r"\d+\.\d{5,}(?:e-?\d+)?|\d+(?:\.\d+)?e-\d+", lambda m: f"{float(m[0]):.4g}", compact)
    shown = token["text"]
    label = shown if shown.strip() else "⏎" if "\n" in shown else "·"
    mark = (
        f'<button type="button" class="token{" end" if shown == END else ""}" tabindex="{0 if place == 0 else -1}" '
        f'style="{_colour(log_ratio)}" data-token="{escape(compact, quote=True)}" data-place="{place + 1}" '
        f'data-text="{escape(visible(shown), quote=True)}">{escape(label)}</button>'
    )
    return mark + "<br>" * shown.count("\n")


def visible(piece: str) -> str:
    """White space at a token's ends as signs, so that " the" and "the" can be told apart."""
    if not piece:
        return "·"
    return "".join(INVISIBLE.get(c, c) if c != " " or i == 0 or not piece.strip() else c for i, c in enumerate(piece))


def _colour(log_ratio: float) -> str:
    """Hue by sign, strength by size; a factor of 20 between the two prompts is full strength."""
    strength = min(1.0, abs(log_ratio) / math.log(20))
    return f"--strength:{strength:.2f};--hue:var(--{'true' if log_ratio >= 0 else 'flipped'})"
