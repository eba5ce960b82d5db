"""Experiments: which runs each table and figure shows, and their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from paper.reproduction.grid import BASE, DECODING, PRESET, Grid, Question, Run, differences, run_config
from paper.reproduction.names import LANGUAGES, METHODS, MISSING, dataset_title
from paper.reproduction.scores import COLUMNS, OUTLINE, Scorer
from paper.reproduction.store import Store, make_record, read_json
from tkpo.errors import TKPOError
from tkpo.methods import CONTINUED

ROW = ["training", "method", "label"]  # what the runs of one row of a table share; training: their data set


class Experiments:
    """The grids of a folder with the stored runs of one preset.

    seeds: in place of the grids' own. questions: the comparisons of table 7.
    """

    def __init__(
        self,
        store: Store,
        grids: dict[str, Grid],
        seeds: list[int] | None = None,
        questions: Sequence[Question] = (),
    ):
        self.store, self.grids, self.seeds, self.questions = store, grids, seeds, questions
        self._scorer = Scorer(store)

    @property
    def languages(self) -> dict[str, str]:
        """Language code → name, of the languages of the preset's runs."""
        only = self.store.preset.train.get("lang")
        return {lang: name for lang, name in LANGUAGES.items() if only in (None, lang)}

    @property
    def datasets(self) -> list[str]:
        """The data sets of all grids, in their order."""
        return list(dict.fromkeys(dataset for grid in self.grids.values() for dataset in grid.datasets))

    def serving(self, what: str) -> list[tuple[Grid, list[Run]]]:
        """(grid, its runs) for each grid that serves a table or figure; no runs while they wait for tuning."""
        tuners = {grid.tuned_by["grid"] for grid in self.grids.values() if grid.tuned_by}
        found = []
        for grid in self.grids.values():
            if what in grid.serves:
                if grid.tuned_by:
                    runs = self.tuned(grid) or []
                else:  # tries keep their own seeds, whatever seeds are asked for
                    runs = grid.runs(self.store.preset, None if grid.name in tuners else self.seeds)
                found.append((grid, runs))
        return found

    def planned(self, what: str) -> pd.DataFrame:
        """A row per run on the test split that serves `what`: training, method, label, variant, seed, run, stored."""
        rows = [
            (run.dataset, run.method, grid.label, run.variant, run.seed, run, bool(self.store.get(run)))
            for grid, runs in self.serving(what)
            for run in runs
            if grid.split == "test"
        ]
        frame = pd.DataFrame(rows, columns=[*ROW, "variant", "seed", "run", "stored"])
        return frame.drop_duplicates([*ROW, "run"], ignore_index=True)

    def rows(self, what: str) -> list[tuple[str, str, str]]:
        """The (data set, method, label) rows that the grids promise for `what`, also those that wait for tuning."""
        grids = [grid for grid, _ in self.serving(what) if grid.split == "test"]
        keys = {(d, m, grid.label) for grid in grids for d in grid.datasets for m in grid.methods}
        return sorted(keys, key=lambda key: (self.datasets.index(key[0]), list(METHODS).index(key[1]), key[2]))

    def outlines(self, what: str, content_free: bool = False) -> pd.DataFrame:
        """The scored outlines of the stored runs of `planned`: a row per outline with its run's columns.

        content_free: with those of the content-free methods for the same articles and styles.
        """
        planned = self.planned(what)
        parts = [self._scored(planned)]
        if content_free:
            for training, own in planned[planned["stored"] & (planned["label"] == "")].groupby("training", sort=False):
                made = self._scorer.content_free(list(own["run"]))
                parts.append(made.assign(training=training, label="", variant="", run=None))
        return pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)

    def title(self, training: str) -> str:
        """What tables call the data set of a training, and whether only the pilot has it."""
        pilot = all(grid.pilot for grid in self.grids.values() if training in grid.datasets)
        return dataset_title(training) + (" (pilot)" if pilot else "")

    def stored_datasets(self, what: str) -> list[str]:
        """The data sets of `planned` for which any run is stored; all of them where none is."""
        planned = self.planned(what)
        stored = list(planned[planned["stored"]]["training"].unique())
        return [dataset for dataset in self.datasets if dataset in stored] or self.datasets

    def scored(self, runs: list[Run]) -> pd.DataFrame:
        """The scored outlines of stored runs."""
        rows = [(run.dataset, run.method, "", run.variant, run.seed, run) for run in runs]
        return self._scored(pd.DataFrame(rows, columns=[*ROW, "variant", "seed", "run"]))

    def every_outline(self) -> pd.DataFrame:
        """The scored outlines of every stored run, on every split: what is written beside the tables."""
        rows = [
            (run.dataset, run.method, grid.label, run.variant, run.seed, run, grid.split)
            for grid in self.grids.values()
            for runs in [self.tuned(grid) or [] if grid.tuned_by else grid.runs(self.store.preset, self.seeds)]
            for run in runs
        ]
        frame = pd.DataFrame(rows, columns=[*ROW, "variant", "seed", "run", "split"])
        scored = self._scored(frame.drop_duplicates([*ROW, "run"], ignore_index=True))
        scored["run"] = [run.name for run in scored["run"]]
        return scored.sort_values(["run", "label", *OUTLINE], ignore_index=True)

    def write_outlines(self, path: Path) -> None:
        """Write `every_outline` as Parquet, without its prediction texts."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.every_outline().to_parquet(path, index=False, compression="zstd")

    def _scored(self, planned: pd.DataFrame) -> pd.DataFrame:
        scores = self._scorer(list(planned["run"]))
        parts = [scores[row["run"]].assign(**row) for _, row in planned.iterrows() if row["run"] in scores]
        if parts:
            return pd.concat(parts, ignore_index=True)
        return pd.DataFrame(columns=list(dict.fromkeys([*planned.columns, *COLUMNS])))

    def tuned(self, grid: Grid) -> list[Run] | None:
        """The runs of a grid whose settings another grid's results choose; None while no data set has all its tries.

        Where the choice is what the preset has anyway, the run is the preset's own.
        """
        preset = self.store.preset
        tries = self.grids[grid.tuned_by["grid"]].runs(preset)
        lacking = {run.dataset for run in tries if not self.store.get(run)}
        tries = [run for run in tries if run.dataset not in lacking]
        scores = self._scorer(tries)
        made = []
        for seed in self.seeds or preset.seeds or grid.seeds:
            for dataset in (name for name in grid.datasets if name not in lacking):
                for method in grid.methods:
                    own = [run for run in tries if (run.dataset, run.method) == (dataset, method)]
                    best = max(own, key=lambda run: scores[run][grid.tuned_by["score"]].mean())
                    plain = run_config(Run(dataset, method, seed), preset)
                    other = {k: v for k, v in best.settings if k in DECODING or getattr(plain, k) != v}
                    made.append(grid.run(preset, dataset, method, seed, other))
        return made or None

    def command(self, what: str) -> str:
        """The shell command that makes the runs of a table or figure."""
        preset = self.store.preset.name
        extra = "" if preset == PRESET else f" --preset {preset}"
        return f"python paper/reproduce.py --run --{what}{extra}"

    def notes(self, what: str) -> list[str]:
        """The note that says how to make the runs that a table still lacks; none where it lacks none."""
        if all(runs and all(map(self.store.get, runs)) for _, runs in self.serving(what)):
            return []
        return [f"Some runs are not made yet ({MISSING} where a cell has none): `{self.command(what)}` makes them."]

    def import_run(self, folder: str, predictions: str) -> Path:
        """Store a run that was trained and evaluated by the tkpo commands.

        folder: of `tkpo train`, or "base". predictions: the file of `tkpo evaluate`.
        TKPOError if none of the experiments is that run.
        """
        config, predicted = _finished(folder, predictions)
        method, settings = config["method"] if config else BASE, predicted["settings"]
        preset = self.store.preset
        candidates = [run for grid in self.grids.values() if not grid.tuned_by for run in grid.runs(preset)]
        candidates = [run for run in candidates if (run.method, run.dataset) == (method, settings["dataset"])]
        if method in CONTINUED:
            candidates = [run for run in candidates if bool(run.sft) == bool(config.get("sft_adapter"))]
        if not candidates:
            raise TKPOError(f"no experiment has {method} on {settings['dataset']}")
        best = min(candidates, key=lambda run: len(differences(run, preset, config, settings)))
        if differ := differences(best, preset, config, settings):
            raise TKPOError(
                f"{folder} with {predictions} is none of the experiments; nearest is {best.name}: "
                f"{'; '.join(differ)}. Change paper/experiments, or run it anew: "
                f"python paper/reproduce.py --run --only {best.name}"
            )
        return self.store.add(best, make_record(Path(folder) if config else None, predicted, best))


def _finished(folder: str, predictions: str) -> tuple[dict | None, dict]:
    """(config, predictions) of a run made by the tkpo commands; TKPOError if it is not finished."""
    predicted = read_json(Path(predictions))
    if not {"settings", "environment", "samples"} <= set(predicted):
        raise TKPOError(f"{predictions} is not what `tkpo evaluate` writes: it lacks settings, environment or samples")
    config = None if folder == BASE else read_json(Path(folder) / "config.json")
    if config and not (Path(folder) / "metrics.json").exists():
        raise TKPOError(f"{folder} has no metrics.json: the run is not finished; give its `tkpo train` command again")
    if (predicted["settings"]["adapter"] == BASE) != (config is None):
        raise TKPOError(f"{predictions} was predicted by {predicted['settings']['adapter']!r}: not the run {folder}")
    return config, predicted
