"""Fixtures that several test files share. Tests run on one CPU thread unless OMP_NUM_THREADS says otherwise."""

import copy
import os
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# transformers takes seconds to import, so that only the fixtures that need it do so.


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The preset `tiny`, freshly made in a cache of its own."""
    from tkpo.presets import resolve_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TKPO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return resolve_model("tiny", progress=False)


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_folder):
    """One token a byte, ChatML template."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="session")
def tiny_model(tiny_folder, samples):
    """Makes plain Qwen2 models with the same weights each time, in eval mode.

    The preset's next-token distributions are nearly uniform. Here its weights are larger, so that distributions are
    peaked and depend on the prompt, and a little fitted to the samples, so that gold tokens beat some rejects.
    """
    from transformers import Qwen2ForCausalLM

    original = Qwen2ForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        for parameter in original.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    optimizer = torch.optim.AdamW(original.parameters(), lr=3e-3)
    for _ in range(2):
        for sample in samples:
            ids, labels = (torch.tensor([part]) for part in sample.row())
            original(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def make(dtype=torch.float32):
        return copy.deepcopy(original).to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def qwen_tokenizer():
    """The tokenizer of Qwen2.5, from the converted preset; nothing is downloaded."""
    from transformers import AutoTokenizer

    from tkpo.presets import cache_dir

    folder = cache_dir() / "models" / "qwen2.5-coder-0.5b"
    if not folder.is_dir():
        pytest.skip("preset qwen2.5-coder-0.5b is not in the cache")
    return AutoTokenizer.from_pretrained(folder)


# ---- the whole method on the tiny model, by hand


@dataclass
class Sample:
    """A record and its token ids; `flipped` is the prompt whose text asks for the other attribute."""

    record: dict
    prompt: list[int]
    flipped: list[int]
    response: list[int]

    def row(self, flip: bool = False) -> tuple[list[int], list[int]]:
        """(input ids, labels) of the true or the flipped sequence."""
        start = self.flipped if flip else self.prompt
        return start + self.response, [-100] * len(start) + self.response


PROMPT = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{instruction}\n{input}<|im_end|>\n<|im_start|>assistant\n"
)
INSTRUCTION = "Generate a structured hierarchical outline for the given document. Requirement: {}. Input:\n"


@pytest.fixture(scope="session")
def samples(tiny_tokenizer):
    """Four samples of language_style; in bytes the two phrases differ in length, and so do the responses."""

    def ids(text):
        return tiny_tokenizer(text, add_special_tokens=False)["input_ids"]

    made = []
    for attribute, other, topic, output in (
        ("literary", "objective", "the sea", "I. Salt\n1. Song"),
        ("objective", "literary", "bread, water, salt", "1. Flour"),
        ("literary", "objective", "a long, cold winter night", "I. Snow\nII. Ice\nIII. A fire"),
        ("objective", "literary", "rain", "1. It"),
    ):
        record = {"instruction": INSTRUCTION.format(attribute), "input": f"Topic: {topic}", "output": output}
        flipped = {**record, "instruction": INSTRUCTION.format(other)}
        prompts = (ids(PROMPT.format(**r)) for r in (record, flipped))
        made.append(Sample(record, *prompts, ids(output + "<|im_end|>\n")))
    return made


@pytest.fixture(scope="session")
def by_hand():
    """The method position by position in float64, from the plain logits of `model` on single unpadded sequences.

    Rejects are the `num_rejects` likeliest tokens under the flipped prompt, the sampler "topk". Returns means over
    sequences (loss, cross_entropy, preference) and over response positions (reward, accuracy).
    """

    def compute(model, samples, num_rejects=5, tau=0.15, weight=0.5, reduction="log_mean"):
        ce, preference, rewards, wins = [], [], [], []
        for sample in samples:
            p = _predictions(model, sample.prompt, sample.response)
            with torch.no_grad():
                q = _predictions(model, sample.flipped, sample.response)
            own_ce, own_rewards = [], []
            for t, gold in enumerate(sample.response):
                likely = q[t].tolist()
                ranked = sorted((v for v in range(len(likely)) if v != gold), key=lambda v: -likely[v])
                rivals = [p[t, v] for v in ranked[:num_rejects]]
                top = (p[t, gold] / tau).exp()
                own_rewards.append(top / (top + sum((x / tau).exp() for x in rivals)))
                own_ce.append(-p[t, gold].log())
                wins.append(float(all(p[t, gold] > x for x in rivals)))
            n = len(sample.response)
            ce.append(sum(own_ce) / n)
            logs = sum(r.log() for r in own_rewards) / n
            preference.append(-(sum(own_rewards) / n).log() if reduction == "log_mean" else -logs)
            rewards += own_rewards
        ce, preference = sum(ce) / len(ce), sum(preference) / len(preference)
        return {
            "loss": ce + weight * preference,
            "cross_entropy": ce,
            "preference": preference,
            "reward": sum(rewards) / len(rewards),
            "accuracy": sum(wins) / len(wins),
        }

    return compute


def _predictions(model, start, response):
    """(n, V) float64: what the model expects at each response position."""
    logits = model(input_ids=torch.tensor([start + response])).logits[0].double()
    return logits[len(start) - 1 : -1].softmax(dim=-1)
