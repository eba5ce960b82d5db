"""How quickly outlines are written on a CPU: three adapters in one batch, and one after another.

    python -m paper.benchmark_decoding
    python -m paper.benchmark_decoding --table paper/results/benchmark/decoding.json

One prompt under three adapters (SFT, DPO, TKPO), greedily, the same number of tokens in every form: by tkpo.decoding
and by transformers with PEFT, the three rows in one batch and one after another; where the CPU multiplies in bfloat16,
by transformers in bfloat16 too, which may write other tokens. The forms take turns, round by round.
Beside them stand the linear layers alone, in plain float32 and as float16 numbers packed, for batches of several sizes,
and what memory bandwidth allows: a step reads every weight once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from paper.benchmark import FOLDER, Setup, machine, save, versions
from tkpo.adapters import adapter_folder
from tkpo.attributes import get_axis
from tkpo.data import make_record
from tkpo.errors import TKPOError
from tkpo.generation import OutlineGenerator, TransformersDecoder, load_with_adapters
from tkpo.machine import read_bandwidth
from tkpo.presets import default_dtype

METHODS = ("sft", "dpo", "tkpo")
TOPIC = "How coral reefs bleach and recover"
FORMS = {
    "batch": "tkpo.decoding, one batch",
    "single": "tkpo.decoding, one after another",
    "transformers_batch": "transformers with PEFT, one batch",
    "transformers_single": "transformers with PEFT, one after another",
    "transformers_bfloat16": "transformers with PEFT in bfloat16, one batch",
}
ROWS = (1, 3, 8, 24, 180)


def write(decoder, prompts: list[list[int]], names: list[str], end: int, tokens: int) -> dict:
    """Greedy `tokens` tokens of every row, none of which ends before; seconds to the first and of each later step."""
    rows: list[list[int]] = [[] for _ in prompts]
    stamps = []

    def choose(logits: Tensor, which: list[int]) -> list[int]:
        logits[:, end] = -torch.inf
        chosen = logits.argmax(dim=-1).tolist()
        for row, token in zip(which, chosen, strict=True):
            rows[row].append(token)
        stamps.append(time.perf_counter())
        return chosen

    began = time.perf_counter()
    decoder.decode(prompts, names, choose, end, tokens, lambda: False)
    return {"rows": rows, "first": stamps[0] - began, "steps": [b - a for a, b in itertools.pairwise(stamps)]}


def write_singly(decoder, prompts: list[list[int]], names: list[str], end: int, tokens: int) -> dict:
    """`write`, one row after another; a step is a token of every row, as in a batch."""
    runs = [write(decoder, [ids], [name], end, tokens) for ids, name in zip(prompts, names, strict=True)]
    return {
        "rows": [run["rows"][0] for run in runs],
        "first": sum(run["first"] for run in runs),
        "steps": [sum(steps) for steps in zip(*(run["steps"] for run in runs), strict=True)],
    }


@torch.inference_mode()
def products(packed: list[Callable], plain: list[tuple[Tensor, Tensor | None]], repeats: int = 5) -> list[dict]:
    """Milliseconds of all linear layers for a number of rows, packed and plain, the best of `repeats` in turn."""
    measured = []
    for rows in ROWS:
        inputs = {size: torch.randn(rows, size) for size in {weight.shape[1] for weight, _ in plain}}
        times: dict[str, list[float]] = {"plain": [], "packed": []}
        for _ in range(repeats):
            began = time.perf_counter()
            for weight, bias in plain:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight, bias)
            middle = time.perf_counter()
            for layer in packed:
                layer(inputs[layer.in_features])
            times["plain"].append(middle - began)
            times["packed"].append(time.perf_counter() - middle)
        measured.append({"rows": rows} | {f"{key}_ms": 1000 * min(own) for key, own in times.items()})
    return measured


def benchmark(model: str, folders: dict[str, Path], tokens: int, rounds: int, threads: int) -> dict:
    """All forms in turn and the products; the result as it is written to JSON."""
    started, load = time.time(), os.getloadavg()[0]
    torch.set_num_threads(threads)
    bandwidth = read_bandwidth()
    generator = OutlineGenerator(model, folders, "float32", "cpu")
    ours, tokenizer = generator.decoder, generator.tokenizer
    if isinstance(ours, TransformersDecoder):
        raise TKPOError(f"{model} is no Qwen2 with LoRA adapters: tkpo.decoding does not run it")
    whole = load_with_adapters(model, folders, "float32", "cpu")
    theirs = TransformersDecoder(whole, tokenizer.pad_token_id)
    record = make_record(get_axis("language_style"), "objective", TOPIC)
    prompts, names = [generator.prompt_ids(record)] * len(folders), list(folders)
    forms = {
        key: (theirs if key.startswith("transformers") else ours, write_singly if key.endswith("single") else write)
        for key in FORMS
    }
    del forms["transformers_bfloat16"]
    if default_dtype("cpu") == torch.bfloat16:
        half = TransformersDecoder(load_with_adapters(model, folders, "bfloat16", "cpu"), tokenizer.pad_token_id)
        forms["transformers_bfloat16"] = (half, write)
    runs: dict[str, list[dict]] = {key: [] for key in forms}
    for number in range(rounds + 1):
        for key, (decoder, form) in forms.items():
            run = form(decoder, prompts, names, tokenizer.eos_token_id, tokens if number else 3)
            if number:  # the first round warms up
                runs[key].append(run)
                print(f"round {number}, {FORMS[key]}: {sum(run['steps']):.1f} s", file=sys.stderr, flush=True)
    base = whole.get_base_model()
    layers = [m.base_layer for m in base.modules() if isinstance(m, LoraLinear)] + [base.get_output_embeddings()]
    gigabytes = sum(2 * layer.weight.numel() for layer in layers) / 1e9
    limit = gigabytes / bandwidth
    reference = runs["transformers_single"][0]["rows"]
    return {
        "name": "decoding",
        "model": model,
        "adapters": names,
        "prompt_tokens": len(prompts[0]),
        "new_tokens": tokens,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "machine": machine(Setup(threads=threads), load) | {"read_gb_per_s": bandwidth},
        "versions": versions(),
        "weights_gb": gigabytes,
        "limit_s": limit,
        "forms": [_form(key, own, reference, limit) for key, own in runs.items()],
        "products": products([*ours.linears, ours.head], [(m.weight, m.bias) for m in layers]),
    }


def _form(key: str, runs: list[dict], reference: list[list[int]], limit: float) -> dict:
    steps = [seconds for run in runs for seconds in run["steps"]]
    rows, step = len(reference), statistics.median(steps)
    return {
        "key": key,
        "label": FORMS[key],
        "first_s": statistics.median(run["first"] for run in runs),
        "step_s": step,
        "tokens_per_second": rows / step,
        "share_of_limit": limit * (rows if key.endswith("single") else 1) / step,
        "same_tokens": all(run["rows"] == reference for run in runs),
        "steps": [[round(seconds, 4) for seconds in run["steps"]] for run in runs],
    }


def table(result: dict) -> str:
    """The result as Markdown."""
    where = f"{result['machine']['processor']}, {result['machine']['threads']} threads"
    lines = [
        f"{result['model']}, {len(result['adapters'])} adapters, {result['new_tokens']} tokens each ({where})",
        "",
        "| form | first tokens, s | a step, s | tokens/s | of the bandwidth limit | same tokens |",
        "| --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for form in result["forms"]:
        numbers = f"{form['first_s']:.2f} | {form['step_s']:.3f} | {form['tokens_per_second']:.1f}"
        same = "yes" if form["same_tokens"] else "no"
        lines.append(f"| {form['label']} | {numbers} | {form['share_of_limit']:.0%} | {same} |")
    lines += ["", "| rows | linear layers, plain, ms | packed, ms | plain / packed |", "| ---: | ---: | ---: | ---: |"]
    for row in result["products"]:
        plain, packed = row["plain_ms"], row["packed_ms"]
        lines.append(f"| {row['rows']} | {plain:.0f} | {packed:.0f} | {plain / packed:.1f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="qwen2.5-coder-0.5b", help="preset or folder; default %(default)s")
    p.add_argument("--adapters", nargs="+", metavar="NAME=FOLDER", help="default: the three that come with the project")
    p.add_argument("--tokens", type=int, default=48, help="a row; default %(default)s")
    p.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    p.add_argument("--output", type=Path, default=FOLDER, help="folder for the JSON; default %(default)s")
    p.add_argument("--table", type=Path, metavar="JSON", help="print the tables of an earlier result")
    args = p.parse_args(argv)
    if args.table:
        print(table(json.loads(args.table.read_text())))
        return 0
    if args.tokens < 2 or args.rounds < 1 or args.threads < 1:
        p.error("--tokens must be at least 2, --rounds and --threads at least 1")
    shipped = [f"{method}={FOLDER.parents[1] / 'checkpoints' / 'language_style' / method}" for method in METHODS]
    given = [entry.partition("=") for entry in args.adapters or shipped]
    try:
        if wrong := [name for name, _, folder in given if not folder]:
            raise TKPOError(f"--adapters {wrong[0]}: expected NAME=FOLDER")
        folders = {name: adapter_folder(folder) for name, _, folder in given}
        result = benchmark(args.model, folders, args.tokens, args.rounds, args.threads)
    except TKPOError as error:
        print(f"benchmark_decoding: {error}", file=sys.stderr)
        return 2
    save(result, args.output, table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
