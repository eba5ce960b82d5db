"""Figures 1 to 4, from the stored results, as PNG and PDF whose bytes depend on the results alone."""

from __future__ import annotations

import logging
import re
import textwrap
from functools import cache
from pathlib import Path
from statistics import pstdev

import matplotlib

matplotlib.use("agg")

from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.patches import Patch

from reproduction.grid import Run
from reproduction.store import mean
from reproduction.tables import (
    DATASETS,
    LANGUAGES,
    METHODS,
    PUBLISHED_BARS,
    PUBLISHED_TIME,
    SYMBOLS,
    Results,
    averaged,
    benchmarks,
    machine_name,
    pipeline_seconds,
    samples_by_seed,
    stage_seconds,
    timed,
)
from tkpo.attributes import get_axis
from tkpo.data import load_records

FONT = Path(__file__).parents[1] / "fonts" / "NotoSansCJKsc-subset.otf"
# Okabe and Ito's colours, which the colour-blind tell apart; line styles, marks and hatches do it in greyscale.
COLOURS = {
    "base": "#7F7F7F",
    "sft": "#56B4E9",
    "simpo": "#CC79A7",
    "orpo": "#009E73",
    "dpo": "#E69F00",
    "tkpo": "#0072B2",
}
MARKS = {"base": "x", "sft": "s", "simpo": "D", "orpo": "v", "dpo": "^", "tkpo": "o"}
LINES = {"sft": ":", "simpo": (0, (1, 1)), "orpo": "-.", "dpo": "--", "tkpo": "-"}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "hatch.color": "#FFFFFF",
    "pdf.compression": 6,
    "svg.hashsalt": "tkpo",
}
SHOWN = ("sft", "dpo", "tkpo")


def _setup() -> None:
    """The project's and matplotlib's fonts alone, so that a figure is the same whatever fonts the machine has."""
    manager, own = font_manager.fontManager, font_manager.FontProperties(fname=str(FONT)).get_name()
    manager.ttflist[:] = [font for font in manager.ttflist if font.fname.startswith(matplotlib.get_data_path())]
    manager.addfont(str(FONT))
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", own]
    for name in ("fontTools", "matplotlib.font_manager"):
        logging.getLogger(name).setLevel(logging.ERROR)


@cache
def _glyphs() -> set[int]:
    """The characters that the figures' fonts have."""
    fonts = (font_manager.findfont("DejaVu Sans"), FONT)
    return {code for path in fonts for code in FT2Font(str(path)).get_charmap()}


def write(number: int, results: Results, folder: Path) -> list[Path]:
    """Draw one figure and save it as PNG and PDF, without dates; returns the files."""
    _setup()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in FIGURES[number](results).items():
        for ending, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
            paths.append(folder / f"{name}.{ending}")
            figure.savefig(paths[-1], dpi=180, metadata=metadata)
        plt.close(figure)
    return paths


def _empty(axes, results: Results, what: str, reason: str = "not run yet:") -> None:
    """Say in an empty panel which command fills it."""
    text = reason + "\n" + "\n".join(textwrap.wrap(results.command(what), 44))
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#555555", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


# ---- figure 1: outlines --------------------------------------------------------------------------------


def figure1(results: Results) -> dict[str, Figure]:
    """One English and one Chinese article, outlined in every style by each method."""
    return {f"figure1-{lang}": _outlines(results, lang) for lang in results.languages}


