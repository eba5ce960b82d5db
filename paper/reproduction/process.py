"""One run in a process of its own: trained and evaluated by tkpo's public functions, as the commands do."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from paper.reproduction.grid import BASE, Run, evaluation, run_config, run_order
from paper.reproduction.store import Store, make_record
from tkpo.errors import TKPOError
from tkpo.methods import PAIRWISE
from tkpo.run_config import RunConfig

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"
BATCH = {"cpu": 24, "cuda": 64}  # outlines decoded together
PREDICTED = "predicted.json"  # what `evaluate` writes in the run's folder
DONE = "recorded"  # file in a run's folder: its record has been written, so a missing record means train again


@dataclass(frozen=True)
class Step:
    """A run to do. alone: only its adapter is wanted."""

    run: Run
    alone: bool = False

    def __str__(self) -> str:
        return self.run.name + (" (for its adapter)" if self.alone else "")


def find_adapter(store: Store, run: Run, work: Path) -> Path | None:
    """The folder with a run's adapter: its own, or the shipped one if it is that run's."""
    folder = work / run.name
    if (folder / "metrics.json").exists():
        return folder
    shipped = CHECKPOINTS / run.dataset / run.method
    record, weights = store.get(run), shipped / "adapter_model.safetensors"
    if record and weights.is_file() and hashlib.sha256(weights.read_bytes()).hexdigest() == record["adapter_sha256"]:
        return shipped
    return None


class RunProcess:
    """Trains and evaluates one run in a process of its own."""

    def __init__(self, store: Store, step: Step, work: Path, device: str | None, jobs: int):
        run = step.run
        self.step = step
        self.folder = work / run.name
        self.folder.mkdir(parents=True, exist_ok=True)
        restart = (self.folder / DONE).exists() and not step.alone
        self.config = None if run.trained else _config(store, run, work, device, restart)
        self.made_in = work / run.trained.name if run.trained else self.folder if self.config else None
        # Kept beside the training, which may be interrupted, resume alone or be recorded by another call.
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
            "made_in": self.made_in and str(self.made_in),
            "full": store.preset.train.get("finetuning") == "full",
            "prompt_order": run_order(run, store.preset),
        }
        # What a run needs is imported once, not in every run; but no fork of a process may use a GPU.
        forks = hasattr(os, "fork") and device_type(device) == "cpu"
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
            predicted = json.loads((self.folder / PREDICTED).read_text(encoding="utf-8"))
            predicted["settings"] |= evaluation(run, store.preset)  # the preset's model, also after full fine-tuning
            record = make_record(self.made_in, predicted, run)
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
        how["sft_adapter"] = str(find_adapter(store, run.sft, work))
    config = run_config(run, store.preset, **how)
    if config is None or full:
        return config
    begun = work / run.name / "config.json"
    if begun.exists() and not restart:  # resumes as it began
        how["micro_batch_size"] = json.loads(begun.read_text(encoding="utf-8"))["micro_batch_size"]
    elif device_type(device) == "cuda" and config.micro_batch_size == 1:
        sequences = 2 if run.method in PAIRWISE else 1  # a pair is two
        how["micro_batch_size"] = max(1, config.batch_size // sequences)
        if config.batch_size % how["micro_batch_size"]:
            how["micro_batch_size"] = 1
    return run_config(run, store.preset, **how)


def device_type(device: str | None) -> str:
    """cpu or cuda, of a device's name; None: cuda if available, else cpu."""
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
                _evaluate(task, folder)
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


def _evaluate(task: dict, folder: Path) -> None:
    from tkpo.adapters import adapter_folder
    from tkpo.evaluation import evaluate
    from tkpo.generation import OutlineGenerator

    wanted, made_in = dict(task["evaluation"]), task["made_in"] and Path(task["made_in"])
    model, adapters = wanted.pop("model"), {}
    if made_in and task["full"]:
        model = str(made_in / "model")
    elif made_in:
        adapters = {"adapter": adapter_folder(made_in)}
    if task["restart"]:
        for path in folder.glob(f"{PREDICTED}*"):
            path.unlink()
    options = {"base_prompt_order": task["prompt_order"]}
    generator = OutlineGenerator(model, adapters, task["dtype"], task["device"], **options)
    batch_size = BATCH.get(device_type(task["device"]), BATCH["cpu"])
    name, source = (next(iter(adapters), BASE), str(made_in)) if made_in else (BASE, None)
    evaluate(generator, name, folder / PREDICTED, batch_size=batch_size, adapter_source=source, **wanted)
