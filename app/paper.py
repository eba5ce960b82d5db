"""The paper tab: the published numbers beside the tables and figures that `paper/reproduce.py` wrote."""

from __future__ import annotations

import base64
import csv
import io
import re
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

from app.texts import text

COMMAND = "python paper/reproduce.py"
LARGEST = 3_000_000  # bytes of one figure that is put into the page

# From the abstract and the bars of the framework figure (± 0.3).
PUBLISHED = {"ROUGE-1": (37.5, 43.4), "BLEU-4": (24.9, 30.3), "published_memory": (229.5, 171.0)}
PUBLISHED_GAIN, PUBLISHED_TIME = 19.28, 56.25


def paper_page(ui: str, root: Path) -> str:
    """HTML of the tab. root: the project's folder; tables in paper/tables, figures in figures or paper/figures."""
    tables = _files(root / "paper" / "tables", (".md", ".csv"))
    figures = [f for folder in ("figures", "paper/figures") for f in _files(root / folder, (".png",))]
    parts = [f'<p class="lead">{escape(text(ui, "paper_lead"))}</p>', _published(ui)]
    if not tables and not figures:
        missing = escape(text(ui, "paper_missing"))
        parts.append(f'<p class="note">{missing}</p><pre class="command">{COMMAND}</pre>')
    if figures:
        parts.append(f"<h2>{escape(text(ui, 'figures'))}</h2>")
        parts += [_figure(f) for f in figures if f.stat().st_size <= LARGEST]
    if tables:
        parts.append(f"<h2>{escape(text(ui, 'tables'))}</h2>")
        parts += [_table(f) for f in tables]
    return f'<div class="paper">{"".join(parts)}</div>'


def _files(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """One file a name, of the first ending that is there."""
    found: dict[str, Path] = {}
    for ending in endings:
        for path in sorted(folder.glob(f"*{ending}")):
            found.setdefault(path.stem, path)
    return [found[stem] for stem in sorted(found)]


def _title(path: Path) -> str:
    """figure1-zh.png → Figure 1, 中文"""
    numbered = re.fullmatch(r"(figure|table)(\d+)(?:-(en|zh))?", path.stem)
    if not numbered:
        return path.stem.replace("_", " ").replace("-", " ").capitalize()
    kind, number, language = numbered.groups()
    return f"{kind.capitalize()} {number}" + {"en": ", English", "zh": ", 中文", None: ""}[language]


def _table(path: Path) -> str:
    """A table under its title; a long one is folded."""
    content = path.read_text(encoding="utf-8", errors="replace")
    title, is_open = _title(path), content.count("\n") <= 20
    if path.suffix == ".md":
        if content.startswith("**"):
            first, _, content = content.partition("\n")
            title = first.strip("* ")
        table = MarkdownIt("commonmark", {"html": False}).enable("table").render(content)
    else:
        head, *body = list(csv.reader(io.StringIO(content))) or [[]]
        lines = "".join(f"<tr>{_cells(row, 'td')}</tr>" for row in body)
        table = f"<table><thead><tr>{_cells(head, 'th')}</tr></thead><tbody>{lines}</tbody></table>"
    fold = " open" if is_open else ""
    return f'<details{fold}><summary>{escape(title)}</summary><div class="wide">{table}</div></details>'


def _cells(row: list[str], tag: str) -> str:
    return "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)


def _figure(path: Path) -> str:
    data, title = base64.b64encode(path.read_bytes()).decode(), escape(_title(path))
    return f'<figure><img alt="{title}" src="data:image/png;base64,{data}"><figcaption>{title}</figcaption></figure>'


def _published(ui: str) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(text(ui, name) if name in ("published_memory",) else name)}</th>'
        f"<td>{dpo:.1f}</td><td><b>{tkpo:.1f}</b></td><td>{100 * (tkpo / dpo - 1):+.1f} %</td></tr>"
        for name, (dpo, tkpo) in PUBLISHED.items()
    )
    facts = (
        f"<li><b>{PUBLISHED_GAIN} %</b> {escape(text(ui, 'published_gain'))}</li>"
        f"<li><b>{PUBLISHED_TIME} %</b> {escape(text(ui, 'published_time'))}</li>"
    )
    return (
        f'<section class="published"><h2>{escape(text(ui, "published"))}</h2><ul class="facts">{facts}</ul>'
        "<table><thead><tr><td></td><th>DPO</th><th>TKPO</th><th>Δ</th></tr></thead>"
        f'<tbody>{rows}</tbody></table><p class="note">{escape(text(ui, "published_note"))}</p></section>'
    )
