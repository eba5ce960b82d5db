"""Figure 4: quality against seconds of training."""

from __future__ import annotations

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from paper.reproduction.costs import machine_name, pipeline_seconds, stage_seconds, timed
from paper.reproduction.experiments import Experiments
from paper.reproduction.figures.style import COLOURS, LINES, MARKS, SMALL, WIDTH, say_empty
from paper.reproduction.grid import Run
from paper.reproduction.intervals import interval
from paper.reproduction.names import METHODS

UNTIMED = "These runs were made several at a time, not timed.\nTo have times, delete their records and run"
NO_CURVES = "These runs were trained without validation. To have\ncurves, delete their records and run"


def figure4(experiments: Experiments) -> dict[str, Figure]:
    """Validation cross-entropy as training proceeds, and test quality at its end, against training seconds."""
    runs, datasets = _first_timed(experiments), experiments.stored_datasets("figure 4")
    size = (WIDTH, 0.4 + 2.1 * len(datasets))
    figure, axes = plt.subplots(len(datasets), 2, figsize=size, layout="constrained", squeeze=False)
    shown = {}
    for (left, right), dataset in zip(axes, datasets, strict=True):
        title = experiments.title(dataset)
        left.set_title(f"{title}: validation cross-entropy", loc="left")
        right.set_title(f"{title}: test ROUGE-1 at the end", loc="left")
        for method in (m for m in METHODS if (dataset, m) in runs):
            shown[method] = _draw(left, right, experiments, runs[dataset, method])
        _finish(experiments, dataset, left, right)
    order = [m for m in METHODS if shown.get(m)]
    if order:
        handles, names = [shown[m] for m in order], [METHODS[m] for m in order]
        figure.legend(handles, names, loc="outside upper center", ncols=5, frameon=False)
        note = "filled: English, open: Chinese, bars: 95 % over articles; DPO and SimPO with their SFT run"
        figure.supxlabel(note, fontsize=SMALL, color="#555555", x=0.99, ha="right")
    return {"figure4": figure}


def _first_timed(experiments: Experiments) -> dict[tuple[str, str], Run]:
    """(data set, method) → its first timed run, all on one machine."""
    planned = experiments.planned("figure 4")
    records = {run: experiments.store.get(run) for run in planned[planned["label"] == ""]["run"]}
    records = {run: record for run, record in records.items() if timed(record)}
    machine = min((machine_name(record["environment"]) for record in records.values()), default=None)
    found = {}
    for run, record in records.items():
        if machine_name(record["environment"]) == machine:
            found.setdefault((run.dataset, run.method), run)
    return found


def _draw(left, right, experiments: Experiments, run: Run):
    """The run's curve on the left and its end on the right; returns what stands in the legend, if anything."""
    look, drawn = {"color": COLOURS[run.method], "marker": MARKS[run.method]}, []
    if points := validation_curve(experiments, run):
        drawn += left.plot(*zip(*points, strict=True), linestyle=LINES[run.method], markersize=3.5, **look)
    seconds = pipeline_seconds(experiments, run)
    if seconds is not None:
        outlines = experiments.scored([run])
        for lang, own in outlines.groupby("language"):
            mean, low, high = interval(own, "rouge1")
            face = look["color"] if lang == "en" else "white"
            x = seconds * (1.0 if lang == "en" else 1.012)  # bars beside one another
            right.errorbar(x, mean, [[mean - low], [high - mean]], color=look["color"], elinewidth=0.8, alpha=0.6)
            drawn += right.plot(x, mean, linestyle="none", markersize=5, markerfacecolor=face, **look)
    return drawn[0] if drawn else None


def _finish(experiments: Experiments, dataset: str, left, right) -> None:
    """Axes of the panels that have something, and what the empty ones lack."""
    planned = experiments.planned("figure 4")
    trained = planned[(planned["training"] == dataset) & (planned["method"] != "base")]
    for panel in (left, right):
        if panel.lines:
            panel.set_xlabel("seconds of training (wall clock)")
            panel.set_xlim(left=0)
            panel.grid()
            panel.margins(y=0.15)
        elif panel is left and right.lines:
            say_empty(panel, experiments, "figure 4", NO_CURVES)
        elif trained["stored"].any():
            say_empty(panel, experiments, "figure 4", UNTIMED)
        else:
            say_empty(panel, experiments, "figure 4")


def validation_curve(experiments: Experiments, run: Run) -> list[tuple[float, float]]:
    """(seconds of training, validation cross-entropy) points of a run, after the whole SFT run it continues.

    Seconds are steps × the mean seconds per step, validation not counted.
    """
    record = experiments.store.get(run)
    whole = pipeline_seconds(experiments, run)
    if whole is None:
        return []
    stage = stage_seconds(record)
    step = stage / record["training"]["steps"]
    lines = [line for line in record["log"] if "eval_cross_entropy" in line]
    return [(whole - stage + step * line["step"], line["eval_cross_entropy"]) for line in lines]
