"""The CPU decoder against transformers and PEFT on the same weights: hidden states, and what is written."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2ForCausalLM

from tkpo import decoding
from tkpo.decoding import PackedDecoder
from tkpo.presets import load_model

END = 257
PROMPTS = [torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (7, 31, 19, 40)]
NAMES = ["one", "two", "base", "one"]


def tuned(dtype=torch.float32, **config):
    """The tiny model with two random adapters: "two" has another rank and sits on some layers only."""
    torch.manual_seed(0)
    common = {"lora_alpha": 16, "task_type": "CAUSAL_LM"}
    first = LoraConfig(r=4, target_modules="all-linear", **common, **config)
    model = get_peft_model(load_model("tiny", "float32", "cpu").to(dtype), first, adapter_name="one")
    model.add_adapter("two", LoraConfig(r=2, target_modules=["k_proj", "up_proj", "down_proj"], **common))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def as_peft(model: PeftModel, name: str, ids: list[int], **options):
    """`model` on one sequence under one adapter, in float32."""
    tokens = torch.tensor([ids])
    if name == "base":
        with model.disable_adapter():
            return model.generate(input_ids=tokens, **options) if options else states(model, tokens)
    model.set_adapter(name)
    return model.generate(input_ids=tokens, **options) if options else states(model, tokens)


def states(model, tokens):
    with torch.no_grad():
        return model.get_base_model().model(input_ids=tokens).last_hidden_state[0]


def write(decoder: PackedDecoder, prompts, names, end=END, tokens=20, check=lambda: False, slots=None, shared=None):
    rows = [[] for _ in prompts]

    def choose(logits, which):
        assert len(logits) == len(which)
        chosen = logits.argmax(dim=-1).tolist()
        for row, token in zip(which, chosen, strict=True):
            rows[row].append(token)
        return chosen

    decoder.decode(prompts, names, choose, end, tokens, check, slots, shared)
    return rows


@pytest.fixture(scope="module")
def expected():
    """transformers' greedy tokens, one row after another."""
    model = tuned()
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": END, "pad_token_id": 256}
    return [as_peft(model, n, p, **options)[0, len(p) :].tolist() for n, p in zip(NAMES, PROMPTS, strict=True)]


def test_a_mixed_batch_writes_what_transformers_writes_row_by_row(expected):
    assert write(PackedDecoder(tuned()), PROMPTS, NAMES) == expected
    assert len({tuple(row) for row in expected}) == len(expected)


@pytest.mark.parametrize("tokens", [1, 8, 10_000])
def test_prompts_are_read_in_groups_of_any_size(expected, monkeypatch, tokens):
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", tokens)
    assert write(PackedDecoder(tuned()), PROMPTS, NAMES) == expected


def test_what_prompts_begin_with_is_read_once_for_each_adapter(expected, monkeypatch):
    """Same text as by transformers, with fewer tokens read; another adapter does not get the first one's keys."""
    decoder, read = PackedDecoder(tuned()), []
    forward = decoder._forward
    monkeypatch.setattr(decoder, "_forward", lambda ids, *rest: read.append(len(ids)) or forward(ids, *rest))
    shared = [5, 30, 0, 5]  # of prompts of 7, 31, 19 and 40 tokens
    for tokens_read in (7 + 31 + 19 + 40, 2 + 1 + 19 + 35):
        read.clear()
        assert write(decoder, PROMPTS, NAMES, shared=shared) == expected and read[0] == tokens_read
    other = write(decoder, PROMPTS[:1], ["two"], shared=[5])
    assert other == write(PackedDecoder(tuned()), PROMPTS[:1], ["two"]) and read[-1] == 1
    monkeypatch.setattr(decoding, "PREFIXES", 2)
    assert write(decoder, PROMPTS, NAMES, shared=shared) == expected and len(decoder._prefixes) == 2


@pytest.mark.parametrize("slots", [1, 2, 9])
def test_what_prompts_of_one_adapter_have_in_common_is_read_once(monkeypatch, slots):
    """Two articles, three and two styles each, under two adapters: the same tokens as each prompt alone."""
    draw = lambda n, seed: torch.randint(0, 256, (n,), generator=torch.Generator().manual_seed(seed)).tolist()  # noqa: E731
    first, second = draw(60, 1), draw(45, 2)
    prompts = [[*first, *draw(n, 10 + n)] for n in (3, 9, 5)] + [[*second, *draw(n, 20 + n)] for n in (4, 6)] * 2
    names = ["one", "one", "one", "one", "one", "two", "two"]
    alone = [write(PackedDecoder(tuned()), [p], [n])[0] for p, n in zip(prompts, names, strict=True)]
    decoder, read, shares = PackedDecoder(tuned()), [], []
    forward = decoder._forward
    monkeypatch.setattr(decoder, "_forward", lambda ids, *rest: read.append(len(ids)) or forward(ids, *rest))
    rows = [[] for _ in prompts]

    def choose(logits, which):
        chosen = logits.argmax(dim=-1).tolist()
        for row, token in zip(which, chosen, strict=True):
            rows[row].append(token)
        return chosen

    decoder.decode(prompts, names, choose, END, 20, lambda: False, slots, None, shares.append)
    assert rows == alone
    steps = sum(len(row) - 1 for row in alone)  # each written token but the last is read, too
    assert sum(read) == 60 + 3 + 9 + 5 + 2 * (45 + 4 + 6) + steps
    assert shares == sorted(shares) and shares[0] == 0 and 0.8 < shares[-1] <= 1


