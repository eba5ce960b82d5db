"""The scores of stored predictions as one tidy DataFrame: a row per outline."""

from __future__ import annotations

import pandas as pd

from paper.reproduction.grid import Run
from paper.reproduction.names import SCORES
from paper.reproduction.store import Store
from tkpo.attributes import get_axis
from tkpo.data import annotate, load_records
from tkpo.metrics import evaluate_predictions

OUTLINE = ["dataset", "language", "article", "style", "form"]  # together with a run these identify an outline
ALSO = ["classifier_reference_accuracy"]


class Scorer:
    """Scores each stored run once."""

    def __init__(self, store: Store):
        self.store = store
        self.columns = [*OUTLINE, *SCORES, *ALSO]
        self._frames: dict[Run, pd.DataFrame] = {}

    def __call__(self, runs: list[Run]) -> dict[Run, pd.DataFrame]:
        """Run → its outlines' scores, for those of `runs` that are stored.

        All missing ones are scored together, so that a style classifier is fitted once per data set and language.
        """
        stored = [run for run in dict.fromkeys(runs) if self.store.get(run)]
        missing = [run for run in stored if run not in self._frames]
        for dataset in dict.fromkeys(run.dataset for run in missing):
            self._score(dataset, [run for run in missing if run.dataset == dataset])
        return {run: self._frames[run] for run in stored}

    def _score(self, dataset: str, runs: list[Run]) -> None:
        axis = get_axis(dataset)
        rows = [(run, row) for run in runs for row in self.store.get(run)["predictions"]]
        records = [{**row, "axis": axis.name, "output": row["reference"]} for _, row in rows]
        train = annotate(load_records(dataset, "train"), axis)
        scored = evaluate_predictions(records, [row["prediction"] for _, row in rows], train)["samples"]
        frame = pd.DataFrame(scored).rename(
            columns={"id": "article", "lang": "language", "attribute": "style", "axis": "dataset"}
        )
        owners = pd.Series([run.name for run, _ in rows])
        for run in runs:
            self._frames[run] = frame.loc[owners == run.name, self.columns].reset_index(drop=True)
