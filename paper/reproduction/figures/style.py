"""Fonts, sizes and colours of the figures: the same on every machine, and legible at the size they are printed at."""

from __future__ import annotations

import logging
import textwrap
from functools import cache
from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from paper.reproduction.experiments import Experiments
from tkpo import methods

FONT = Path(__file__).parents[2] / "fonts" / "NotoSansCJKsc-subset.ttf"
WIDTH = 6.3  # inches: both columns of a page, so that nothing is scaled in print
SMALL = 7  # points: the least size of type
# Okabe and Ito's colours, which the colour-blind tell apart; line styles, marks and hatches do it in greyscale.
COLOURS = {"base": "#7F7F7F"} | {name: method.color for name, method in methods.METHODS.items()}
MARKS = {"base": "x", "sft": "s", "simpo": "D", "orpo": "v", "dpo": "^", "tkpo": "o", "contrast": "P"}
LINES = {"sft": ":", "simpo": (0, (1, 1)), "orpo": "-.", "dpo": "--", "tkpo": "-", "contrast": (0, (5, 1))}
STYLE = {
    "font.size": SMALL,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.8,
    "hatch.color": "#FFFFFF",
    "pdf.compression": 6,
    "pdf.fonttype": 42,  # TrueType, as publishers ask
    "svg.hashsalt": "tkpo",
}


def setup() -> None:
    """Use the project's and matplotlib's fonts alone, so that a figure does not depend on the machine's."""
    manager, own = font_manager.fontManager, font_manager.FontProperties(fname=str(FONT)).get_name()
    manager.ttflist[:] = [font for font in manager.ttflist if font.fname.startswith(matplotlib.get_data_path())]
    manager.addfont(str(FONT))
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", own]
    for name in ("fontTools", "matplotlib.font_manager"):
        logging.getLogger(name).setLevel(logging.ERROR)


@cache
def glyphs() -> set[int]:
    """The characters that the figures' fonts have."""
    fonts = (font_manager.findfont("DejaVu Sans"), FONT)
    return {code for path in fonts for code in FT2Font(str(path)).get_charmap()}


def say_empty(axes, experiments: Experiments, what: str, reason: str = "not run yet:") -> None:
    """Say in an empty panel which command fills it."""
    text = reason + "\n" + "\n".join(textwrap.wrap(experiments.command(what), 36))
    axes.text(0.5, 0.5, text, ha="center", va="center", transform=axes.transAxes, color="#555555", fontsize=SMALL)
    axes.set_xticks([])
    axes.set_yticks([])
