"""Stored results: one JSON a run with its configuration, machine, timings, log and predictions. Scores are never
stored: they are computed from the predictions each time."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from reproduction.grid import BASE, Grid, Preset, Run, evaluation, run_config, what_it_is
from tkpo.attributes import get_axis
from tkpo.data import annotate, load_records
from tkpo.errors import TKPOError

logger = logging.getLogger("reproduce")

FORMAT = 1
PAPER = Path(__file__).parents[1]


class Store:
    """The results of one preset in a folder, and their scores."""

    def __init__(self, folder: Path, preset: Preset):
        self.folder, self.preset = folder / preset.name, preset
        self._records: dict[Run, dict | None] = {}
        self._scores: dict[Run, list[dict]] = {}

    def path(self, run: Run) -> Path:
        return self.folder / f"{run.name}.json"

    def get(self, run: Run) -> dict | None:
        """The run's record, or None. A record that was made with other settings does not count."""
        if run not in self._records:
            self._records[run] = self._read(run)
        return self._records[run]

    def _read(self, run: Run) -> dict | None:
        path = self.path(run)
        if not path.exists():
            return None
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            differences = self.differences(run, record["config"], record["evaluation"])
            rows = [
                [r[k] for k in ("id", "lang", "attribute", "form", "prediction", "reference")]
                for r in record["predictions"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TKPOError(f"{path} is not the record of a run ({error!r}): restore or delete it") from error
        if not rows:
            raise TKPOError(f"{path} has no predictions: delete it")
        if differences:
            logger.warning("%s is left out: %s", path, "; ".join(differences))
            return None
        return record

    def differences(self, run: Run, config: dict | None, settings: dict) -> list[str]:
        """In what a run that was made differs from what the experiments say, as sentences."""
        wanted = what_it_is(run_config(run, self.preset)) or {}
        made = what_it_is(config) or {}
        pairs = [(key, made[key], value) for key, value in wanted.items() if key in made]
        pairs += [(key, settings.get(key), value) for key, value in evaluation(run, self.preset).items()]
        return [f"it was made with {key} {old!r}, the experiments say {new!r}" for key, old, new in pairs if old != new]

    def add(self, run: Run, record: dict) -> Path:
        """Write a run's record."""
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
        self._records.pop(run, None)
        self._scores.pop(run, None)
        return path

    # ---- scores

    def score(self, runs: list[Run]) -> None:
        """Score the stored predictions of runs, all at once: a style classifier is fitted once a data set."""
        from tkpo.metrics import evaluate_predictions

        missing = [run for run in dict.fromkeys(runs) if run not in self._scores and self.get(run)]
        for dataset in dict.fromkeys(run.dataset for run in missing):
            axis = get_axis(dataset)
            train = annotate(load_records(dataset, "train"), axis)
            records, predictions, owners = [], [], []
            for run in (run for run in missing if run.dataset == dataset):
                for row in self.get(run)["predictions"]:
                    records.append({**row, "axis": axis.name, "output": row["reference"]})
                    predictions.append(row["prediction"])
                    owners.append(run)
            for run, sample in zip(owners, evaluate_predictions(records, predictions, train)["samples"], strict=True):
                self._scores.setdefault(run, []).append(sample)

    def samples(self, run: Run) -> list[dict]:
        """The scores of each prediction of a stored run, in per cent, with its id, lang, attribute and form."""
        self.score([run])
        return self._scores[run]

    # ---- tuning

    def tuned(self, grid: Grid, grids: dict[str, Grid], seeds: list[int] | None = None) -> list[Run] | None:
        """The runs of a grid whose settings another grid's results choose; None while no data set has all its tries.

        Where the choice is what the preset has anyway, the run is the preset's own.
        """
        tries = grids[grid.tuned_by["grid"]].runs(self.preset)
        lacking = {run.dataset for run in tries if not self.get(run)}
        tries = [run for run in tries if run.dataset not in lacking]
        self.score(tries)
        made = []
        for seed in seeds or self.preset.seeds or grid.seeds:
            for dataset in (name for name in grid.datasets if name not in lacking):
                for method in grid.methods:
                    own = [run for run in tries if (run.dataset, run.method) == (dataset, method)]
                    best = max(own, key=lambda run: mean(s[grid.tuned_by["score"]] for s in self.samples(run)))
                    plain = run_config(Run(dataset, method, seed), self.preset)
                    other = {key: value for key, value in best.settings if getattr(plain, key) != value}
                    made.append(grid.run(self.preset, dataset, method, seed, other))
        return made or None


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def make_record(folder: Path | None, predicted: dict, run: Run) -> dict:
    """A run's record, from its training folder (None: zero-shot) and from what was predicted.

    predicted: `settings`, `environment` and `samples`, as `tkpo evaluate` writes them.
    """
    record = {"format": FORMAT, "name": run.name}
    if folder:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        config = _json(folder / "config.json")
        record["config"] = {k: v for k, v in config.items() if k not in ("output", "sft_adapter", "data_dir")}
        record["config"]["model"] = predicted["settings"]["model"]  # full fine-tuning goes on from a folder
        record["continues"] = run.sft.name if run.sft else None
        record["environment"] = _json(folder / "environment.json")
        record["training"] = _json(folder / "metrics.json")
        record["adapter_sha256"] = adapter_hash(folder)
        record["log"] = log
    else:
        record |= {"config": None, "environment": predicted["environment"]}
    keys = ("id", "lang", "attribute", "form", "reference", "prediction")
    settings = {key: value for key, value in predicted["settings"].items() if key != "adapter"}
    record["evaluation"] = {**settings, "revision": predicted["environment"]["revision"]}
    record["predictions"] = [{key: row[key] for key in keys} for row in predicted["samples"]]
    return record


def adapter_hash(folder: Path) -> str | None:
    """SHA-256 of the adapter in a run's folder; None after full fine-tuning."""
    weights = folder / "model" / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None


def import_run(store: Store, grids: dict[str, Grid], folder: str, predictions: str) -> Path:
    """Store a run that was trained and evaluated by the tkpo commands.

    folder: of `tkpo train`, or "base". predictions: the file of `tkpo evaluate`.
    TKPOError if none of the experiments is that run.
    """
    predicted = _json(Path(predictions))
    if not {"settings", "environment", "samples"} <= set(predicted):
        raise TKPOError(f"{predictions} is not what `tkpo evaluate` writes: it lacks settings, environment or samples")
    config = None if folder == BASE else _json(Path(folder) / "config.json")
    if config and not (Path(folder) / "metrics.json").exists():
        raise TKPOError(f"{folder} has no metrics.json: the run is not finished; give its `tkpo train` command again")
    method, settings = config["method"] if config else BASE, predicted["settings"]
    if (settings["adapter"] == BASE) != (config is None):
        raise TKPOError(f"{predictions} was predicted by {settings['adapter']!r}: not the run {folder}")
    candidates = [r for g in grids.values() if not g.tuned_by for r in g.runs(store.preset)]
    candidates = [r for r in candidates if (r.method, r.dataset) == (method, settings["dataset"])]
    if not candidates:
        raise TKPOError(f"no experiment has {method} on {settings['dataset']}")
    best = min(candidates, key=lambda run: len(store.differences(run, config, settings)))
    if differences := store.differences(best, config, settings):
        raise TKPOError(
            f"{folder} with {predictions} is none of the experiments; nearest is {best.name}: "
            f"{'; '.join(differences)}. Change paper/experiments, or run it anew: "
            f"python paper/reproduce.py --run --only {best.name}"
        )
    return store.add(best, make_record(Path(folder) if config else None, predicted, best))


def _json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TKPOError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise TKPOError(f"{path}: expected an object")
    return value
