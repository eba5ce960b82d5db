"""Figures 2 and 3: quality beside cost, and sensitivity to the loss's settings."""

from __future__ import annotations

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from paper.reproduction.costs import benchmarks
from paper.reproduction.experiments import Experiments
from paper.reproduction.figures.style import COLOURS, SMALL, WIDTH, say_empty
from paper.reproduction.intervals import interval
from paper.reproduction.names import LANGUAGES, PUBLISHED_BARS, PUBLISHED_TIME, SYMBOLS, dataset_title

DEFAULTS = {"tau": 0.15, "preference_weight": 0.5, "num_rejects": 20}


def figure2(experiments: Experiments) -> dict[str, Figure]:
    """DPO against TKPO: quality bars for each data set and language, then memory and time."""
    outlines = experiments.outlines("figure 2")
    figure, axes = plt.subplots(2, 2, figsize=(WIDTH, 4.2), layout="constrained", width_ratios=(5, 3))
    groups = [(d, lang) for d in experiments.stored_datasets("figure 2") for lang in experiments.languages]
    names = ["\n".join((*dataset_title(d).split(" ", 1), LANGUAGES[lang])) for d, lang in groups] + [
        "published\n(Qwen2.5-3B)"
    ]
    for panel, (score, title) in zip(axes[:, 0], (("rouge1", "ROUGE-1"), ("bleu4", "BLEU-4")), strict=True):
        bars = _score_bars(outlines, groups, f"{score}_numbered")
        for method in ("dpo", "tkpo"):
            bars[len(groups), f"published {method}"] = (PUBLISHED_BARS[method][score], None)
        _bars(panel, bars, names, f"{title}, numbering counted as published")
        if len(bars) == 2:
            text = f"not run yet:\n{experiments.command('figure 2')}"
            panel.text(0.4, 0.5, text, ha="center", transform=panel.transAxes, fontsize=SMALL)
    _cost(axes[0, 1], axes[1, 1], experiments)
    handles = [
        Patch(facecolor=COLOURS["dpo"], label="DPO"),
        Patch(facecolor=COLOURS["tkpo"], label="TKPO"),
        Patch(facecolor="#999999", hatch="////", label="published"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False)
    return {"figure2": figure}


def _score_bars(outlines: pd.DataFrame, groups: list[tuple], score: str) -> dict[tuple, tuple]:
    """(group, method) → (mean, interval), of those that have outlines."""
    bars = {}
    for index, (dataset, lang) in enumerate(groups):
        for method in ("dpo", "tkpo"):
            columns = ["training", "language", "method", "label"]
            own = outlines[outlines[columns].eq([dataset, lang, method, ""]).all(axis=1)]
            if len(own):
                mean, low, high = interval(own, score)
                bars[index, method] = (mean, (low, high))
    return bars


def _bars(axes, bars: dict[tuple[int, str], tuple], names: list[str], title: str, digits: int = 1) -> None:
    """bars: (group, "dpo", "tkpo" or "published …") → (height, interval or None)."""
    for (group, kind), (value, ends) in bars.items():
        method = kind.split()[-1]
        x = group + (-0.2 if method == "dpo" else 0.2)
        hatch = "////" if kind.startswith("published") else None
        axes.bar(x, value, 0.38, color=COLOURS[method], hatch=hatch, edgecolor="white" if hatch else COLOURS[method])
        if ends:
            error = [[value - ends[0]], [ends[1] - value]]
            axes.errorbar(x, value, error, color="#333333", elinewidth=0.8, capsize=1.5, capthick=0.8)
        top = (x, ends[1] if ends else value)
        axes.annotate(f"{value:.{digits}f}", top, (0, 2), textcoords="offset points", ha="center", fontsize=SMALL)
    axes.set_xticks(range(len(names)), names, fontsize=SMALL)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylim(0, 1.14 * max(ends[1] if ends else value for value, ends in bars.values()))
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="y")
    axes.set_title(title, loc="left")


