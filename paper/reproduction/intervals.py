"""Statistics of scored outlines: means with intervals, differences of two methods, p-values over a family."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

from paper.reproduction.names import SEEDLESS
from paper.reproduction.scores import OUTLINE

DRAWS = 10_000  # of a difference
MEAN_DRAWS = 2_000  # of a mean, of which tables have a thousand
LEVEL = 0.95


def resampled_means(outlines: pd.DataFrame, scores: list[str], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """(draws, scores) means of resampled articles × seeds.

    Articles and seeds are drawn with replacement, independently of each other; all outlines of a drawn article count
    together. Source: Owen, "The pigeonhole bootstrap" (Annals of Applied Statistics, 2007).

    Args:
        outlines: a row per outline, with `language`, `article`, `seed` and the scores; NaN where a score is none.
        scores: columns to average.
        draws: how many resamples.
        seed: of the resampling; the same seed gives the same means.

    Returns:
        Means; NaN in a draw without any value.
    """
    groups = outlines.groupby(["article", "seed"])[scores]
    sums, counts = (table.unstack(fill_value=0).fillna(0) for table in (groups.sum(), groups.count()))
    articles, seeds = sums.shape[0], sums.shape[1] // len(scores)
    article_weights, seed_weights = _weights(articles, draws, seed), _weights(seeds, draws, seed + 1)
    total, count = (
        np.einsum("dks,ds->dk", (article_weights @ t.to_numpy(float)).reshape(draws, len(scores), seeds), seed_weights)
        for t in (sums, counts)
    )
    with np.errstate(invalid="ignore"):
        return total / np.where(count > 0, count, np.nan)


@cache
def _weights(n: int, draws: int, seed: int) -> np.ndarray:
    """(draws, n): how often each of n is drawn."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(float)


def intervals(outlines: pd.DataFrame, scores: list[str]) -> pd.DataFrame:
    """Index score; columns mean, low, high: the mean over all outlines with its 95 % interval."""
    means = resampled_means(outlines, scores, MEAN_DRAWS)
    tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    low, high = (np.nanquantile(means, tail, axis=0) if len(means) else np.nan for tail in tails)
    return pd.DataFrame({"mean": outlines[scores].mean(), "low": low, "high": high}, index=scores)


def interval(outlines: pd.DataFrame, score: str) -> tuple[float, float, float]:
    """(mean, low, high) of one score."""
    mean, low, high = intervals(outlines, [score]).loc[score]
    return float(mean), float(low), float(high)


def interval_texts(outlines: pd.DataFrame, by: list[str], scores: list[str], digits: int = 1) -> pd.DataFrame:
    """Text per group of `by` and score: the mean, and ± half the width of its 95 % interval; – where there is none."""

    def texts(own: pd.DataFrame) -> pd.Series:
        found = intervals(own, [score for score in scores if own[score].notna().any()])
        half = (found["high"] - found["low"]) / 2
        cells = {s: f"{found['mean'][s]:.{digits}f} ± {half[s]:.{digits}f}" for s in found.index}
        return pd.Series({score: cells.get(score, "–") for score in scores})

    return pd.DataFrame({key: texts(own) for key, own in outlines.groupby(by if len(by) > 1 else by[0])}).T


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs on the same outlines and seeds; the gain is relative to theirs, in per cent.

    p: two-sided, of the bootstrap. outlines: pairs compared. The gain is None where theirs is not above 0.
    """

    mean: float
    low: float
    high: float
    p: float
    outlines: int
    gain: tuple[float, float, float] | None

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(ours: pd.DataFrame, theirs: pd.DataFrame, score: str, draws: int = DRAWS) -> Difference | None:
    """Compare two methods seed by seed on the outlines that both have; None if there are none.

    A method without seeds (zero-shot, content-free) is compared with every seed of the other.

    Args:
        ours, theirs: rows of one method each.
        score: column to compare.
        draws: bootstrap resamples over articles and seeds.
    """
    left, right = (_one_per_outline(side, score) for side in (ours, theirs))
    keys = [column for column in left.columns.intersection(right.columns) if column != score]
    both = left.merge(right, on=keys, suffixes=("", "_b"))
    if "seed" not in both:
        both["seed"] = 0
    both = both.rename(columns={score: "a", f"{score}_b": "b"}).dropna(subset=["a", "b"])
    if both.empty:
        return None
    means = resampled_means(both, ["a", "b"], draws)
    deltas = means[:, 0] - means[:, 1]
    low, high = np.quantile(deltas, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    p = min(1.0, 2 * (1 + min((deltas <= 0).sum(), (deltas >= 0).sum())) / (1 + draws))
    mean = float(both["a"].mean() - both["b"].mean())
    gain = None
    if both["b"].mean() > 0 and (means[:, 1] > 0).all():
        ratios = 100 * deltas / means[:, 1]
        ends = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        gain = (100 * mean / float(both["b"].mean()), float(ends[0]), float(ends[1]))
    return Difference(mean, float(low), float(high), p, len(both), gain)


def _one_per_outline(side: pd.DataFrame, score: str) -> pd.DataFrame:
    """A row per outline and seed; of a method without seeds a row per outline, without the column."""
    if set(side["method"]) <= set(SEEDLESS):
        return side.groupby(OUTLINE)[[score]].mean().reset_index()
    return side[[*OUTLINE, "seed", score]]


def holm(p_values: list[float]) -> list[float]:
    """p-values adjusted by Holm's step-down method for testing them all."""
    return multipletests(p_values, method="holm")[1].tolist() if p_values else []


def verdict(found: Difference, adjusted: float) -> str:
    """wins or loses where the adjusted p-value is below 0.05, else ties."""
    if adjusted >= 1 - LEVEL:
        return "ties"
    return "wins" if found.mean > 0 else "loses"
