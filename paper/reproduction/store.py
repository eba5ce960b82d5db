"""Stored results: one JSON file per run with its configuration, machine, timings, log and predictions.

Scores are not stored: they are computed from the predictions each time.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

from paper.reproduction.grid import Preset, Run, differences
from tkpo.errors import TKPOError

logger = logging.getLogger("reproduce")

FORMAT = 1
PREDICTION = ("id", "lang", "attribute", "form", "reference", "prediction")  # fields of a stored prediction


class Store:
    """The records of one preset's runs in a folder."""

    def __init__(self, folder: Path, preset: Preset):
        self.folder, self.preset = folder / preset.name, preset
        self._records: dict[Run, dict | None] = {}

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
            differ = differences(run, self.preset, record["config"], record["evaluation"])
            rows = [[row[key] for key in PREDICTION] for row in record["predictions"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TKPOError(f"{path} is not the record of a run ({error!r}): restore or delete it") from error
        if not rows:
            raise TKPOError(f"{path} has no predictions: delete it")
        if differ:
            logger.warning("%s is left out: %s", path, "; ".join(differ))
            return None
        return record

    def add(self, run: Run, record: dict) -> Path:
        """Write a run's record."""
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
        self._records.pop(run, None)
        return path


def make_record(folder: Path | None, predicted: dict, run: Run) -> dict:
    """A run's record, from its training folder (None: zero-shot) and from what was predicted.

    predicted: `settings`, `environment` and `samples`, as `tkpo evaluate` writes them.
    """
    record = {"format": FORMAT, "name": run.name}
    if folder:
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        config = read_json(folder / "config.json")
        record["config"] = {k: v for k, v in config.items() if k not in ("output", "sft_adapter", "data_dir")}
        record["config"]["model"] = predicted["settings"]["model"]  # full fine-tuning continues from a folder
        record["continues"] = run.sft.name if run.sft else None
        record["environment"] = read_json(folder / "environment.json")
        record["training"] = read_json(folder / "metrics.json")
        record["adapter_sha256"] = adapter_hash(folder)
        record["log"] = log
    else:
        record |= {"config": None, "environment": predicted["environment"]}
    settings = {key: value for key, value in predicted["settings"].items() if key != "adapter"}
    record["evaluation"] = {**settings, "revision": predicted["environment"]["revision"]}
    record["predictions"] = [{key: row[key] for key in (*PREDICTION, "axis")} for row in predicted["samples"]]
    return record


def adapter_hash(folder: Path) -> str | None:
    """SHA-256 of the adapter in a run's folder; None after full fine-tuning."""
    weights = folder / "model" / "adapter_model.safetensors"
    return hashlib.sha256(weights.read_bytes()).hexdigest() if weights.is_file() else None


def read_json(path: Path) -> dict:
    """The object in a JSON file; TKPOError if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TKPOError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise TKPOError(f"{path}: expected an object")
    return value