def test_rows_that_end_leave_the_batch_and_do_not_disturb_the_others(expected):
    end = expected[1][5]  # row 1 ends there at the latest, others wherever they have it
    cut = [row[: row.index(end) + 1] if end in row else row for row in expected]
    assert len({len(row) for row in cut}) > 1
    assert write(PackedDecoder(tuned()), PROMPTS, NAMES, end=end) == cut


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
def test_where_a_row_ends_the_next_begins(expected, slots):
    end = expected[1][5]
    cut = [row[: row.index(end) + 1] if end in row else row for row in expected]
    order = [3, 1, 0, 2, 1]
    rows = write(PackedDecoder(tuned()), [PROMPTS[i] for i in order], [NAMES[i] for i in order], end=end, slots=slots)
    assert rows == [cut[i] for i in order]


def test_one_adapter_for_all_rows_and_none_at_all(expected):
    decoder = PackedDecoder(tuned())
    alone = [write(decoder, [p], [n])[0] for p, n in zip(PROMPTS, NAMES, strict=True)]
    assert alone == expected


def test_hidden_states_are_those_of_peft():
    model = tuned()
    oracle = [as_peft(model, name, ids) for name, ids in zip(NAMES, PROMPTS, strict=True)]
    found = PackedDecoder(tuned()).hidden_states(PROMPTS, NAMES)
    for own, theirs in zip(found, oracle, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=0)


def test_weights_stored_in_bfloat16_give_the_float32_model():
    rounded = tuned(torch.bfloat16)
    decoder = PackedDecoder(tuned(torch.bfloat16))
    oracle = [as_peft(rounded.float(), name, ids) for name, ids in zip(NAMES, PROMPTS, strict=True)]
    for own, theirs in zip(decoder.hidden_states(PROMPTS, NAMES), oracle, strict=True):
        torch.testing.assert_close(own, theirs, atol=1e-4, rtol=0)


@pytest.mark.skipif("fbgemm" not in torch.backends.quantized.supported_engines, reason="needs an x86 CPU")
def test_half_weights_are_the_same_numbers():
    exponents = torch.arange(-27, 5).float()
    weight = torch.cat([2**exponents, -(2**exponents) * 1.9921875, torch.zeros(1)]).view(1, -1).bfloat16()
    product = decoding._half_product(weight, torch.tensor([0.1]))
    each = torch.eye(weight.shape[1])
    assert torch.equal(product(each)[:, 0] - torch.tensor(0.1), (weight.float()[0] + 0.1) - 0.1)
    assert torch.equal(decoding._half_product(weight, None)(each)[:, 0], weight.float()[0])
    below = torch.tensor([[1.5 * 2.0**-33]]).bfloat16()
    assert abs(decoding._half_product(below, None)(torch.ones(1, 1)).item() - below.item()) <= 2.0**-35
    assert decoding._half_product(torch.tensor([[64.0]]).bfloat16(), None) is None
    assert decoding._half_product(torch.ones(1, 1), None) is None  # float32 may not survive


def test_tied_embeddings_and_biases():
    config = load_model("tiny", "float32", "cpu").config
    config.tie_word_embeddings = True
    torch.manual_seed(1)
    make = lambda: Qwen2ForCausalLM(config).eval()  # noqa: E731
    model = make()
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(projection.bias)
    oracle = model.generate(input_ids=torch.tensor([PROMPTS[1]]), max_new_tokens=12, do_sample=False)
    assert write(PackedDecoder(model), [PROMPTS[1]], ["base"], tokens=12)[0] == oracle[0, len(PROMPTS[1]) :].tolist()


def test_check_ends_it_between_layers_and_between_tokens():
    decoder, calls = PackedDecoder(tuned()), iter(range(100))
    assert write(decoder, PROMPTS, NAMES, check=lambda: next(calls) == 1) == [[], [], [], []]
    calls = iter(range(100))  # two layers, then a call before each token
    assert [len(row) for row in write(decoder, PROMPTS, NAMES, check=lambda: next(calls) == 5)] == [3, 3, 3, 3]


@pytest.mark.parametrize("kind", ["dora", "bias", "head", "sliding", "gelu", "rope"])
def test_what_it_does_not_compute_does_not_fit(kind):
    assert PackedDecoder.fits(tuned())
    if kind == "dora":
        model = tuned(use_dora=True)
    elif kind == "bias":
        model = tuned(lora_bias=True)
    else:
        model = tuned()
        base = model.get_base_model()
        if kind == "head":
            base.lm_head = get_peft_model(
                torch.nn.Sequential(base.lm_head), LoraConfig(target_modules=["0"])
            ).base_model.model[0]
        base.config.hidden_act = "gelu" if kind == "gelu" else "silu"
        base.config.layer_types = ["sliding_attention"] * 2 if kind == "sliding" else base.config.layer_types
        if kind == "rope":
            base.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not PackedDecoder.fits(model)
