"""Where a training step's time goes: the operators of one step, by their own CPU time.

    python -m paper.benchmark_profile --dtype bfloat16 --articles short

A step is one article in its four styles, read once, by our SFT and by TKPO with LoRA on the default model; one step of
warm-up before it. Writes results/benchmark/profile-….json.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

FOLDER = Path(__file__).parent / "results" / "benchmark"
TOP = 12
GROUPS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::clone"),
}


def profile(setup, method: str) -> dict:
    """Seconds of a step, share per operator (the largest) and per group of operators."""
    import torch
    from torch.profiler import ProfilerActivity
    from transformers import TrainerCallback

    from paper.benchmark import TRAIN

    class Profiled(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.profiler = torch.profiler.profile(activities=[ProfilerActivity.CPU])
            self.profiler.__enter__()
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.seconds = time.perf_counter() - self.started
            self.profiler.__exit__(None, None, None)

    turns = Profiled()
    TRAIN[method](setup, turns)
    events = sorted(turns.profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    groups = {
        group: round(sum(e.self_cpu_time_total for e in events if e.key.startswith(names)) / total, 3)
        for group, names in GROUPS.items()
    }
    operators = {e.key: {"share": round(e.self_cpu_time_total / total, 3), "calls": e.count} for e in events[:TOP]}
    return {"method": method, "seconds": round(turns.seconds, 2), "groups": groups, "operators": operators}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-coder-0.5b", help="preset or folder; default %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="default %(default)s")
    parser.add_argument("--articles", default="short", choices=("short", "long"), help="default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    args = parser.parse_args()

    import torch

    from paper.benchmark import Setup, machine, versions

    torch.set_num_threads(args.threads)
    setup = Setup(**vars(args), steps=1, warmup=1)
    where = machine(setup, os.getloadavg()[0])
    steps = [profile(setup, method) for method in ("sft", "tkpo")]
    result = {
        "articles": args.articles,
        "dtype": args.dtype,
        "machine": where,
        "versions": versions(),
        "profile": steps,
    }
    vendor = "amd" if "AMD" in where["processor"] else "intel"
    path = FOLDER / f"profile-{args.articles}-articles-{vendor}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for step in steps:
        print(f"{step['method']}: {step['seconds']} s, {step['groups']}")
    print(path)


if __name__ == "__main__":
    main()
