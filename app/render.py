"""HTML of the page's own parts. Everything that comes from a visitor or a model is escaped here."""

from __future__ import annotations

import json
import math
import re
from html import escape

from app.preferences import END
from app.service import Column, Query, Update
from app.texts import TEXTS, text

LINE = re.compile(r"(\s*)(\d+(?:\.\d+)*)[.、)]?\s+(.*)")
INVISIBLE = {"\n": "⏎", "\t": "⇥", " ": "␣"}


def method_name(ui: str, method: str) -> str:
    return text(ui, f"method_{method}") if f"method_{method}" in TEXTS["en"] else method


# ---- status line ---------------------------------------------------------------------------------------


def loading(ui: str, stage: str, seconds: float) -> str:
    words = text(ui, "state_loading", stage=text(ui, f"stage_{stage}"), seconds=f"{seconds:.0f}")
    return f'<p class="status busy" role="status">{escape(words)}</p>'


def status(ui: str, update: Update, working: str = "state_writing", elapsed: float = 0.0) -> str:
    """What happens now, in a sentence, and what was cut from the article."""
    if update.state == "loading":
        return loading(ui, update.stage, elapsed)
    if update.state == "waiting":
        words = text(ui, "state_waiting", place=max(1, update.place))
    elif update.state == "writing":
        words = text(ui, working)
    else:
        words = text(ui, f"state_{update.state}", seconds=f"{update.seconds:.1f}")
    busy = " busy" if update.state in ("waiting", "writing") else ""
    lines = [f'<p class="status{busy}" role="status">{escape(words)}</p>']
    query = update.query
    if query and query.cut:
        lines.append(f'<p class="note">{escape(text(ui, "cut", **query.cut))}</p>')
    if query and query.article and query.lang == "zh":
        lines.append(f'<p class="note">{escape(text(ui, "zh_topic"))}</p>')
    for names in _same(update.columns if update.state == "done" else []):
        listed = ", ".join(method_name(ui, name) for name in names)
        lines.append(f'<p class="note">{escape(text(ui, "same_outline", names=listed))}</p>')
    return "".join(lines)


def _same(columns: list[Column]) -> list[list[str]]:
    """Methods that wrote the same outline in the same style, word for word."""
    groups: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        if column.text:
            groups.setdefault((column.style, column.text), []).append(column.method)
    return [methods for methods in groups.values() if len(methods) > 1]


def refusal(message: str) -> str:
    return f'<p class="status alert" role="alert">{escape(message)}</p>'


# ---- outlines ------------------------------------------------------------------------------------------


def board(ui: str, columns: list[Column], state: str = "empty", query: Query | None = None, by: str = "method") -> str:
    """Columns side by side. by: what tells them apart, "method" or "style"."""
    busy = "true" if state == "writing" else "false"
    cells = "".join(_column(ui, i, column, state, query, by) for i, column in enumerate(columns))
    label = escape(text(ui, "outlines"))
    return f'<section class="board n{len(columns)}" aria-label="{label}" aria-busy="{busy}">{cells}</section>'


def _column(ui: str, place: int, column: Column, state: str, query: Query | None, by: str) -> str:
    if by == "method":
        name = method_name(ui, column.method)
        about = text(ui, f"about_{column.method}" if f"about_{column.method}" in TEXTS["en"] else "about_own")
    else:
        name, about = text(ui, f"style_{column.style}").split("\n")
    kind = column.method if by == "method" else column.style
    ended = state in ("done", "stopped")
    if column.text:
        body = outline(column.text)
    else:
        key = {"empty": "empty_board", "writing": "writing_first"}.get(state, "nothing_written")
        body = f'<p class="faint">{escape(text(ui, key))}</p>'
    caret = '<span class="caret" aria-hidden="true"></span>' if state == "writing" else ""
    facts = _facts(ui, column, query) if ended and column.text else ""
    return (
        f'<article class="sheet" data-kind="{escape(kind)}"><header><h3>{escape(name)}</h3>'
        f'<p>{escape(about)}</p></header><div class="outline" dir="auto">{body}{caret}</div>{facts}'
        f"{_actions(ui, place, column, query, by, name) if ended and column.text else ''}</article>"
    )


def outline(written: str) -> str:
    """An outline's lines; numbers stand apart from the words, sub-headings are indented."""
    lines = []
    for line in written.split("\n"):
        if not line.strip():
            continue
        match = LINE.fullmatch(line)
        if not match:
            lines.append(f'<p class="line plain" dir="auto">{escape(line.strip())}</p>')
            continue
        level = "sub" if match[1] or "." in match[2] else "top"
        number = match[2] if "." in match[2] else f"{match[2]}."
        lines.append(
            f'<p class="line {level}"><span class="number">{number}</span>'
            f'<span class="words" dir="auto">{escape(match[3])}</span></p>'
        )
    return "".join(lines)


