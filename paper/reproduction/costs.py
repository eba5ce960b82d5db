"""What training costs: the stored benchmarks, and the seconds of the stored runs."""

from __future__ import annotations

import json

from paper.reproduction.experiments import Experiments
from paper.reproduction.grid import Run

# Forward passes per sample, a backward pass counting as two (the reference model's passes included).
COUNTED = {"sft": 3, "dpo": 8, "dpo_precomputed": 6, "tkpo": 4}


def benchmarks(experiments: Experiments) -> list[dict]:
    """The stored benchmarks of the preset's model, by name; those of the loss head alone are left out."""
    found = []
    for path in sorted((experiments.store.folder.parent / "benchmark").glob("*.json")):
        bench = json.loads(path.read_text(encoding="utf-8"))
        if bench.get("finetuning") and bench.get("model") == experiments.store.preset.model:
            found.append(bench)
    return found


def machine_name(environment: dict) -> str:
    return ", ".join(environment.get("gpus") or [f"{environment['cpu']} ({environment['cores']} cores)"])


def timed(record: dict | None) -> bool:
    """Whether a stored run's seconds mean anything: it was trained, with no other run beside it."""
    return bool(record and record["config"] and record.get("jobs", 1) == 1)


def stage_seconds(record: dict) -> float:
    """Seconds of the whole training without validation, also where the run was cut off and resumed."""
    validation = sum(line.get("eval_runtime", 0.0) for line in record["log"])
    return record["training"]["seconds_a_step"] * record["training"]["steps"] - validation


def pipeline_seconds(experiments: Experiments, run: Run) -> float | None:
    """Seconds to train the run and the SFT run it continues; None if that one is not timed, or on another machine."""
    record = experiments.store.get(run)
    if not run.sft:
        return stage_seconds(record)
    before = experiments.store.get(run.sft)
    if not timed(before) or machine_name(before["environment"]) != machine_name(record["environment"]):
        return None
    return stage_seconds(before) + stage_seconds(record)
