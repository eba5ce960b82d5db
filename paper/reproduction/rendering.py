"""Tables of text cells, as Markdown, CSV, LaTeX and terminal output."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd


@dataclass
class Block:
    """Rows under one header.

    cells: of text. text: how many leading columns are left-aligned; the others are right-aligned. group: how many of
    those name the part of the table that a row belongs to; LaTeX sets them as a line above the part.
    """

    cells: pd.DataFrame
    text: int
    caption: str = ""
    group: int = 0


@dataclass
class Table:
    """A numbered table of one or more blocks, with notes beneath."""

    number: int
    title: str
    blocks: list[Block]
    notes: list[str] = field(default_factory=list)


def markdown(table: Table) -> str:
    parts = [f"**Table {table.number}. {table.title}**"]
    for block in table.blocks:
        align = ["left"] * block.text + ["right"] * (block.cells.shape[1] - block.text)
        cells = block.cells.replace("|", "\\|", regex=False)
        if block.caption:
            parts.append(f"{block.caption}:")
        parts.append(cells.to_markdown(index=False, disable_numparse=True, colalign=align))
    return "\n\n".join([*parts, *table.notes]) + "\n"


def csv_text(table: Table) -> str:
    """Every block with its header; a blank line between two."""
    return "\n".join(block.cells.to_csv(index=False, lineterminator="\n") for block in table.blocks)


LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}"}
LATEX |= {"±": r"$\pm$", "×": r"$\times$", "†": r"$\dagger$", "–": "--", "−": "$-$", "≤": r"$\le$", "≥": r"$\ge$"}
LATEX |= {"λ": r"$\lambda$", "τ": r"$\tau$", "β": r"$\beta$", "γ": r"$\gamma$", "…": r"\dots{}"}
LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


ROWS_PER_FLOAT = 60  # that fit a page at scriptsize, with caption and notes


def latex(table: Table) -> str:
    """booktabs tables across both columns of a page, with labels and the notes beneath the last, for \\input."""
    parts, number = [], 0
    for block in table.blocks:
        shown: list[pd.DataFrame] = []
        for rows in _floats(block):
            number += 1
            last = block is table.blocks[-1] and len(rows) + sum(map(len, shown)) == len(block.cells)
            shown.append(rows)
            label = f"tab:{table.number}" + (f"-{number}" if number > 1 else "")
            title = f"{table.title}. {block.caption}".rstrip(". ") + "."
            parts.append(_float(block, rows, title, label, table.notes if last else []))
    return "\n\n".join(parts) + "\n"


def _floats(block: Block) -> list[pd.DataFrame]:
    """The rows of a block, in pieces that fit a page; a part is not torn unless it must."""
    if len(block.cells) <= ROWS_PER_FLOAT:
        return [block.cells]
    names = list(block.cells.columns[: block.group])
    groups = [own for _, own in block.cells.groupby(names, sort=False)] if names else [block.cells]
    pieces: list[list[pd.DataFrame]] = [[]]
    for own in groups:
        for start in range(0, len(own), ROWS_PER_FLOAT):
            part = own.iloc[start : start + ROWS_PER_FLOAT]
            if pieces[-1] and sum(map(len, pieces[-1])) + len(part) > ROWS_PER_FLOAT:
                pieces.append([])
            pieces[-1].append(part)
    return [pd.concat(piece) for piece in pieces]


def _float(block: Block, rows: pd.DataFrame, title: str, label: str, notes: list[str]) -> str:
    shown = rows.iloc[:, block.group :].rename(columns=clean).map(clean)
    text = block.text - block.group
    columns = "l" * text + "r" * (shown.shape[1] - text)
    body = shown.style.hide(axis="index").to_latex(column_format="@{}" + columns + "@{}", hrules=True).splitlines()
    if block.group:
        start = body.index(r"\midrule") + 1
        names = [", ".join(filter(None, row)) for row in rows.iloc[:, : block.group].itertuples(index=False)]
        lines = []
        for place, (name, line) in enumerate(zip(names, body[start : start + len(rows)], strict=True)):
            if place == 0 or name != names[place - 1]:
                lines += [r"\midrule"] * (place > 0)
                lines.append(rf"\multicolumn{{{shown.shape[1]}}}{{@{{}}l}}{{\emph{{{clean(name)}}}}} \\")
            lines.append(line)
        body[start : start + len(rows)] = lines
    parts = [r"\begin{table*}[t]", r"\centering\scriptsize", r"\setlength{\tabcolsep}{3pt}"]
    parts += [rf"\caption{{{clean(title)}}}", rf"\label{{{label}}}", *body]
    if notes:
        parts += [r"\par\smallskip\begin{minipage}{\textwidth}\raggedright"]
        parts += [clean_note(note) + r"\par" for note in notes]
        parts.append(r"\end{minipage}")
    return "\n".join([*parts, r"\end{table*}"])


def clean(text: str) -> str:
    """Text for LaTeX."""
    return "".join(LATEX.get(c, c) for c in text)


def clean_note(text: str) -> str:
    """A note for LaTeX, with its *emphasis* and `code`."""
    text = re.sub(r"\*([^*]+)\*", r"\\emph{\1}", clean(text))
    return re.sub(r"`([^`]+)`", r"\\texttt{\1}", text)


def show(table: Table) -> None:
    """Print a table for a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 200)
    console.print(Text(f"Table {table.number}. {table.title}", style="bold"))
    for block in table.blocks:
        shown = RichTable(title=block.caption or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(block.cells.columns):
            shown.add_column(Text(name), justify="left" if number < block.text else "right")
        for row in block.cells.itertuples(index=False):
            shown.add_row(*map(Text, row))
        console.print(shown)
    for note in table.notes:
        console.print(Text(note, style="dim"))
    console.print()


FORMATS = {"md": markdown, "csv": csv_text, "tex": latex}


def write(table: Table, folder: Path) -> None:
    """Write `table` in every format."""
    folder.mkdir(parents=True, exist_ok=True)
    for ending, render in FORMATS.items():
        (folder / f"table{table.number}.{ending}").write_text(render(table), encoding="utf-8", newline="\n")
