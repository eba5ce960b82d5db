"""The loop guard; oracles are transformers' own n-gram processor and outlines written by hand."""

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor

from tkpo.loop_guard import RUN, LoopGuard
from tkpo.presets import load_tokenizer


class Letters:
    """A tokenizer without numbers and lines: headings play no part."""

    def decode(self, ids):
        return "ab"[ids[0]]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("qwen2.5-coder-0.5b")


def after(tokenizer, outline, start):
    """The tokens of `start` that the guard would not let through, one after the other, as text."""
    guard = LoopGuard(tokenizer)
    ids, stopped = tokenizer(outline)["input_ids"], []
    for token in tokenizer(start)["input_ids"]:
        if token in guard.banned(ids):
            stopped.append(tokenizer.decode([token]))
        ids.append(token)
    return stopped


def test_runs_are_those_of_transformers():
    guard, oracle = LoopGuard(Letters()), NoRepeatNGramLogitsProcessor(RUN)
    generator = torch.Generator().manual_seed(0)
    found = 0
    for _ in range(50):
        ids = torch.randint(0, 2, (1, 40), generator=generator)
        expected = oracle(ids, torch.zeros(1, 2))[0].isinf().nonzero().flatten().tolist()
        assert guard._runs(ids[0].tolist()) == set(expected)
        found += bool(expected)
    assert found > 10
    assert guard.banned([]) == set()


@pytest.mark.parametrize(
    ("outline", "start", "stopped"),
    [
        ("1. Safety tips\n", "2. Safety tips\n", [" tips"]),
        ("12. Safety tips\n", "13. Safety tips\n", [" tips"]),
        ("1. A hut\n   1.1 Safety tips\n", "   1.2 Safety tips\n", [" tips"]),
        ("1. 盐的历史\n2. 运输\n", "3. 盐的历史\n", ["的历史"]),
        ("1. Safety tips\n", "2. Safety first\n", []),
        ("1. Safety tips\n", "2. Other safety tips\n", []),
        ("1. Safety", " and safety", []),  # the line itself is no earlier heading
    ],
)
def test_a_heading_is_not_written_twice_whatever_its_number(tokenizer, outline, start, stopped):
    assert after(tokenizer, outline, start) == stopped
