"""Do the missing runs, each in a process of its own; survives being killed."""

from __future__ import annotations

import multiprocessing.connection
import sys
from pathlib import Path

from tqdm import tqdm

from paper.reproduction.grid import Run, evaluation, run_config, sample_count
from paper.reproduction.process import RunProcess, Step, device_type, find_adapter
from paper.reproduction.store import Store
from tkpo.data import load_records
from tkpo.errors import TKPOError
from tkpo.methods import METHODS

DECODING = 0.02  # roughly what writing one token costs, in forward passes; for the progress bar only


def do_runs(store: Store, runs: list[Run], work: Path, device: str | None = None, jobs: int = 1) -> None:
    """Do those of `runs` that have no record yet, in order, and store each as soon as it is done.

    An interrupted run resumes from its last checkpoint. A failed run skips only those that need its adapter.

    Args:
        store: where records are looked up and written.
        runs: what to do.
        work: folder in which each run has its own.
        device: cpu or cuda; default: cuda if available, else cpu.
        jobs: runs at a time. Records of several at a time say so, since their seconds are not those of a run alone.

    Raises:
        TKPOError: at the end, naming the logs of the runs that failed.
    """
    missing = [run for run in dict.fromkeys(runs) if not store.get(run)]
    waiting = list(dict.fromkeys(step for run in missing for step in _with_needed(store, run, work, missing)))
    if not waiting:
        print("nothing to run: every result is stored", file=sys.stderr)
        return
    device_type(device)
    count, costs = len(waiting), {step: _cost(store, step) for step in waiting}
    running: dict[Step, RunProcess] = {}
    finished, failed = [], {}
    with tqdm(
        total=sum(costs.values()), bar_format="{percentage:3.0f} %|{bar}| {elapsed} so far, {remaining} left {desc}"
    ) as bar:

        def fail(step: Step, error: str) -> None:
            failed[step] = error
            bar.write(f"failed: {step}", file=sys.stderr)

        try:
            while waiting or running:
                for step in _ready(waiting, running)[: jobs - len(running)]:
                    waiting.remove(step)
                    if step.run.needs in [other.run for other in failed]:
                        needs = step.run.needs.name
                        fail(step, f"run {step.run.name} was left out: it continues {needs}, which failed")
                        continue
                    try:
                        running[step] = RunProcess(store, step, work, device, jobs)
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


def _ready(waiting: list[Step], running: dict[Step, object]) -> list[Step]:
    """Those that wait for no other run's adapter, in order."""
    unfinished = {step.run for step in (*waiting, *running)}
    return [step for step in waiting if step.run.needs not in unfinished]


def _with_needed(store: Store, run: Run, work: Path, missing: list[Run]) -> list[Step]:
    """The step of a run and, before it, those of the runs whose adapters it needs."""
    needs = run.needs
    if needs in missing:
        return [*_with_needed(store, needs, work, missing), Step(run)]
    if needs is None or find_adapter(store, needs, work):
        return [Step(run)]
    before = _with_needed(store, needs, work, missing)[:-1]
    return [*before, Step(needs, alone=True), Step(run)]


def _cost(store: Store, step: Step) -> float:
    """Of training and writing, in forward passes: for the progress bar only."""
    run = step.run
    epochs = getattr(run_config(run, store.preset), "epochs", 0)
    lang = store.preset.train.get("lang")
    samples = sample_count(run, store.preset) or len(load_records(run.dataset, "train", lang))
    wanted = evaluation(run, store.preset)
    counts = {"en": 0, "zh": 0}
    for record in load_records(run.dataset, run.split, lang):
        counts[record["lang"]] += 1
    outlines = sum(min(count, wanted["limit"] or count) for count in counts.values())
    trains = run.method in METHODS and not run.trained
    training = METHODS[run.method].cost * samples * epochs if trains else 0
    return training + (not step.alone) * outlines * wanted["max_new_tokens"] * DECODING
