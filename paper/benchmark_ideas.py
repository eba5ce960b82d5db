"""Ideas for a faster training step, measured: one batch for both passes, torch.compile, bucketing, draws.

    python -m paper.benchmark_ideas

passes: the backbone reads a true and a flipped sample, in one batch of two or one after the other.
compile: forward and backward of the backbone with LoRA, plain and by torch.compile, and the seconds compiling took.
padding: columns that a batch computes beside its samples' own tokens, in random order and grouped by length.
draws: reject tokens of 128 positions by each way of drawing, beside the product that makes their logits.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import get_peft_model
from transformers.trainer_pt_utils import LengthGroupedSampler

from paper.benchmark import (
    FOLDER,
    Setup,
    count_tokens,
    fresh_model,
    lora_config,
    machine,
    save,
    training_records,
    versions,
)
from tkpo.attributes import get_axis
from tkpo.data import load_records
from tkpo.encoding import encode_dataset
from tkpo.flip import PromptFlipper, pad_rows
from tkpo.loss import draw_reject_tokens

BATCHES = (4, 8, 16)
POSITIONS, REJECTS = 128, 20


def in_turn(forms: dict[str, Callable[[int], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round; a form is given the round's number, the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 1):
        for name, form in forms.items():
            began = time.perf_counter()
            form(number)
            seconds[name].append(time.perf_counter() - began)
            print(f"round {number}, {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds


def passes(model, rows: list[tuple[tuple, tuple]], rounds: int) -> dict:
    """rows: (ids, labels) of the true and of the flipped sample, one pair a round."""

    @torch.no_grad()
    def read(pairs: list[tuple]) -> None:
        ids, mask, _ = pad_rows(pairs, 0)
        model(input_ids=ids, attention_mask=mask, use_cache=False)

    forms = {
        "one after another": lambda number: [read([pair]) for pair in rows[number]],
        "one batch": lambda number: read(list(rows[number])),
    }
    return {name: seconds[1:] for name, seconds in in_turn(forms, rounds).items()}


def compiled(model, rows: list[tuple[tuple, tuple]], rounds: int) -> dict:
    """model: the backbone with LoRA; `first` is the step that compiles, of a length that the others do not have."""

    def step(backbone) -> Callable[[int], None]:
        def run(number: int) -> None:
            ids, mask, _ = pad_rows([rows[number][0]], 0)
            with torch.autocast("cpu", torch.bfloat16, enabled=backbone.dtype == torch.bfloat16):  # as in training
                states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            states.float().mean().backward()

        return run

    forms = {"plain": step(model), "compiled": step(torch.compile(model, dynamic=True))}
    seconds = in_turn(forms, rounds)
    return {name: {"first": own[0], "steps": own[1:]} for name, own in seconds.items()}


def padding(lengths: list[int], seed: int) -> list[dict]:
    """Columns computed over the samples' own tokens, for each batch size; 1 is no padding."""
    shuffled = random.Random(seed).sample(range(len(lengths)), len(lengths))
    found = []
    for size in BATCHES:
        generator = torch.Generator().manual_seed(seed)
        grouped = list(LengthGroupedSampler(size, lengths=lengths, generator=generator))
        shares = []
        for order in (shuffled, grouped):
            batches = [[lengths[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
            shares.append(sum(max(batch) * len(batch) for batch in batches) / sum(lengths))
        found.append({"batch_size": size, "random": shares[0], "grouped": shares[1]})
    return found


@torch.no_grad()
def draws(head: torch.Tensor, rounds: int) -> dict:
    """head: the output head's weight (V, H). All forms draw from the same logits."""
    labels = torch.randint(len(head), (1, POSITIONS), generator=torch.Generator().manual_seed(0))
    states = torch.randn(POSITIONS, head.shape[1], generator=torch.Generator().manual_seed(1))
    logits = (states @ head.float().T).unsqueeze(0)
    forms = {
        "logits (product)": lambda _: states.to(head.dtype) @ head.T,
        "inverse sums": lambda _: draw_reject_tokens(logits, labels, REJECTS, "multinomial"),
        "Gumbel noise": lambda _: draw_reject_tokens(logits, labels, REJECTS, "gumbel"),
        "torch.multinomial": lambda _: torch.multinomial(logits[0].softmax(-1), REJECTS),
    }
    return {name: seconds[1:] for name, seconds in in_turn(forms, rounds).items()}


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=Setup.model, help="preset or folder; default %(default)s")
    p.add_argument("--dtype", default=Setup.dtype, choices=("float32", "bfloat16"), help="default %(default)s")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds; default %(default)s")
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all cores")
    p.add_argument("--output", type=Path, default=FOLDER, help="folder for the JSON; default %(default)s")
    args = p.parse_args(argv)
    if args.rounds < 1 or args.threads < 1:
        p.error("--rounds and --threads must be at least 1")
    started, load = time.time(), os.getloadavg()[0]
    torch.set_num_threads(args.threads)
    setup = Setup(model=args.model, dtype=args.dtype, steps=args.rounds, threads=args.threads)
    model, tokenizer = fresh_model(setup)
    encoded = encode_dataset(
        training_records(setup), tokenizer, PromptFlipper(tokenizer, get_axis(setup.dataset)), setup.max_length
    )
    names = ("input_ids", "labels"), ("flipped_input_ids", "flipped_labels")
    rows = [tuple(tuple(row[name] for name in pair) for pair in names) for row in encoded]
    lengths = [n for r in load_records(setup.dataset) if (n := count_tokens(r, tokenizer, setup))]
    result = {
        "name": "ideas",
        "model": args.model,
        "dtype": args.dtype,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "machine": machine(setup, load),
        "versions": versions(),
        "tokens": [len(true[0]) for true, _ in rows],
        "padding": padding(lengths, setup.seed),
        "draws": draws(model.lm_head.weight, args.rounds),
        "passes": passes(model.model, rows, args.rounds),
    }
    get_peft_model(model, lora_config(setup))  # puts LoRA into the backbone, in place
    result["compile"] = compiled(model.model, rows, args.rounds)
    save(result, args.output, report(result))
    return 0


def report(result: dict) -> str:
    """The result in words and numbers."""

    def ratio(ours: list[float], theirs: list[float]) -> float:
        return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))

    batch, singly = (result["passes"][name] for name in ("one batch", "one after another"))
    lines = [f"both passes in one batch / one after another: {ratio(batch, singly):.2f}"]
    plain, own = result["compile"]["plain"], result["compile"]["compiled"]
    lines.append(
        f"compiled / plain: {ratio(own['steps'], plain['steps']):.2f}, after {own['first']:.0f} s of compiling"
    )
    for name, seconds in result["draws"].items():
        lines.append(f"{POSITIONS} positions, {name}: {1000 * statistics.median(seconds):.0f} ms")
    for row in result["padding"]:
        lines.append(
            f"batches of {row['batch_size']}: {row['random']:.2f} columns a token in random order, "
            f"{row['grouped']:.2f} grouped by length"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
