"""The patch on every family: the plain-logits form of the method, in value and gradient, on tiny random models."""

import importlib
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tkpo.causal_lm import has_full_attention, patch
from tkpo.errors import TKPOError
from tkpo.loss import draw_reject_tokens, preference_loss
from tkpo.settings import TKPOSettings

SIZE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# family: what its config needs beside SIZE
FAMILIES = {
    "Qwen2": {},
    "Qwen3": {},
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Phi3": {"original_max_position_embeddings": 128},
    "SmolLM3": {},
    "Olmo2": {},
    "Gemma2": {"final_logit_softcapping": 0.7, "sliding_window": 8},
    "Gemma3": {"final_logit_softcapping": 0.9, "sliding_window": 8},
    "Granite": {"logits_scaling": 3.0},
    "Cohere": {"logit_scale": 0.25},
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    },
}
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}
SETTINGS = {"sampler": "topk", "num_rejects": 4, "contrast_weight": 0.5}


def make(family, tied=False, **changes):
    module = importlib.import_module("transformers")
    config_name, model_name = CLASSES.get(family, (f"{family}Config", f"{family}ForCausalLM"))
    config = getattr(module, config_name)(**{**SIZE, **FAMILIES[family], "tie_word_embeddings": tied, **changes})
    torch.manual_seed(0)
    model = getattr(module, model_name)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)  # peaked distributions, far from uniform and into the soft caps
    return model.train()


def rows(prompts, responses, side):
    width = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    ids, mask, labels = [], [], []
    for prompt, response in zip(prompts, responses, strict=True):
        own = [prompt + response, [1] * (len(prompt) + len(response)), [-100] * len(prompt) + response]
        for column, part, fill in zip((ids, mask, labels), own, (0, 0, -100), strict=True):
            padding = [fill] * (width - len(part))
            column.append(padding + part if side == "left" else part + padding)
    return [torch.tensor(column) for column in (ids, mask, labels)]


@pytest.fixture(params=["right", "left"])
def batch(request):
    """Three samples of unequal length, whose flipped prompts are longer, shorter or as long."""
    start = [5, 6, 7, 8, 9]
    responses = [[11, 12, 13], [14], [15, 16]]
    true = rows([[*start, 20, 3], [*start, 21, 22, 3], [*start, 23, 3]], responses, request.param)
    flipped = rows([[*start, 21, 22, 3], [*start, 20, 3], [*start, 24, 3]], responses, request.param)
    names = ("input_ids", "attention_mask", "labels")
    return {**dict(zip(names, true, strict=True)), **{f"flipped_{n}": x for n, x in zip(names, flipped, strict=True)}}


