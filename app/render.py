"""HTML of status line and outlines. Everything that comes from a visitor or a model is escaped here."""

from __future__ import annotations

import re
from html import escape

from app.jobs import Column, Update
from app.queries import Query
from app.verdicts import Verdict
from app.words import HTML_LANGUAGES, Say
from tkpo.methods import METHODS

LINE = re.compile(r"(\s*)(\d+(?:\.\d+)*)[.、)]?\s+(.*)")
NUMBER_ALONE = re.compile(r"[\d.、)\s]*")  # a line of which only the number is written so far
FULL_BAR = 5.0  # log-odds that fill half the bar, some 150 to 1


# ---- status line ---------------------------------------------------------------------------------------


def loading(say: Say, stage: str, seconds: float) -> str:
    words = say("state_loading", stage=say(f"stage_{stage}"), seconds=f"{seconds:.0f}")
    return f'<p class="status busy" role="status">{escape(words)}</p>'


def status(say: Say, update: Update, working: str = "state_writing") -> str:
    """What happens now, in a sentence, and what was cut from the article. working: key of that while it writes."""
    if update.state == "loading":
        return loading(say, update.stage, update.seconds)
    lines = [_doing(say, update, working)]
    query = update.query
    if query and query.cut:
        lines.append(f'<p class="note">{escape(say("cut", **query.cut))}</p>')
    if query and query.article and query.lang == "zh" and not update.stored:
        lines.append(f'<p class="note">{escape(say("zh_topic"))}</p>')
    for names in _same(update.columns if update.state == "done" else []):
        listed = ", ".join(say.method(name) for name in names)
        lines.append(f'<p class="note">{escape(say("same_outline", names=listed))}</p>')
    return "".join(lines)


def _doing(say: Say, update: Update, working: str) -> str:
    if update.stored:
        return stored(say)
    bar = ""
    if update.state == "waiting":
        words = say("state_waiting", place=max(1, update.place))
    elif update.state == "reading" and update.read:
        percent = round(100 * update.read)
        words = say("reading_share", percent=percent)
        bar = f'<progress max="100" value="{percent}" aria-label="{escape(words)}"></progress>'
    elif update.state == "writing":
        words = say(working)
    else:
        words = say(f"state_{update.state}", seconds=f"{update.seconds:.1f}")
    busy = "" if update.is_over else " busy"
    return f'<p class="status{busy}" role="status">{escape(words)}{bar}</p>'


def stored(say: Say) -> str:
    return f'<p class="status stored">{escape(say("stored"))}</p>'


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


def board(say: Say, update: Update, by: str = "method") -> str:
    """Columns side by side. by: what tells them apart, "method" or "style"."""
    busy = "true" if update.state in ("reading", "writing") else "false"
    cells = "".join(_column(say, i, column, update, by) for i, column in enumerate(update.columns))
    label = escape(say("outlines"))
    return f'<section class="board n{len(update.columns)}" aria-label="{label}" aria-busy="{busy}">{cells}</section>'


def _column(say: Say, place: int, column: Column, update: Update, by: str) -> str:
    if by == "method":
        name = say.method(column.method)
        about = say(f"about_{column.method}" if f"about_{column.method}" in say else "about_own")
    else:
        name, about = say(f"style_{column.style}").split("\n")
    kind = column.method if by == "method" else column.style
    finished = update.is_over and column.text
    lang = f' lang="{HTML_LANGUAGES[update.query.lang]}"' if update.query else ""
    if column.text:
        body = outline(column.text, growing=not update.is_over)
    else:
        key = {"empty": "empty_board", "reading": "writing_first", "writing": "writing_first"}
        body, lang = f'<p class="faint">{escape(say(key.get(update.state, "nothing_written")))}</p>', ""
    caret = '<span class="caret" aria-hidden="true"></span>' if update.state == "writing" else ""
    colour = f' style="--method: {METHODS[kind].color}"' if kind in METHODS else ""
    return (
        f'<article class="sheet" data-kind="{escape(kind)}"{colour}><header><h3>{escape(name)}</h3>'
        f'<p>{escape(about)}</p></header><div class="outline" dir="auto"{lang}>{body}{caret}</div>'
        f"{_facts(say, column, update) if finished else ''}"
        f"{_actions(say, place, column, update.query, by, name) if finished else ''}</article>"
    )


