"""The scores of stored predictions as one tidy DataFrame: a row per outline."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd

from paper.reproduction.grid import Run
from paper.reproduction.store import Store
from tkpo.attributes import get_axis
from tkpo.content_free import content_free
from tkpo.data import annotate, load_records
from tkpo.scores import SCORES, score_outlines

OUTLINE = ["dataset", "language", "article", "style", "form"]  # together these identify an outline to be written
COLUMNS = [*OUTLINE, "length", *SCORES]
RENAMED = {"id": "article", "lang": "language", "attribute": "style", "axis": "dataset", "form": "form"}
DIGITS = 4  # so that the last bits of another machine's arithmetic do not show
MOST_ODDS = 10.0  # the classifier's features have no bounds, so that one odd outline could outweigh all others
RANDOM_SEEDS = (0, 1, 2)  # of the drawn content-free outlines


class Scorer:
    """Scores each stored run once, and what content-free outlines score in its place."""

    def __init__(self, store: Store):
        self.store = store
        self._frames: dict[Run, pd.DataFrame] = {}
        self._content_free: dict[frozenset[Run], pd.DataFrame] = {}

    def __call__(self, runs: list[Run]) -> dict[Run, pd.DataFrame]:
        """Run → its outlines' scores, for those of `runs` that are stored.

        All missing ones are scored together, so that a style classifier is fitted once per data set and language.
        """
        stored = [run for run in dict.fromkeys(runs) if self.store.get(run)]
        missing = [run for run in stored if run not in self._frames]
        rows = [(run, row) for run in missing for row in self.store.get(run)["predictions"]]
        if rows:
            frame = _score([_record(run, row) for run, row in rows], [row["prediction"] for _, row in rows])
            owners = pd.Series([run.name for run, _ in rows])
            for run in missing:
                self._frames[run] = frame[owners == run.name].reset_index(drop=True)
        return {run: self._frames[run] for run in stored}

    def content_free(self, runs: list[Run]) -> pd.DataFrame:
        """Scores of outlines that say nothing, in place of those of `runs`, with `method` and `seed`."""
        if (key := frozenset(runs)) not in self._content_free:
            records = {}
            for run in runs:
                for row in self.store.get(run)["predictions"]:
                    record = _record(run, row)
                    records.setdefault(tuple(record[name] for name in RENAMED), record)
            self._content_free[key] = _content_free([records[name] for name in sorted(records)])
        return self._content_free[key]


def _content_free(records: list[dict]) -> pd.DataFrame:
    train = _training(tuple(sorted({record["axis"] for record in records})))
    rows = [
        {"record": record, "prediction": prediction, "method": method, "seed": seed}
        for seed in RANDOM_SEEDS
        for method, predictions in content_free(records, train, seed).items()
        if seed == RANDOM_SEEDS[0] or method != "numbers_only"
        for record, prediction in zip(records, predictions, strict=True)
    ]
    made = pd.DataFrame(rows)
    return _score(list(made["record"]), list(made["prediction"])).assign(method=made["method"], seed=made["seed"])


def _score(records: list[dict], predictions: list[str]) -> pd.DataFrame:
    train = _training(tuple(sorted({record["axis"] for record in records})))
    with np.errstate(divide="ignore"):  # a style that the classifier rules out
        scored = score_outlines(records, predictions, train)
    frame = pd.DataFrame(scored).rename(columns=RENAMED)[COLUMNS]
    scores = frame[list(SCORES)].astype(float).round(DIGITS)
    known = [record["input"] is not None for record in records]
    scores["unsupported_number"] = scores["unsupported_number"].where(known)
    scores["log_odds"] = scores["log_odds"].clip(-MOST_ODDS, MOST_ODDS)
    return pd.concat([frame[[*OUTLINE, "length"]], scores], axis=1)


def _record(run: Run, row: dict) -> dict:
    """A stored prediction as the annotated record it answers; `input` None if the data set no longer has it."""
    axis = row.get("axis") or run.dataset
    found = _records(axis, run.split).get((row["id"], row["attribute"], row["form"]), {})
    kept = {key: row[key] for key in ("id", "lang", "attribute", "form")}
    return kept | {
        "axis": axis,
        "output": row["reference"],
        "input": found.get("input"),
        "length": found.get("length") or ("long" if "-long-" in row["id"] else "short"),
    }


@cache
def _records(dataset: str, split: str) -> dict[tuple, dict]:
    records = annotate(load_records(dataset, split), get_axis(dataset))
    return {(record["id"], record["attribute"], record["form"]): record for record in records}


@cache
def _training(axes: tuple[str, ...]) -> list[dict]:
    return [record for axis in axes for record in annotate(load_records(axis, "train"), get_axis(axis))]
