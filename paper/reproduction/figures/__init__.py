"""The figures, from the stored results, as PNG and PDF whose bytes depend on the results alone."""

from __future__ import annotations

from pathlib import Path

from paper.reproduction.experiments import Experiments
from paper.reproduction.figures.style import setup  # selects matplotlib's backend: before pyplot

from matplotlib import pyplot as plt  # isort: skip

from paper.reproduction.figures.outlines import figure1
from paper.reproduction.figures.quality import figure2, figure3
from paper.reproduction.figures.seconds import figure4

FIGURES = {1: figure1, 2: figure2, 3: figure3, 4: figure4}


def write(number: int, experiments: Experiments, folder: Path) -> list[Path]:
    """Draw one figure and save it as PNG and PDF, without dates; returns the files."""
    setup()
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in FIGURES[number](experiments).items():
        for ending, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
            paths.append(folder / f"{name}.{ending}")
            figure.savefig(paths[-1], dpi=220, metadata=metadata)
        plt.close(figure)
    return paths