def outline(written: str, growing: bool = False) -> str:
    """An outline's lines; numbers stand apart from the words, sub-headings are indented.

    growing: the last line is held back until its first word is there, so that no number moves on the page.
    """
    lines = written.split("\n")
    if growing and len(lines) > 1 and NUMBER_ALONE.fullmatch(lines[-1]):
        lines.pop()
    return "".join(_line(line) for line in lines if line.strip())


def _line(line: str) -> str:
    match = LINE.fullmatch(line)
    if not match:
        return f'<p class="line plain" dir="auto">{escape(line.strip())}</p>'
    level = "sub" if match[1] or "." in match[2] else "top"
    number = match[2] if "." in match[2] else f"{match[2]}."
    return (
        f'<p class="line {level}"><span class="number">{number}</span>'
        f'<span class="words" dir="auto">{escape(match[3])}</span></p>'
    )


# ---- verdicts ------------------------------------------------------------------------------------------


def _facts(say: Say, column: Column, update: Update) -> str:
    verdict, unit = column.verdict, "words" if update.query.lang == "en" else "characters"
    if verdict is None:
        return ""
    numbers = [(verdict.headings, "headings"), (verdict.sub_headings, "sub_headings"), (verdict.words, unit)]
    if not update.stored:
        numbers.append((f"{column.seconds:.1f}", "seconds"))
    items = "".join(f"<li><b>{value}</b> {escape(say(key))}</li>" for value, key in numbers)
    faults = {"repeats": verdict.repeats, "not_outline": not verdict.well_formed, "at_limit": column.at_limit}
    notes = "".join(f'<p class="fault">{escape(say(key))}</p>' for key, there in faults.items() if there)
    return f'<div class="verdicts">{_style(say, verdict, column.style)}{_level(say, verdict)}{notes}</div>' + (
        f'<ul class="facts">{items}</ul>'
    )


def _style(say: Say, verdict: Verdict, style: str) -> str:
    """The style's log-odds as a bar from the middle: to the right, the style that was asked for."""
    if verdict.repeats or verdict.log_odds is None:
        key = "loop_verdict" if verdict.repeats else "no_verdict"
        return f'<p class="verdict none">{escape(say(key))}</p>'
    right = verdict.reads_as == style
    share = min(1.0, abs(verdict.log_odds) / FULL_BAR) * 50
    start = 50 if verdict.log_odds >= 0 else 50 - share
    value = f"{verdict.log_odds:+.1f}".replace("-", "−")
    label = escape(say("log_odds", value=value), quote=True)
    reads = escape(say("reads_as", style=say(f"name_{verdict.reads_as}")))
    return (
        f'<p class="verdict {"right" if right else "wrong"}"><span>{reads}</span><b aria-hidden="true">{value}</b>'
        f'<span class="odds" role="img" aria-label="{label}" title="{label}">'
        f'<i style="inset-inline-start:{start:.1f}%;width:{share:.1f}%"></i></span></p>'
    )


def _level(say: Say, verdict: Verdict) -> str:
    if verdict.level is None:
        return ""
    key, kind = ("level_kept", "right") if verdict.level else ("level_missed", "wrong")
    return f'<p class="level {kind}">{escape(say(key))}</p>'


def _actions(say: Say, place: int, column: Column, query: Query, by: str, name: str) -> str:
    title = f"# {query.topic}\n\n*{name}, {say(f'name_{column.style}')}*\n\n"
    words = re.sub(r"[^\w]+", "-", query.topic.lower()).strip("-")[:50] or "outline"
    file = escape(f"{words}-{column.style}-{column.method}.md", quote=True)
    buttons = _action(say, "copy", name, f'data-copy data-done="{escape(say("copied"))}"')
    buttons += _action(say, "download", name, f'data-download="{file}"')
    if by == "method":
        buttons += _action(say, "inspect", name, f'data-inspect="{place}"')
    data = escape(column.text, quote=True), escape(title, quote=True)
    return f'<footer class="actions" data-text="{data[0]}" data-title="{data[1]}">{buttons}</footer>'


def _action(say: Say, key: str, name: str, data: str) -> str:
    label = escape(say(key))
    return f'<button type="button" {data} aria-label="{label}: {escape(name, quote=True)}">{label}</button>'