def _outlines(results: Results, lang: str) -> Figure:
    cells = results.cells("figure 1")
    texts: dict[tuple, str] = {}  # (article, data set, attribute, method) → outline
    for (dataset, method, _), runs in cells.items():
        for run in (run for run in runs if method in SHOWN and results.store.get(run)):
            for row in results.store.get(run)["predictions"]:
                if row["lang"] == lang and row["form"] == "article":
                    texts.setdefault((row["id"], dataset, row["attribute"], method), row["prediction"])
    articles = sorted({key[0] for key in texts})
    article = max(articles, key=lambda a: len({key[1:3] for key in texts if key[0] == a}), default=None)
    styles = sorted({key[1:3] for key in texts if key[0] == article}, key=lambda s: (list(DATASETS).index(s[0]), s[1]))
    width = 38 if lang == "en" else 22
    columns = [[_wrapped(texts.get((article, *style, m), ""), width, lang) for m in SHOWN] for style in styles]
    heights = [max(len(lines) for lines in row) + 1.6 for row in columns] or [6]
    missing = [a for d in DATASETS for a in get_axis(d).attributes if styles and (d, a) not in styles]
    if missing:
        heights.append(1.6)
    figure = plt.figure(figsize=(9.2, 0.62 + 0.158 * sum(heights)))
    if not styles:
        _empty(figure.add_subplot(frameon=False), results, "figure 1")
        return figure
    top, total = 0.62 / figure.get_figheight(), sum(heights)
    title = f"{_topic(styles[0][0], article, lang)} ({article})"
    weight = "bold" if lang == "en" else "normal"  # the Chinese font has no other
    figure.text(0.012, 1 - 0.3 * top, title, fontsize=11, weight=weight, va="center")
    left = [0.16 + 0.28 * i for i in range(3)]
    for x, method in zip(left, SHOWN, strict=True):
        figure.text(x, 1 - 0.8 * top, METHODS[method], fontsize=10, weight="bold", va="center")
    y = 1 - top
    for (dataset, attribute), row, height in zip(styles, columns, heights, strict=False):
        share = height / total * (1 - top)
        figure.add_artist(plt.Line2D([0.01, 0.99], [y, y], color="#BBBBBB", linewidth=0.7))
        first = y - 0.8 * share / height
        figure.text(0.012, first, attribute, va="top", fontsize=9, weight="bold")
        figure.text(0.012, first - 1.25 * share / height, DATASETS[dataset], va="top", fontsize=7.5, color="#555555")
        for x, lines in zip(left, row, strict=True):
            figure.text(x, first, "\n".join(lines) or "(empty)", va="top", fontsize=7.6, linespacing=1.25)
        y -= share
    if missing:
        note = f"Not among the evaluated outlines of this article: {', '.join(missing)}."
        figure.text(0.012, y, note, va="top", fontsize=7.5, color="#555555")
    return figure


def _topic(dataset: str, article: str, lang: str) -> str:
    """The topic of a test article: the input of its samples that have nothing else, without the words before it."""
    for record in load_records(dataset, "test", lang):
        if (record["id"], record["form"]) == (article, "topic"):
            return re.split("[:：]", record["input"], maxsplit=1)[-1].strip()
    return "Article"


def _wrapped(text: str, width: int, lang: str, most: int = 16) -> list[str]:
    """Lines of an outline, wrapped with a hanging indent, at most `most`, then …

    `$` is text and begins no formula; □ stands for a character that the fonts lack.
    """
    lines: list[str] = []
    known = _glyphs()
    text = "".join(c if c == "\n" or ord(c) in known else "□" for c in text.expandtabs(3))
    for line in text.strip().replace("$", r"\$").split("\n"):
        indent = " " * (len(line) - len(line.lstrip()))
        if lang == "zh":
            parts = re.findall(f".{{1,{width}}}[，。、；：？！）》”’]*", line) or [""]  # no such mark begins a line
            lines += [parts[0], *(indent + "   " + part for part in parts[1:])]
        else:
            lines += textwrap.wrap(line, width, subsequent_indent=indent + "   ", drop_whitespace=True) or [""]
    return lines if len(lines) <= most else [*lines[: most - 1], "…"]


# ---- figure 2: quality, memory and time ----------------------------------------------------------------


