"""Figure 1: outlines by each method, in every style."""

from __future__ import annotations

import re
import textwrap
import unicodedata

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper.reproduction.experiments import Experiments
from paper.reproduction.figures.style import SMALL, WIDTH, glyphs, say_empty
from paper.reproduction.names import METHODS, dataset_title
from tkpo.data import load_records

SHOWN = ("sft", "dpo", "tkpo")
WRAP = {"en": 29, "zh": 30}  # columns to a line; a Chinese character takes two
LINE = 0.128  # inches from line to line
COLUMNS = (0.165, 0.445, 0.725)  # where the methods' columns begin, as shares of the width


def figure1(experiments: Experiments) -> dict[str, Figure]:
    """One English and one Chinese article, outlined in every style by each method."""
    return {f"figure1-{lang}": _draw(experiments, lang) for lang in experiments.languages}


def chosen(experiments: Experiments, lang: str) -> pd.DataFrame:
    """The outlines shown: index (data set, style, article), one column per method.

    The article with most styles comes first; a style that it lacks is shown with another article.
    """
    rows = []
    for row in experiments.planned("figure 1").itertuples():
        if row.method in SHOWN and row.stored and not row.label:
            for made in experiments.store.get(row.run)["predictions"]:
                if (made["lang"], made["form"]) == (lang, "article"):
                    axis = made.get("axis") or row.training
                    where = {"dataset": axis, "style": made["attribute"], "article": made["id"]}
                    rows.append(where | {"method": row.method, "text": made["prediction"]})
    if not rows:
        return pd.DataFrame()
    frame = pd.DataFrame(rows).drop_duplicates(["dataset", "style", "article", "method"])
    styles = frame.drop_duplicates(["dataset", "style", "article"]).groupby("article").size()
    frame["order"] = frame["article"].map(styles.rank(method="first", ascending=False))
    frame["place"] = frame["dataset"].factorize()[0]
    first = frame.groupby(["dataset", "style"])["order"].transform("min")
    frame = frame[frame["order"] == first]
    index = ["order", "place", "dataset", "style", "article"]
    return frame.pivot(index=index, columns="method", values="text").sort_index().fillna("")


def _draw(experiments: Experiments, lang: str) -> Figure:
    texts = chosen(experiments, lang)
    if texts.empty:
        figure = plt.figure(figsize=(WIDTH, 1.5))
        say_empty(figure.add_subplot(frameon=False), experiments, "figure 1")
        return figure
    rows = [[_wrapped(row.get(method, ""), lang) for method in SHOWN] for _, row in texts.iterrows()]
    heights = [LINE * (max(max(map(len, row)), 4) + 1.2) for row in rows]
    articles = texts.index.get_level_values("article")
    titles = [0.3 if article not in articles[:i] else 0.0 for i, article in enumerate(articles)]
    figure = plt.figure(figsize=(WIDTH, 0.25 + sum(heights) + sum(titles)))
    total = figure.get_figheight()
    for x, method in zip(COLUMNS, SHOWN, strict=True):
        figure.text(x, 1 - 0.15 / total, METHODS[method], fontsize=8, weight="bold", va="center")
    y = 0.25
    for (*_, dataset, style, article), row, height, title in zip(texts.index, rows, heights, titles, strict=True):
        if title:
            name = f"{_topic(dataset, article, lang)} ({article})"
            weight = "bold" if lang == "en" else "normal"  # the Chinese font has no bold
            figure.text(0.01, 1 - (y + 0.19) / total, name, fontsize=8, weight=weight, va="center")
            y += title
        _draw_row(figure, 1 - y / total, LINE / total, (style, dataset_title(dataset)), row)
        y += height
    return figure


def _draw_row(figure: Figure, top: float, line: float, labels: tuple[str, str], row: list[list[str]]) -> None:
    """A rule, the style with its data set, and each method's outline; top and line: shares of the height."""
    figure.add_artist(plt.Line2D([0.01, 0.99], [top, top], color="#BBBBBB", linewidth=0.7))
    first = top - 0.6 * line
    figure.text(0.01, first, labels[0], va="top", fontsize=SMALL, weight="bold")
    figure.text(0.01, first - 1.2 * line, labels[1].replace(" of ", "\nof "), va="top", fontsize=SMALL, color="#555555")
    for x, lines in zip(COLUMNS, row, strict=True):
        figure.text(x, first, "\n".join(lines) or "(empty)", va="top", fontsize=SMALL, linespacing=1.2)


def _topic(dataset: str, article: str, lang: str) -> str:
    """The topic of a test article: the input of its topic-only samples, without the words before it."""
    for record in load_records(dataset, "test", lang):
        if (record["id"], record["form"]) == (article, "topic"):
            return re.split("[:：]", record["input"], maxsplit=1)[-1].strip()
    return "Article"


def _wrapped(text: str, lang: str, most: int = 16) -> list[str]:
    """Lines of an outline, wrapped with a hanging indent, at most `most`, then …

    `$` is text and begins no formula; □ stands for a character that the fonts lack.
    """
    lines: list[str] = []
    known, width = glyphs(), WRAP[lang]
    text = "".join(c if c == "\n" or ord(c) in known else "□" for c in text.expandtabs(3))
    for line in text.strip().replace("$", r"\$").split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        if lang == "zh":
            lines += _wrapped_chinese(line, width, indent + "   ")
        else:
            lines += textwrap.wrap(line, width, subsequent_indent=indent + "   ", drop_whitespace=True) or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], "…"]


def _wrapped_chinese(line: str, width: int, indent: str) -> list[str]:
    """Lines of at most `width` columns, but that no closing mark begins a line; later ones are indented."""
    lines, used = [""], 0
    for character in line:
        columns = 2 if unicodedata.east_asian_width(character) in "WF" else 1
        if used + columns > width and character not in "，。、；：？！）》”’":
            lines.append(indent)
            used = len(indent)
        lines[-1] += character
        used += columns
    return lines
