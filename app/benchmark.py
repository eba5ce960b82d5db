"""How quick the app is on this machine, and how quick it could be: `python app/benchmark.py`, on an idle machine.

Measures, through the service that the page uses: seconds to the first words of all three columns and to three
outlines of 100 tokens, from a bare topic and with an article; and beside them the machine's own limits. Writing a
token reads every weight once, so its limit is memory bandwidth; reading a prompt multiplies every weight with every
prompt token, so its limit is arithmetic.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from app.main import adapter_folders  # noqa: E402
from app.service import OutlineService  # noqa: E402
from tkpo.machine import matrix_gflops, processor, read_bandwidth  # noqa: E402

TOPIC = "How coral reefs bleach and recover"
TARGETS = {"topic_first_words": 2.0, "article_first_words": 6.0, "topic_100_tokens": 15.0}  # seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--adapters", nargs="+", metavar="[AXIS/]METHOD=FOLDER")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=ROOT / "app" / "benchmark.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load = os.getloadavg()[0]
    limits = {"read_gb_per_s": read_bandwidth(), "gflops": matrix_gflops()}
    service = OutlineService(args.model, adapter_folders(args.adapters), args.dtype).start()
    while not service.ready:
        if service.error:
            raise SystemExit(service.error)
        time.sleep(0.2)
    service._classified.wait()
    while service._unread:
        time.sleep(0.2)
    article = ""
    runs = {}
    for name, given in (("topic", {"topic": TOPIC}), ("article", {"topic": "Lalibela", "article": article})):
        query = service.check(**given, style="comprehensive", length=100)
        record = query.record()
        prompt = service.generator.prompt_ids(record)
        kept = service.generator.shared_tokens(record, prompt)
        measured = [measure(service, query) for _ in range(args.repeats + 1)][1:]
        runs[name] = {"prompt_tokens": len(prompt), "kept_tokens": kept, "repeats": args.repeats} | {
            key: {"median": statistics.median(m[key] for m in measured), "worst": max(m[key] for m in measured)}
            for key in ("first_words", "all", "tokens", "seconds_a_step")
        }
    weights = body_and_head(args.model)
    bounds = {
        "weights_a_step_gb": sum(weights) / 1e9,
        "step_by_bandwidth": sum(weights) / 1e9 / limits["read_gb_per_s"],
        "topic_prompt_by_arithmetic": prompt_seconds(runs["topic"], weights[0], limits["gflops"]),
        "article_prompt_by_arithmetic": prompt_seconds(runs["article"], weights[0], limits["gflops"]),
    }
    reached = {
        "topic_first_words": runs["topic"]["first_words"]["median"],
        "article_first_words": runs["article"]["first_words"]["median"],
        "topic_100_tokens": runs["topic"]["all"]["median"],
    }
    result = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads": args.threads, "load_before": load},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "model": args.model,
        "runtime": type(service.generator.decoder).__module__ + "." + type(service.generator.decoder).__name__,
        "runs": runs,
        "limits": limits,
        "bounds": bounds,
        "targets": {key: {"seconds": TARGETS[key], "reached": value} for key, value in reached.items()},
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 0


def measure(service: OutlineService, query) -> dict:
    """Seconds from the click to words in every column and to the end; tokens of all columns; seconds a step."""
    began, first, steps = time.monotonic(), None, []
    for update in service.read(service.compare(query)):
        now = time.monotonic()
        if update.columns and all(c.text for c in update.columns):
            first = first or now - began
            steps.append(now)
    tokens = sum(len(service.generator.tokenizer(c.text)["input_ids"]) for c in update.columns)
    pace = (steps[-2] - steps[0]) / max(1, len(steps) - 2) if len(steps) > 2 else 0.0
    return {"first_words": first or now - began, "all": now - began, "tokens": tokens, "seconds_a_step": pace}


def body_and_head(model: str) -> tuple[int, int]:
    """Bytes of the weights that one step reads, as they are stored: layers, and output head."""
    from safetensors import safe_open

    from tkpo.presets import resolve_model

    body = head = 0
    for file in resolve_model(model).glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                tensor = weights.get_tensor(name)
                if "lm_head" in name:
                    head += tensor.nbytes
                elif "embed" not in name:
                    body += tensor.nbytes
    return body, head


def prompt_seconds(run: dict, body_bytes: int, gflops: float, columns: int = 3) -> float:
    """Two operations a weight (of two bytes) and token of every column's own prompt that is not kept from before."""
    return 2 * body_bytes / 2 * (run["prompt_tokens"] - run["kept_tokens"]) * columns / (gflops * 1e9)


if __name__ == "__main__":
    sys.exit(main())