def figure2(results: Results) -> dict[str, Figure]:
    """DPO against TKPO: quality bars for each data set and language, then memory and time."""
    cells = results.cells("figure 2")
    results.store.score([r for (_, m, _), runs in cells.items() if m in ("dpo", "tkpo") for r in runs])
    figure, axes = plt.subplots(2, 2, figsize=(9.2, 5.6), layout="constrained", width_ratios=(5, 3))
    groups = [(d, lang) for d in DATASETS for lang in results.languages]
    for row, (score, title) in enumerate((("rouge-1", "ROUGE-1"), ("bleu-4", "BLEU-4"))):
        bars = {}
        for method in ("dpo", "tkpo"):
            for index, (dataset, lang) in enumerate(groups):
                runs = cells.get((dataset, method, ""), [])
                seeds = samples_by_seed(results, runs, lambda s, lang=lang: s["lang"] == lang)
                if seeds:
                    bars[index, method] = mean(mean(s[score] for s in samples) for samples in seeds)
            bars[len(groups), f"published {method}"] = PUBLISHED_BARS[method][score]
        names = [f"{DATASETS[d]}\n{LANGUAGES[lang]}" for d, lang in groups] + ["published\n(Qwen2.5-3B)"]
        _bars(axes[row, 0], bars, names, f"{title} (higher is better)")
        if len(bars) == 2:
            axes[row, 0].text(
                0.4,
                0.5,
                f"not run yet:\n{results.command('figure 2')}",
                ha="center",
                transform=axes[row, 0].transAxes,
                fontsize=8,
            )
    _cost(axes[0, 1], axes[1, 1], results)
    handles = [
        Patch(facecolor=COLOURS["dpo"], label="DPO"),
        Patch(facecolor=COLOURS["tkpo"], label="TKPO"),
        Patch(facecolor="#999999", hatch="////", label="published"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return {"figure2": figure}


def _bars(axes, bars: dict[tuple[int, str], float], names: list[str], title: str, digits: int = 1) -> None:
    """bars: (group, "dpo", "tkpo" or "published …") → height."""
    for (group, kind), value in bars.items():
        method = kind.split()[-1]
        x = group + (-0.2 if method == "dpo" else 0.2)
        hatch = "////" if kind.startswith("published") else None
        axes.bar(x, value, 0.38, color=COLOURS[method], hatch=hatch, edgecolor="white" if hatch else COLOURS[method])
        axes.annotate(f"{value:.{digits}f}", (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=7.5)
    axes.set_xticks(range(len(names)), names, fontsize=7.5)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, 1.14 * max(bars.values()))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    axes.set_title(title, loc="left")


def _cost(memory_axes, time_axes, results: Results) -> None:
    """Memory and time of a step relative to DPO's, ours from the benchmark."""
    memory, time, names = {}, {}, []
    for bench in benchmarks(results):
        methods = {m["key"]: m for m in bench["methods"] if not m.get("error")}
        if {"dpo", "tkpo"} <= methods.keys() and not bench.get("attribute_last"):  # the published order of a prompt
            ratios = bench.get("ratios", {}).get("tkpo/dpo") or methods["tkpo"]["median"] / methods["dpo"]["median"]
            for index, method in enumerate(("dpo", "tkpo")):
                memory[len(names), method] = methods[method]["peak_process_mib"] / methods["dpo"]["peak_process_mib"]
                time[len(names), method] = ratios if index else 1.0
            kind = {"lora": "LoRA", "full": "full"}[bench["finetuning"]]
            names.append(f"ours, {kind}\n({bench['dtype']})")
    bars = PUBLISHED_BARS
    for method, share in (("dpo", 1.0), ("tkpo", PUBLISHED_TIME)):
        memory[len(names), f"published {method}"] = bars[method]["memory"] / bars["dpo"]["memory"]
        time[len(names), f"published {method}"] = share
    names.append("published")
    _bars(memory_axes, memory, names, "Peak memory, DPO = 1 (lower is better)", 2)
    _bars(time_axes, time, names, "Training time, DPO = 1 (lower is better)", 2)
    time_axes.axhline(0.5, color="#333333", linewidth=0.9, linestyle=(0, (4, 3)))
    beside = time_axes.get_yaxis_transform()  # right of the panel
    time_axes.annotate("counted\n0.50", (1.02, 0.5), xycoords=beside, fontsize=7, va="center", annotation_clip=False)


# ---- figure 3: sensitivity -----------------------------------------------------------------------------


def figure3(results: Results) -> dict[str, Figure]:
    """ROUGE-L and control accuracy against tau, lambda and K."""
    runs = {}
    for _, own in results.serving("figure 3"):
        for run in own:
            runs.setdefault((run.dataset, run.settings), []).append(run)
    results.store.score([run for own in runs.values() for run in own])
    figure, axes = plt.subplots(2, 3, figsize=(9.2, 4.6), layout="constrained", sharey="row")
    defaults = {"tau": 0.15, "preference_weight": 0.5, "num_rejects": 20}
    for column, (key, default) in enumerate(defaults.items()):
        values = {
            default if not settings else dict(settings)[key]: own
            for (_, settings), own in runs.items()
            if not settings or set(dict(settings)) == {key}
        }
        for row, (score, title) in enumerate((("rouge-l", "ROUGE-L"), ("control_accuracy", "control, %"))):
            panel, drawn = axes[row, column], False
            order = sorted(values)
            for lang in results.languages:
                style = "-" if lang == "en" else "--"
                points = []
                for place, value in enumerate(order):
                    seeds = samples_by_seed(results, values[value], lambda s, lang=lang: s["lang"] == lang)
                    if seeds:
                        each = [sample[score] for sample in averaged(seeds).values()]
                        side = 0.06 if lang == "en" else -0.06  # bars beside one another
                        points.append((place - side, mean(each), 1.96 * pstdev(each) / len(each) ** 0.5))
                if points:
                    x, y, error = zip(*points, strict=True)
                    colour, mark = (COLOURS["tkpo"], "o") if lang == "en" else (COLOURS["dpo"], "s")
                    panel.plot(x, y, style, label=LANGUAGES[lang], markersize=5, color=colour, marker=mark)
                    panel.errorbar(x, y, error, linestyle="none", elinewidth=0.9, color=colour, alpha=0.6)
                    drawn = True
            if not drawn:
                _empty(panel, results, "figure 3")
                continue
            panel.set_xticks(range(len(order)), [f"{v:g}" + ("*" if v == default else "") for v in order])
            panel.set_xlim(-0.3, len(order) - 0.7)
            panel.grid(axis="y")
            if row:
                panel.set_xlabel(f"{SYMBOLS[key]}   (* default)")
            if not column:
                panel.set_ylabel(title)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False)
        figure.supxlabel("bars: 95 % over the test outlines", fontsize=7.5, color="#555555", x=0.99, ha="right")
    return {"figure3": figure}


# ---- figure 4: quality against seconds -----------------------------------------------------------------


def figure4(results: Results) -> dict[str, Figure]:
    """Validation cross-entropy as training goes on, and test quality at its end, against training seconds."""
    cells = results.cells("figure 4")
    results.store.score([run for runs in cells.values() for run in runs])
    machines = sorted({machine_name(r["environment"]) for r in _records(results, cells)})
    figure, axes = plt.subplots(2, 2, figsize=(9.2, 6.2), layout="constrained")
    shown = {}
    for row, (dataset, title) in enumerate(DATASETS.items()):
        left, right = axes[row]
        left.set_title(f"{title}: validation cross-entropy (lower is better)", loc="left")
        right.set_title(f"{title}: test ROUGE-L at the end, English and Chinese", loc="left")
        for method in METHODS:
            runs = [r for r in cells.get((dataset, method, ""), []) if timed(results.store.get(r))]
            runs = [r for r in runs if machine_name(results.store.get(r)["environment"]) == machines[0]]
            if not runs:
                continue
            look = {"color": COLOURS[method], "marker": MARKS[method]}
            points = validation_curve(results, runs[0])
            if points:
                (shown[method],) = left.plot(*zip(*points, strict=True), linestyle=LINES[method], markersize=4, **look)
            seconds = pipeline_seconds(results, runs[0])
            if seconds is None:
                continue
            for lang in results.languages:
                seeds = samples_by_seed(results, runs[:1], lambda s, lang=lang: s["lang"] == lang)
                if seeds:
                    y = mean(s["rouge-l"] for s in seeds[0])
                    face = look["color"] if lang == "en" else "white"
                    (point,) = right.plot(seconds, y, linestyle="none", markersize=7, markerfacecolor=face, **look)
                    shown.setdefault(method, point)
        for panel in (left, right):
            if panel.lines:
                panel.set_xlabel("seconds of training (wall clock of the runs, not of a benchmark)")
                panel.set_xlim(left=0)
                panel.grid()
                panel.margins(y=0.15)
            elif panel is left and right.lines:
                _empty(
                    panel,
                    results,
                    "figure 4",
                    "These runs were trained without validation. To have curves,\ndelete their records and run",
                )
            elif any(results.store.get(r) for m in METHODS if m != "base" for r in cells.get((dataset, m, ""), [])):
                _empty(
                    panel,
                    results,
                    "figure 4",
                    "These runs were made several at a time, not timed.\nTo have times, delete their records and run",
                )
            else:
                _empty(panel, results, "figure 4")
        if right.lines:
            right.annotate(
                "filled: English, open: Chinese; DPO and SimPO with their SFT run",
                (0.02, 0.02),
                xycoords="axes fraction",
                fontsize=7.5,
            )
    order = [m for m in METHODS if m in shown]
    if order:
        figure.legend(
            [shown[m] for m in order], [METHODS[m] for m in order], loc="outside upper center", ncols=5, frameon=False
        )
    return {"figure4": figure}


def _records(results: Results, cells: dict) -> list[dict]:
    """The timed ones."""
    return [results.store.get(r) for runs in cells.values() for r in runs if timed(results.store.get(r))]


def validation_curve(results: Results, run: Run) -> list[tuple[float, float]]:
    """(seconds of training, validation cross-entropy) points of a run, with the whole SFT run it continues before.

    Seconds are steps × the mean seconds of a step, validation not counted.
    """
    record = results.store.get(run)
    whole = pipeline_seconds(results, run)
    if whole is None:
        return []
    stage = stage_seconds(record)
    step = stage / record["training"]["steps"]
    lines = [line for line in record["log"] if "eval_cross_entropy" in line]
    return [(whole - stage + step * line["step"], line["eval_cross_entropy"]) for line in lines]


FIGURES = {1: figure1, 2: figure2, 3: figure3, 4: figure4}