def _facts(ui: str, column: Column, query: Query) -> str:
    unit = "words" if query.lang == "en" else "characters"
    numbers = ((column.headings, "headings"), (column.words, unit), (f"{column.seconds:.1f}", "seconds"))
    items = "".join(f"<li><b>{value}</b> {escape(text(ui, key))}</li>" for value, key in numbers)
    warnings = [key for key, here in (("not_outline", not column.valid), ("at_limit", column.at_limit)) if here]
    notes = "".join(f'<p class="fault">{escape(text(ui, key))}</p>' for key in warnings)
    return f'<ul class="facts">{items}</ul>{_verdict(ui, column)}{notes}'


def _verdict(ui: str, column: Column) -> str:
    if not column.verdict:
        return f'<p class="verdict">{escape(text(ui, "no_verdict"))}</p>'
    style, share = column.verdict
    right = style == column.style
    asked = text(ui, "as_asked") if right else text(ui, "not_as_asked", style=text(ui, f"name_{column.style}"))
    return (
        f'<p class="verdict {"right" if right else "wrong"}"><span>{escape(text(ui, "reads_as"))} '
        f"<b>{escape(text(ui, f'name_{style}'))}</b>, {share:.2f}</span><small>{escape(asked)}</small>"
        f'<span class="meter" aria-hidden="true"><i style="width:{100 * share:.0f}%"></i></span></p>'
    )


def _actions(ui: str, place: int, column: Column, query: Query, by: str, name: str) -> str:
    title = f"# {query.topic}\n\n*{name}, {text(ui, f'name_{column.style}')}*\n\n"
    words = re.sub(r"[^\w]+", "-", query.topic.lower()).strip("-")[:50] or "outline"
    data = escape(column.text, quote=True), escape(title, quote=True)
    buttons = (
        f'<button type="button" data-copy aria-label="{escape(text(ui, "copy"))}: {escape(name)}" '
        f'data-done="{escape(text(ui, "copied"))}">{escape(text(ui, "copy"))}</button>'
        f'<button type="button" data-download="{escape(f"{words}-{column.style}-{column.method}.md", quote=True)}" '
        f'aria-label="{escape(text(ui, "download"))}: {escape(name)}">{escape(text(ui, "download"))}</button>'
    )
    if by == "method":
        buttons += (
            f'<button type="button" data-inspect="{place}" aria-label="{escape(text(ui, "inspect"))}: '
            f'{escape(name)}">{escape(text(ui, "inspect"))}</button>'
        )
    return f'<footer class="actions" data-text="{data[0]}" data-title="{data[1]}">{buttons}</footer>'


# ---- token preferences ---------------------------------------------------------------------------------


def tokens(ui: str, result: dict | None) -> str:
    """The coloured outline with the figures of its loss, and an empty panel that the page's script fills."""
    if not result:
        return f'<div class="tokens-empty faint">{escape(text(ui, "empty_preferences"))}</div>'
    true, flipped = (text(ui, f"name_{result[key]}") for key in KEYS)
    count = len(result["tokens"])
    marks = "".join(_token(i, token) for i, token in enumerate(result["tokens"]))
    rejects = len(result["tokens"][0]["rejects"])
    words = {
        "number": text(ui, "token_number", number="{number}", count=count),
        "true": f"{text(ui, 'true_prompt')} ({true})",
        "flipped": f"{text(ui, 'flipped_prompt')} ({flipped})",
        "probability": text(ui, "probability"),
        "rejects": text(ui, "rejects"),
        "tie": text(ui, "reward_help", baseline=f"{1 / (rejects + 1):.3f}", count=rejects),
        "end": text(ui, "end_token"),
    }
    figures = (
        ("mean_reward", f"{result['mean_reward']:.3f}"),
        ("preference_term", f"{result['preference']:.3f}"),
        ("cross_entropy", f"{result['cross_entropy']:.2f}"),
        ("accuracy", f"{100 * result['accuracy']:.0f} %"),
    )
    sums = "".join(f"<li><b>{value}</b> {escape(text(ui, key))}</li>" for key, value in figures)
    scale = "".join(f'<i style="{_colour(step)}"></i>' for step in (-3, -1.5, -0.5, 0, 0.5, 1.5, 3))
    legend = (
        f'<p class="legend"><span>{escape(text(ui, "likelier_flipped", style=flipped))}</span>'
        f'<span class="scale" aria-hidden="true">{scale}</span>'
        f"<span>{escape(text(ui, 'likelier_true', style=true))}</span></p>"
    )
    cut = f'<p class="note">{escape(text(ui, "preferences_cut", cut=result["cut"]))}</p>' if result["cut"] else ""
    data = escape(json.dumps(words, ensure_ascii=False), quote=True)
    return (
        f'<div class="loss-view"><div><ul class="facts">{sums}</ul>{legend}'
        f'<div class="tokens" role="group" aria-label="{escape(text(ui, "outline"))}" data-words="{data}">{marks}</div>'
        f'{cut}</div><aside class="token-panel" aria-live="polite"><p class="faint">'
        f"{escape(text(ui, 'choose_token'))}</p></aside></div>"
    )


KEYS = ("style", "flipped")


def _token(place: int, token: dict) -> str:
    log_ratio = math.log(max(token["p"], 1e-12) / max(token["p_flipped"], 1e-12))
    data = [token["p"], token["p_flipped"], token["reward"]]
    data.append([[visible(r["text"]), r["p"], r["p_flipped"]] for r in token["rejects"]])
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
