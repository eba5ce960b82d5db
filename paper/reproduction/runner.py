"""Do the runs that are missing, each in a process of its own; survives being killed."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from reproduction.grid import Run, evaluation, run_config, sample_count
from reproduction.store import PAPER, Store, make_record
from tkpo.data import load_records
from tkpo.errors import TKPOError
from tkpo.methods import PAIRWISE
from tkpo.run_config import RunConfig

COST = {"base": 0, "sft": 3, "tkpo": 4, "dpo": 8, "simpo": 6, "orpo": 6}  # forward passes a sample
DECODING = 0.02  # what one written token costs in the same unit, roughly; for the time left only
BATCH = {"cpu": 24, "cuda": 64}  # outlines decoded together
DONE = "recorded"  # file in a run's folder: its record has been written, so a missing record means train again


@dataclass(frozen=True)
class _Step:
    """A run to do; `alone`: only its adapter is wanted."""

    run: Run
    alone: bool = False

    def __str__(self) -> str:
        return self.run.name + (" (for its adapter)" if self.alone else "")


def do_runs(store: Store, runs: list[Run], work: Path, device: str | None = None, jobs: int = 1) -> None:
    """Do those of `runs` that have no record yet, in order, and store each as soon as it is done.

    work: where each run has its folder. A run that was cut off goes on from its last checkpoint; the adapter that
    DPO and SimPO continue is trained first where it is not at hand. jobs: so many at a time; their records say so,
    since their seconds are not those of a run alone. A run that fails keeps only those that need its adapter from
    being done; TKPOError at the end names its log.
    """
    missing = [run for run in dict.fromkeys(runs) if not store.get(run)]
    waiting = list(dict.fromkeys(step for run in missing for step in _with_sft(store, run, work, missing)))
    if not waiting:
        print("nothing to run: every result is stored", file=sys.stderr)
        return
    _device(device)
    count, costs = len(waiting), {step: _cost(store, step) for step in waiting}
    running: dict[_Step, _Process] = {}
    finished, failed = [], {}
    with tqdm(
        total=sum(costs.values()), bar_format="{percentage:3.0f} %|{bar}| {elapsed} so far, {remaining} left {desc}"
    ) as bar:

        def fail(step: _Step, error: str) -> None:
            failed[step] = error
            bar.write(f"failed: {step}", file=sys.stderr)

        try:
            while waiting or running:
                for step in _ready(waiting, running)[: jobs - len(running)]:
                    waiting.remove(step)
                    if step.run.sft in [other.run for other in failed]:
                        fail(step, f"run {step.run.name} was left out: it continues {step.run.sft.name}, which failed")
                        continue
                    try:
                        running[step] = _Process(store, step, work, device, jobs)
                    except TKPOError as error:
                        fail(step, f"run {step.run.name} cannot be made: {error}")
                multiprocessing.connection.wait([process.sentinel for process in running.values()], timeout=1)
                for step in [step for step, process in running.items() if not process.alive]:
                    process = running.pop(step)
                    try:
                        process.finish(store)
                        finished.append(step)
                        bar.write(f"[{len(finished)}/{count}] {step}", file=sys.stderr)
                    except TKPOError as error:
                        fail(step, str(error))
                done = sum(costs[step] for step in (*finished, *failed))
                done += sum(0.95 * process.share * costs[step] for step, process in running.items())
                bar.set_description_str(f"[{len(finished)}/{count}] {', '.join(map(str, list(running)[:2]))}")
                bar.update(max(0.0, done - bar.n))
        finally:
            for process in running.values():
                process.stop()
    if failed:
        raise TKPOError("\n".join(failed.values()))


def _ready(waiting: list[_Step], running: dict[_Step, object]) -> list[_Step]:
    """Those that wait for no SFT run, in order."""
    unfinished = {step.run for step in (*waiting, *running)}
    return [step for step in waiting if step.run.sft not in unfinished]


def _with_sft(store: Store, run: Run, work: Path, missing: list[Run]) -> list[_Step]:
    """The step of a run and, before it, that of the SFT run it needs."""
    needs = run.sft
    if needs in missing:
        return [_Step(needs), _Step(run)]
    if needs is None or _adapter(store, needs, work):
        return [_Step(run)]
    return [_Step(needs, alone=True), _Step(run)]


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


def _cost(store: Store, step: _Step) -> float:
    run = step.run
    epochs = getattr(run_config(run, store.preset), "epochs", 0)
    lang = store.preset.train.get("lang")
    samples = sample_count(run, store.preset) or len(load_records(run.dataset, "train", lang))
    wanted = evaluation(run, store.preset)
    counts = {"en": 0, "zh": 0}
    for record in load_records(run.dataset, run.split, lang):
        counts[record["lang"]] += 1
    outlines = sum(min(count, wanted["limit"] or count) for count in counts.values())
    return COST[run.method] * samples * epochs + (not step.alone) * outlines * wanted["max_new_tokens"] * DECODING


class _Process:
    """A step in a process of its own."""

    def __init__(self, store: Store, step: _Step, work: Path, device: str | None, jobs: int):
        run = step.run
        self.step = step
        self.folder = work / run.name
        self.folder.mkdir(parents=True, exist_ok=True)
        restart = (self.folder / DONE).exists() and not step.alone
        self.config = _config(store, run, work, device, restart)
        # Kept beside the training, which may be cut off, go on alone or be recorded by another call.
        self._jobs = self.folder.with_name(f"{self.folder.name}.jobs")
        before = 1 if restart or not self._jobs.exists() else int(self._jobs.read_text())
        self._jobs.write_text(str(max(before, jobs)))
        task = {
            "config": asdict(self.config) if self.config else None,
            "restart": restart,
            "evaluation": None if step.alone else evaluation(run, store.preset),
            # Predictions are written in the same precision everywhere, so that a GPU's compare with a CPU's.
            "dtype": store.preset.train.get("dtype", "float32"),
            "device": device,
            "folder": str(self.folder),
        }
        # What a run needs is imported once, not in every run; but no fork of a process may use a GPU.
        forks = hasattr(os, "fork") and _device(device) == "cpu"
        context = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload(["tkpo.runs", "tkpo.evaluation"])
        self._process = context.Process(target=_work, args=(task,))
        self._process.start()
        self.sentinel = self._process.sentinel

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def share(self) -> float:
        """Of the training that is done, from the run's log."""
        if self.config is None:
            return 0.0
        with contextlib.suppress(OSError, ValueError, IndexError, KeyError):
            last = json.loads((self.folder / "log.jsonl").read_text(encoding="utf-8").strip().splitlines()[-1])
            return min(1.0, last["epoch"] / self.config.epochs)
        return 0.0

    def stop(self) -> None:
        self._process.terminate()
        self._process.join()

    def finish(self, store: Store) -> None:
        """Store the record of a run that has ended; TKPOError if it failed."""
        self._process.join()
        run, status = self.step.run, self._process.exitcode
        if status:
            log, lines = _log(self.folder), []
            with contextlib.suppress(OSError):  # a process may end before it has opened its log
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            last = lines[-1] if lines else "no output"
            raise TKPOError(f"run {run.name} failed (exit status {status}): {last}\nIts output: {log}")
        if not self.step.alone:
            predicted = json.loads((self.folder / "predicted.json").read_text(encoding="utf-8"))
            record = make_record(self.folder if self.config else None, predicted, run)
            if (jobs := int(self._jobs.read_text())) > 1:
                record["jobs"] = jobs
            store.add(run, record)
            (self.folder / DONE).touch()