def _cost(memory_axes, time_axes, experiments: Experiments) -> None:
    """Memory and time of a step relative to DPO's, ours from the benchmark."""
    memory, time, names = {}, {}, []
    for bench in benchmarks(experiments):
        methods = {m["key"]: m for m in bench["methods"] if not m.get("error")}
        if {"dpo", "tkpo"} <= methods.keys() and not bench.get("attribute_last"):  # the published order of a prompt
            ratio = bench.get("ratios", {}).get("tkpo/dpo") or methods["tkpo"]["median"] / methods["dpo"]["median"]
            for method in ("dpo", "tkpo"):
                peak = methods[method]["peak_process_mib"] / methods["dpo"]["peak_process_mib"]
                memory[len(names), method] = (peak, None)
                time[len(names), method] = (ratio if method == "tkpo" else 1.0, None)
            kind = {"lora": "LoRA", "full": "full"}[bench["finetuning"]]
            names.append(f"ours, {kind}\n({bench['dtype']})")
    bars = PUBLISHED_BARS
    for method, share in (("dpo", 1.0), ("tkpo", PUBLISHED_TIME)):
        memory[len(names), f"published {method}"] = (bars[method]["memory"] / bars["dpo"]["memory"], None)
        time[len(names), f"published {method}"] = (share, None)
    names.append("published")
    _bars(memory_axes, memory, names, "Peak memory, DPO = 1", 2)
    _bars(time_axes, time, names, "Training time, DPO = 1", 2)
    time_axes.axhline(0.5, color="#333333", linewidth=0.9, linestyle=(0, (4, 3)))
    beside = time_axes.get_yaxis_transform()  # right of the panel
    time_axes.annotate(
        "counted\n0.50", (1.02, 0.5), xycoords=beside, fontsize=SMALL, va="center", annotation_clip=False
    )


def figure3(experiments: Experiments) -> dict[str, Figure]:
    """ROUGE-L and control accuracy against tau, lambda and K."""
    outlines = experiments.outlines("figure 3")
    settings = [dict(run.settings) for run in outlines["run"]]
    figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 3.4), layout="constrained", sharey="row")
    for column, (key, default) in enumerate(DEFAULTS.items()):
        values = [s.get(key, default) if set(s) <= {key} else None for s in settings]
        swept = outlines.assign(value=pd.array(values, dtype="Float64")).dropna(subset="value")
        for row, (score, title) in enumerate((("rougeL", "ROUGE-L"), ("log_odds", "log-odds"))):
            panel = axes[row, column]
            if swept.empty:
                say_empty(panel, experiments, "figure 3")
                continue
            order = _sweep(panel, swept, score, list(experiments.languages))
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
        figure.supxlabel("bars: 95 % over articles", fontsize=SMALL, color="#555555", x=0.99, ha="right")
    return {"figure3": figure}


def _sweep(panel, swept: pd.DataFrame, score: str, languages: list[str]) -> list[float]:
    """Draw one line per language over the values of a setting; returns the values in order."""
    order = sorted(swept["value"].unique())
    for lang in languages:
        side = 0.06 if lang == "en" else -0.06  # bars beside one another
        points = []
        for place, value in enumerate(order):
            own = swept[(swept["value"] == value) & (swept["language"] == lang)]
            if len(own):
                mean, low, high = interval(own, score)
                points.append((place - side, mean, mean - low, high - mean))
        if points:
            x, y, below, above = zip(*points, strict=True)
            colour, mark = (COLOURS["tkpo"], "o") if lang == "en" else (COLOURS["dpo"], "s")
            style = "-" if lang == "en" else "--"
            panel.plot(x, y, style, label=LANGUAGES[lang], markersize=4, color=colour, marker=mark)
            panel.errorbar(x, y, (below, above), linestyle="none", elinewidth=0.9, color=colour, alpha=0.6)
    return order
