"""Tables of text cells, as Markdown, CSV, LaTeX and terminal output."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd


@dataclass
class Block:
    """Rows under one header. The first `text` columns are left-aligned, the others right."""

    cells: pd.DataFrame
    text: int
    caption: str = ""


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


def latex(table: Table) -> str:
    """booktabs tables, one per block, for \\input."""

    def clean(text: str) -> str:
        return "".join(LATEX.get(c, c) for c in text)

    parts = []
    for block in table.blocks:
        columns = "l" * block.text + "r" * (block.cells.shape[1] - block.text)
        cells = block.cells.map(clean).rename(columns=clean)
        body = cells.style.hide(axis="index").to_latex(column_format=columns, hrules=True)
        title = clean(f"{table.title}. {block.caption}".rstrip(". ") + ".")
        parts.append(
            "\n".join([r"\begin{table*}", r"\centering\small", rf"\caption{{{title}}}", body + r"\end{table*}"])
        )
    return "\n\n".join(parts) + "\n" + "".join(f"% {note}\n" for note in table.notes)


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
