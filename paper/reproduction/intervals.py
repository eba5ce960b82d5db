"""Statistics of scored outlines: means and spreads over seeds, gains with intervals, verdicts."""

from __future__ import annotations

import numpy as np
import pandas as pd

from paper.reproduction.names import MISSING
from paper.reproduction.scores import OUTLINE
from tkpo.metrics import paired_bootstrap


def spread(outlines: pd.DataFrame, by: list[str], scores: list[str]) -> pd.DataFrame:
    """Text per group of `by` and score: the mean, and ± the standard deviation over seeds where there are several."""
    seeds = outlines.groupby([*by, "seed"], dropna=False)[scores].mean().groupby(level=by)
    means, deviations = seeds.mean(), seeds.std()
    text = means.map("{:.1f}".format)
    return text.where(deviations.isna(), text + " ± " + deviations.map("{:.1f}".format))


def gain(ours: pd.DataFrame, theirs: pd.DataFrame, score: str) -> dict | None:
    """Relative gain of ours over theirs in per cent, by paired bootstrap over the outlines both have in all seeds."""
    pair = [_over_seeds(own, score) for own in (ours, theirs)]
    both = pd.concat(pair, axis=1, join="inner", keys=["ours", "theirs"]).sort_index()
    if both.empty:
        return None
    return paired_bootstrap(both["ours"].to_numpy(), both["theirs"].to_numpy())


def _over_seeds(outlines: pd.DataFrame, score: str) -> pd.Series:
    groups = outlines.groupby(OUTLINE)[score]
    return groups.mean()[groups.size() == outlines["seed"].nunique()]


def gain_text(found: dict | None) -> str:
    if found is None:
        return MISSING
    if found["gain"] is None:
        return "–"  # theirs is 0 everywhere
    low, high = (f"{found[end]:+.1f}" if found[end] is not None else "–" for end in ("low", "high"))
    return f"{found['gain']:+.1f} [{low}, {high}]"


def verdict(found: dict | None) -> str:
    """wins or loses where the interval of a gain leaves out 0; ties too where the other method scores mostly 0."""
    if found is None or found["low"] is None or found["undefined_draws"] > 0.05 * found["draws"]:
        return "ties"
    return "wins" if found["low"] > 0 else "loses" if found["high"] < 0 else "ties"


DRAWS = 10_000


def interval(outlines: pd.DataFrame, score: str, level: float = 0.95, draws: int = DRAWS) -> tuple[float, float, float]:
    """Mean of a score with its percentile interval, by bootstrap over articles and seeds.

    Both are drawn with replacement, independently; all outlines of a drawn article count together. Source: the
    pigeonhole bootstrap, Owen, "The pigeonhole bootstrap" (Annals of Applied Statistics, 2007).

    Args:
        outlines: a row per outline, with `article`, `seed` and the score.
        score: name of the column.
        level: of the interval.
        draws: how many resamples.

    Returns:
        (mean, low, high).
    """
    means = resampled_means(outlines, score, draws)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(outlines[score].mean()), float(low), float(high)


def resampled_means(outlines: pd.DataFrame, score: str, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(draws,) means of resampled articles × seeds."""
    groups = outlines.groupby(["article", "seed"])[score]
    sums = groups.sum().unstack(fill_value=0.0).to_numpy()
    counts = groups.size().unstack(fill_value=0).to_numpy()
    rng = np.random.default_rng(seed)
    articles, seeds = (rng.multinomial(n, np.full(n, 1 / n), size=draws) for n in sums.shape)
    total, n = ((articles @ table * seeds).sum(axis=1) for table in (sums, counts))
    return total[n > 0] / n[n > 0]
