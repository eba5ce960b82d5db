"""Do the runs that are missing, one at a time, each in a process of its own; survives being killed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import traceback
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from reproduction.grid import Run, evaluation, run_config, sample_count
from reproduction.store import PAPER, Store, make_record
from tkpo.data import load_records
from tkpo.errors import TKPOError
from tkpo.run_config import RunConfig

COST = {"base": 0, "sft": 3, "tkpo": 4, "dpo": 8, "simpo": 6, "orpo": 6}  # forward passes a sample
DECODING = 0.02  # what one written token costs in the same unit, roughly; for the time left only
BATCH = 24  # outlines decoded together
DONE = "recorded"  # file in a run's folder: its record has been written, so a missing record means train again


def do_runs(store: Store, runs: list[Run], work: Path, device: str | None = None) -> None:
    """Do those of `runs` that have no record yet, in order, and store each as soon as it is done.

    work: where each run has its folder. A run that was cut off goes on from its last checkpoint; the adapter that
    DPO and SimPO continue is trained first where it is not at hand. TKPOError names the log of a run that failed.
    """
    missing = [run for run in dict.fromkeys(runs) if not store.get(run)]
    steps = [step for run in missing for step in _with_sft(store, run, work, missing)]
    steps = list(dict.fromkeys(steps))
    if not steps:
        print("nothing to run: every result is stored", file=sys.stderr)
        return
    costs = [_cost(store, *step) for step in steps]
    with tqdm(
        total=sum(costs), bar_format="{percentage:3.0f} %|{bar}| {elapsed} so far, {remaining} left {desc}"
    ) as bar:
        for number, ((run, alone), cost) in enumerate(zip(steps, costs, strict=True), 1):
            bar.set_description_str(f"[{number}/{len(steps)}] {run.name}")
            start = bar.n
            _do(store, run, work, device, alone, lambda share, at=start, all=cost: _advance(bar, at + share * all))
            _advance(bar, start + cost)
            bar.write(f"[{number}/{len(steps)}] {run.name}{' (for its adapter)' if alone else ''}", file=sys.stderr)


def _advance(bar: tqdm, to: float) -> None:
    bar.update(max(0.0, to - bar.n))


def _with_sft(store: Store, run: Run, work: Path, missing: list[Run]) -> list[tuple[Run, bool]]:
    """(run, whether only its adapter is wanted) for a run and, before it, for the SFT run it needs."""
    needs = run.sft
    if needs in missing:
        return [(needs, False), (run, False)]
    if needs is None or _adapter(store, needs, work):
        return [(run, False)]
    return [(needs, True), (run, False)]


def _adapter(store: Store, sft: Run, work: Path) -> Path | None:
    """The adapter of an SFT run: in its folder, or the shipped one if it is that run's."""
    folder = work / sft.name
    if (folder / "metrics.json").exists():
        return folder
    shipped = PAPER / "checkpoints" / sft.dataset / "sft"
    record, weights = store.get(sft), shipped / "adapter_model.safetensors"
    if record and weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() == record["adapter_sha256"]:
        return shipped
    return None


def _cost(store: Store, run: Run, alone: bool) -> float:
    epochs = getattr(run_config(run, store.preset), "epochs", 0)
    lang = store.preset.train.get("lang")
    samples = sample_count(run, store.preset) or len(load_records(run.dataset, "train", lang))
    wanted = evaluation(run, store.preset)
    counts = {"en": 0, "zh": 0}
    for record in load_records(run.dataset, run.split, lang):
        counts[record["lang"]] += 1
    outlines = sum(min(count, wanted["limit"] or count) for count in counts.values())
    return COST[run.method] * samples * epochs + (not alone) * outlines * wanted["max_new_tokens"] * DECODING


def _do(store: Store, run: Run, work: Path, device: str | None, alone: bool, tell) -> None:
    folder = work / run.name
    folder.mkdir(parents=True, exist_ok=True)
    how = {"output": str(folder), "device": device}
    if run.sft and store.preset.train.get("finetuning") == "full":
        how["model"] = str(work / run.sft.name / "model")
    elif run.sft:
        how["sft_adapter"] = str(_adapter(store, run.sft, work))
    config = run_config(run, store.preset, **how)
    again = (folder / DONE).exists() and not alone
    task = {
        "config": asdict(config) if config else None,
        "restart": again,
        "evaluation": None if alone else evaluation(run, store.preset),
        "dtype": store.preset.train.get("dtype", "auto"),
        "device": device,
        "folder": str(folder),
    }
    context = multiprocessing.get_context("forkserver" if hasattr(os, "fork") else "spawn")
    if hasattr(os, "fork"):
        context.set_forkserver_preload(["tkpo.runs", "tkpo.evaluation"])  # imported once, not in every run
    process = context.Process(target=_work, args=(task,))
    process.start()
    try:
        while process.is_alive():
            process.join(1)
            tell(0.95 * _done(folder, config))
    except BaseException:
        process.terminate()
        process.join()
        raise
    if process.exitcode:
        log = _log(folder)
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no output"]
        raise TKPOError(f"run {run.name} failed (exit status {process.exitcode}): {last[0]}\nIts output: {log}")
    if not alone:
        predicted = json.loads((folder / "predicted.json").read_text(encoding="utf-8"))
        store.add(run, make_record(folder if config else None, predicted, run))
        (folder / DONE).touch()


def _done(folder: Path, config: RunConfig | None) -> float:
    """Share of the training that is done, from the run's log."""
    if config is None:
        return 0.0
    with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
        last = json.loads((folder / "log.jsonl").read_text(encoding="utf-8").strip().splitlines()[-1])
        return min(1.0, last["epoch"] / config.epochs)
    return 0.0


def _log(folder: Path) -> Path:
    """Where a run's output goes: beside its folder, which a restart deletes."""
    return folder.with_name(f"{folder.name}.log")


def _work(task: dict) -> None:
    """Train and predict, in a process of its own that ends with the one that started it; its output goes to a log."""
    folder = Path(task["folder"])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with _log(folder).open("a", buffering=1, encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            if task["config"]:
                from tkpo.runs import run

                run(RunConfig(**task["config"]), resume=not task["restart"])
                (folder / DONE).unlink(missing_ok=True)
            if task["evaluation"]:
                _predict(task, folder)
        except TKPOError as error:
            print(error)
            sys.exit(2)
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}")
            sys.exit(1)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(3)


def _predict(task: dict, folder: Path) -> None:
    from tkpo.evaluation import predict, test_records
    from tkpo.generation import OutlineGenerator
    from tkpo.runs import adapter_folder, environment

    wanted = task["evaluation"]
    records, _ = test_records(wanted["dataset"], split=wanted["split"], lang=wanted["lang"], limit=wanted["limit"])
    model, adapters = wanted["model"], {}
    if task["config"] and task["config"]["finetuning"] == "full":
        model = str(folder / "model")
    elif task["config"]:
        adapters = {"adapter": adapter_folder(folder)}
    generator = OutlineGenerator(model, adapters, task["dtype"], task["device"])
    part = folder / "predictions.jsonl"
    if task["restart"]:
        part.unlink(missing_ok=True)
    texts = predict(generator, records, next(iter(adapters), "base"), BATCH, wanted["max_new_tokens"], part)
    rows = [
        {key: record[key] for key in ("id", "lang", "attribute", "form")}
        | {"reference": record["output"], "prediction": t}
        for record, t in zip(records, texts, strict=True)
    ]
    settings = {**wanted, "adapter": str(folder), "decoding": "greedy"}
    result = {"settings": settings, "environment": environment(), "samples": rows}
    (folder / "predicted.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    part.unlink()