def by_hand(model, batch, settings):
    """The loss by the model's own logits; the auxiliary loss by the model's own forward."""

    def logits(prefix):
        ids, mask, labels = (batch[prefix + name] for name in ("input_ids", "attention_mask", "labels"))
        return model(input_ids=ids, attention_mask=mask).logits[:, :-1].float(), labels[:, 1:]

    (true, labels), (flipped, flipped_labels) = logits(""), logits("flipped_")
    total = 0
    for row in range(len(labels)):
        at, there = labels[row] != -100, flipped_labels[row] != -100
        gold = labels[row][at]
        ours, theirs = true[row][at].log_softmax(-1), flipped[row][there].log_softmax(-1)
        ce = -ours.gather(-1, gold[:, None]).mean()
        rejects = draw_reject_tokens(theirs[None].detach(), gold[None], settings.num_rejects, "topk")
        preference = preference_loss(ours[None], gold[None], rejects, settings.tau, settings.reduction).sum()
        gap = (ours - theirs).gather(-1, gold[:, None]).sum()
        contrast = -(settings.contrast_beta * gap).sigmoid().log()
        total = total + ce + settings.preference_weight * preference + settings.contrast_weight * contrast
    total = total / len(labels)
    if getattr(model.config, "output_router_logits", False):
        plain = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        total = total + model.config.router_aux_loss_coef * plain.aux_loss
    return total


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, ours, expected):
    found, wanted = gradients(model, ours), gradients(model, expected)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)
    assert found.keys() == wanted.keys() and found
    largest = max(g.abs().max() for g in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_patch_is_the_method_on_plain_logits(family, tied, batch):
    settings, model = TKPOSettings(**SETTINGS), make(family, tied)
    expected = by_hand(model, batch, settings)
    patch(model, settings)
    assert_same(model, model(**batch).loss, expected)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_with_an_adapter_and_gradient_checkpointing(family, checkpointing, batch):
    settings = TKPOSettings(**SETTINGS)
    model = make(family)
    undo = patch(model, settings)
    options = {"r": 2, "target_modules": ["o_proj"], "init_lora_weights": False}
    wrapped = get_peft_model(model, LoraConfig(**options)).train()
    ours = wrapped(**batch).loss
    if checkpointing:
        wrapped.gradient_checkpointing_enable()
        wrapped.enable_input_require_grads()
        ours = wrapped(**batch).loss
    found = gradients(wrapped, ours)
    assert found and all("lora_" in name for name in found)
    undo()
    wrapped.gradient_checkpointing_disable()
    expected = by_hand(wrapped, batch, settings)
    wanted = gradients(wrapped, expected)
    assert float(ours) == pytest.approx(float(expected), rel=1e-5, abs=1e-5)
    largest = max(g.abs().max() for g in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() <= 1e-4 * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_as_the_plain_class_it_is(family, tmp_path):
    model = make(family)
    patch(model, TKPOSettings(**SETTINGS))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [CLASSES.get(family, (0, f"{family}ForCausalLM"))[1]]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(ids).logits, model.eval()(ids).logits)


def test_where_the_flipped_pass_goes_on_from_the_true_ones_keys():
    """Not with sliding windows, whose layers keep only their last tokens."""
    assert all(has_full_attention(make(family)) for family in ("Qwen2", "Llama", "Granite", "Qwen3Moe"))
    assert not has_full_attention(make("Gemma2")) and not has_full_attention(make("Gemma3"))
    assert not has_full_attention(make("Mistral", sliding_window=16))


def test_the_soft_cap_and_the_scale_matter(batch):
    """Heads that the loss did not know would be out of the tolerance above."""
    for family, plain in (("Gemma2", {"final_logit_softcapping": None}), ("Granite", {"logits_scaling": 1.0})):
        settings = TKPOSettings(**SETTINGS)
        losses = [float(by_hand(make(family, **c), batch, settings).detach()) for c in ({}, plain)]
        assert abs(losses[0] - losses[1]) > 1e-2


# ---- what is refused


class ShiftedHead(torch.nn.Linear):
    def forward(self, states):
        return super().forward(states) + 3.0 * torch.arange(self.out_features)


def test_a_head_that_does_more_than_a_product_is_refused_by_name():
    model = make("Llama")
    model.lm_head.__class__ = ShiftedHead
    with pytest.raises(TKPOError, match="LlamaForCausalLM makes its logits otherwise"):
        patch(model, TKPOSettings(**SETTINGS))
    assert "tkpo" not in vars(model) and "forward" not in vars(model)


def test_a_head_with_a_bias_is_refused_by_name():
    module = importlib.import_module("transformers")
    model = module.PhiForCausalLM(module.PhiConfig(**{k: v for k, v in SIZE.items() if k != "head_dim"}))
    with pytest.raises(TKPOError, match="PhiForCausalLM's output head has a bias"):
        patch(model, TKPOSettings(**SETTINGS))


def test_patching_twice_is_refused_and_undo_leaves_nothing(batch):
    model = make("Llama")
    before = set(vars(model))
    undo = patch(model, TKPOSettings(**SETTINGS))
    with pytest.raises(TKPOError, match="patched already"):
        patch(model, TKPOSettings(**SETTINGS))
    undo()
    assert set(vars(model)) == before
    undo()  # does nothing
    assert model(input_ids=batch["input_ids"]).logits is not None
