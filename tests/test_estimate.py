"""Memory estimates: sizes against real models, the counted loss against arrays counted by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tkpo import estimate as module
from tkpo.errors import TKPOError
from tkpo.estimate import Model, describe, estimate
from tkpo.loss import fused_reject_tokens, tkpo_loss

pytest.importorskip("deepspeed", reason="needs: bash install.sh deepspeed")

GIB = 2**30


def test_sizes_of_a_model_are_those_of_its_weights(tiny_folder):
    found = describe(str(tiny_folder))
    real = AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert found.parameters == sum(p.numel() for p in real.parameters())
    assert found.largest_layer == max(real.lm_head.weight.numel(), 64 * 128)
    assert (found.vocabulary, found.hidden) == (real.config.vocab_size, 64)


def test_shapes_of_the_hub_presets_are_the_published_ones():
    # Qwen2.5 technical report, table 1, and the model cards: 0.49 and 3.09 billion parameters, embeddings tied
    assert describe("qwen2.5-0.5b").parameters == pytest.approx(0.494e9, rel=0.01)
    assert describe("qwen2.5-3b").parameters == pytest.approx(3.09e9, rel=0.01)


def test_model_states_are_deepspeeds_own():
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs

    model = describe("qwen2.5-3b")
    found = estimate(model, gpus=8, zero=3, offload=True, length=256)
    host, gpu, _ = estimate_zero3_model_states_mem_needs(model.parameters, 151936 * 2048, 8, 1, True, True, True)
    assert (found["tkpo"].states, found["tkpo"].host) == (gpu, host)
    assert found["dpo"].host == host + 2 * model.parameters  # the frozen copy lies there too
    spread = estimate(model, gpus=8, zero=3, length=256)
    assert spread["dpo"].reference == pytest.approx(2 * model.parameters / 8)
    assert estimate(model, gpus=4, zero=2, length=256)["dpo"].reference == 2 * model.parameters
    assert estimate(model, gpus=8, zero=0, length=256)["tkpo"].states == 16 * model.parameters


def test_dpos_head_is_four_arrays_of_tokens_by_vocabulary():
    """By hand: float32 logits and log-probabilities, or gradient and log-probabilities, and one in 16 bit."""
    model = Model(10**6, 10**5, 5000, 64)
    logits = 2 * 512 * 5000
    head = estimate(model, length=512)["dpo"].head
    assert 8 * logits <= head <= 16 * logits


def test_tkpos_head_does_not_grow_with_the_sequence():
    model = Model(10**6, 10**5, 5000, 64)
    short, long = (estimate(model, length=n)["tkpo"].head for n in (1024, 8192))
    assert long - short < 0.05 * 7168 * 5000 * 2  # not a twentieth of the logits that were added
    assert long < estimate(model, length=8192)["dpo"].head / 10


@pytest.mark.parametrize(("tokens", "hidden", "vocabulary"), [(64, 128, 8000), (80, 192, 6000), (48, 16, 20000)])
def test_the_count_is_that_of_the_whole_loss(tokens, hidden, vocabulary):
    """Against the whole loss, on tensors with values."""
    weight = torch.nn.Parameter(torch.zeros(vocabulary, hidden, dtype=torch.bfloat16))
    states = torch.zeros(1, tokens, hidden, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, tokens, dtype=torch.long)
    with module._Peak() as peak:
        rejects = fused_reject_tokens(states.detach(), labels, weight.detach(), 20, chunk_size=16)
        tkpo_loss(states, labels, weight, rejects, chunk_size=16).loss.backward()
    assert module._tkpo_head(tokens, hidden, vocabulary, 20, 16) == pytest.approx(peak.bytes, rel=0.02)


def test_the_counter_adds_up_what_lives_at_the_same_time():
    with module._Peak() as peak:
        a = torch.zeros(1000)
        b = a + 1
        del a
        c = b * 2
        del b, c
        torch.zeros(10)
    assert peak.bytes == 8000


def test_wrong_requests_are_explained():
    model = Model(10**6, 10**5, 500, 64)
    with pytest.raises(TKPOError, match="ZeRO-0 with offload"):
        estimate(model, zero=0, offload=True)
    with pytest.raises(TKPOError, match="--gpus"):
        estimate(model, gpus=0)


def test_the_command_prints_both_methods(capsys):
    from tkpo.cli import main

    assert main(["estimate", "--model", "qwen2.5-3b", "--gpus", "8", "--zero", "3", "--offload"]) == 0
    text = capsys.readouterr().out
    assert "3.09 billion" in text and "TKPO" in text and "DPO" in text and "8 GPUs, ZeRO-3 with offload" in text
    assert main(["estimate", "--model", "nothing"]) == 2