def _config(store: Store, run: Run, work: Path, device: str | None, restart: bool) -> RunConfig | None:
    """What the run is, with how it is done here; TKPOError if its settings do not go together."""
    how = {"output": str(work / run.name), "device": device}
    full = store.preset.train.get("finetuning") == "full"
    if run.sft and full:
        how["model"] = str(work / run.sft.name / "model")
    elif run.sft:
        how["sft_adapter"] = str(_adapter(store, run.sft, work))
    config = run_config(run, store.preset, **how)
    if config is None or full:
        return config
    begun = work / run.name / "config.json"
    if begun.exists() and not restart:  # goes on as it began
        how["micro_batch_size"] = json.loads(begun.read_text(encoding="utf-8"))["micro_batch_size"]
    elif _device(device) == "cuda" and config.micro_batch_size == 1:
        sequences = 2 if run.method in PAIRWISE else 1  # a pair is two
        how["micro_batch_size"] = max(1, config.batch_size // sequences)
        if config.batch_size % how["micro_batch_size"]:
            how["micro_batch_size"] = 1
    return run_config(run, store.preset, **how)


def _device(device: str | None) -> str:
    """Its type, of a device's name; None is the GPU if there is one."""
    import torch

    try:
        return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    except RuntimeError as error:
        raise TKPOError(f"no device {device!r}: choose cpu or cuda") from error


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
                _free_memory()
            if task["evaluation"]:
                _predict(task, folder)
        except TKPOError as error:
            print(error)
            sys.exit(2)
        except Exception as error:
            traceback.print_exc()
            print(f"{type(error).__name__}: {error}")
            sys.exit(1)


def _free_memory() -> None:
    """Give the GPU memory of the training back to the other runs."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(3)


def _predict(task: dict, folder: Path) -> None:
    from tkpo.adapters import adapter_folder
    from tkpo.environment import environment
    from tkpo.evaluation import predict, test_records
    from tkpo.generation import OutlineGenerator

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
    batch = BATCH.get(_device(task["device"]), BATCH["cpu"])
    texts = predict(generator, records, next(iter(adapters), "base"), batch, wanted["max_new_tokens"], part)
    rows = [
        {key: record[key] for key in ("id", "lang", "attribute", "form")}
        | {"reference": record["output"], "prediction": t}
        for record, t in zip(records, texts, strict=True)
    ]
    settings = {**wanted, "adapter": str(folder), "decoding": "greedy"}
    result = {"settings": settings, "environment": environment(), "samples": rows}
    (folder / "predicted.json").write_text(json.dumps(result, ensure_ascii=False), encoding="utf-8")
    part.unlink()
