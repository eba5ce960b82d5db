"""Rows with shared prefixes: the same hidden states, losses and gradients as separate rows."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from tkpo.causal_lm import patch
from tkpo.encoding import TKPOCollator
from tkpo.errors import TKPOError
from tkpo.settings import TKPOSettings
from tkpo.shared_prefix import SharedPrefixDataset, collate, group_by_prefix, shared_length

TERMS = ("loss", "cross_entropy", "preference", "contrast", "reward", "accuracy")
SFT = {"preference_weight": 0.0}
TKPO = {"sampler": "topk", "num_rejects": 5}
CONTRAST = {"preference_weight": 0.0, "contrast_weight": 0.7, "contrast_beta": 0.3}
BOTH = {**TKPO, "contrast_weight": 0.7, "contrast_positions": "total_variation"}
METHODS = {"sft": SFT, "tkpo": TKPO, "contrast": CONTRAST, "both": BOTH}


def sample(prompt, response, flipped=None):
    """An encoded row, flipped too if a flipped prompt is given."""
    row = {"input_ids": prompt + response, "labels": [-100] * len(prompt) + response}
    if flipped:
        row |= {"flipped_input_ids": flipped + response, "flipped_labels": [-100] * len(flipped) + response}
    return row


@pytest.fixture
def articles():
    """Three groups of samples: four styles of a long article, two of a short one, a lone sample."""
    rng = random.Random(0)

    def ids(count):
        return [rng.randrange(5, 100) for _ in range(count)]

    groups = []
    for length, styles in ((40, 4), (9, 2), (17, 1)):
        article, end = ids(length), ids(3)
        # phrases of one to three tokens, as English ones are, and responses of unequal length
        phrases = [ids(1 + style % 3) for style in range(styles + 1)]
        groups.append(
            [sample(article + phrases[s] + end, ids(2 + 3 * s), article + phrases[s + 1] + end) for s in range(styles)]
        )
    return groups


@pytest.fixture
def model(tiny_model, monkeypatch):
    def norm(self, states):  # transformers' own rounds to float32 on the way
        variance = states.pow(2).mean(-1, keepdim=True)
        return self.weight * states * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", norm)

    def make(settings, dtype=torch.float64, lora=False, **config):
        model = tiny_model().to(dtype).train()
        for name, value in config.items():
            setattr(model.config, name, value)
        patch(model, TKPOSettings(**settings))
        if lora:
            torch.manual_seed(0)
            options = {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_lora_weights": False}
            model = get_peft_model(model, LoraConfig(**options)).to(dtype)
        return model

    return make


def without_flips(groups):
    return [[{k: v for k, v in row.items() if not k.startswith("flipped")} for row in group] for group in groups]


def run(model, batch):
    """(terms, gradients) of one step."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    terms = {name: float(getattr(output, name).detach()) for name in TERMS}
    return terms, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, tolerance):
    assert found[0] == pytest.approx(expected[0], abs=tolerance)
    assert found[1].keys() == expected[1].keys() and expected[1]
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= tolerance * max(1, gradient.abs().max()), name


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("method", METHODS)
def test_a_shared_row_is_separate_rows(articles, model, method, lora):
    """Several articles a batch, prefixes of unequal length, a group of one; every term, every gradient, float64."""
    groups = without_flips(articles) if method == "sft" else articles
    rows = [row for group in groups for row in group]
    separate = run(model(METHODS[method], lora=lora), TKPOCollator(0)(rows))
    shared = run(model(METHODS[method], lora=lora), collate([groups]))
    assert_same(shared, separate, 1e-9)
    assert separate[0]["cross_entropy"] > 0.1
    assert method == "sft" or separate[0]["preference"] + separate[0]["contrast"] > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_float32(articles, model, method):
    groups = without_flips(articles) if method == "sft" else articles
    rows = [row for group in groups for row in group]
    separate = run(model(METHODS[method], torch.float32), TKPOCollator(0)(rows))
    assert_same(run(model(METHODS[method], torch.float32), collate([groups])), separate, 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_reads_the_prefixes_anew_and_gives_the_same(articles, model, method):
    groups = without_flips(articles) if method == "sft" else articles
    checkpointed = model(METHODS[method])
    checkpointed.gradient_checkpointing_enable()
    assert_same(run(checkpointed, collate([groups])), run(model(METHODS[method]), collate([groups])), 1e-9)


def test_on_a_cpu_prefixes_and_branches_are_attended_apart(articles, model, monkeypatch):
    """No product between two branches or two articles is computed."""
    model, sizes, plain = model(SFT), [], torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, *args, **kwargs):
        sizes.append((query.shape[2], key.shape[2]))
        return plain(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    model(**collate([without_flips(articles[1:2])]))
    prefix, *tails = 9, *(len(row["input_ids"]) - 9 for row in articles[1])
    layer = [(prefix, prefix), *((tail, prefix + tail) for tail in tails)]
    assert sizes == layer * 2


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_other_attentions_take_the_mask(articles, model, attention):
    """FlexAttention has no backward pass on a CPU and no float64: its losses alone, in float32."""
    dtype = torch.float64 if attention == "eager" else torch.float32
    expected, other = model(TKPO, dtype), model(TKPO, dtype)
    other.set_attn_implementation(attention)
    if attention == "eager":  # its softmax is float32
        return assert_same(run(other, collate([articles])), run(expected, collate([articles])), 1e-6)
    with torch.no_grad():
        found, wanted = other(**collate([articles])), expected(**collate([articles]))
    for name in TERMS:
        assert float(getattr(found, name)) == pytest.approx(float(getattr(wanted, name)), abs=1e-4)


def test_an_attention_that_cannot_take_the_mask_is_refused(articles, model):
    model = model(SFT)
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(TKPOError, match="flash_attention_2"):
        model(**collate([without_flips(articles)]))


def test_sliding_windows_are_refused(articles, model):
    model = model(SFT)
    model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(TKPOError, match="full attention"):
        model(**collate([without_flips(articles)]))


def test_a_branch_does_not_see_its_neighbours(articles, model):
    """Another branch's text changes no loss but its own: the row's loss changes by the changed sample's share."""
    model = model(SFT)
    groups = without_flips(articles)
    changed = copy.deepcopy(groups)
    changed[0][1] = sample(groups[0][1]["input_ids"][:-8], [7, 8, 9, 10, 11])

    def losses(groups):
        return [float(model(**TKPOCollator(0)([row])).cross_entropy) for group in groups for row in group]

    before, after = (float(model(**collate([g])).cross_entropy) for g in (groups, changed))
    expected = (sum(losses(changed)) - sum(losses(groups))) / 7
    assert abs(expected) > 1e-3 and after - before == pytest.approx(expected, abs=1e-9)


# ---- grouping


def test_samples_are_grouped_by_what_they_share(articles):
    rows = [row for group in articles for row in group]
    order = list(range(len(rows)))
    random.Random(1).shuffle(order)
    groups = group_by_prefix([rows[i] for i in order], 8)
    found = {frozenset(order[i] for i in group) for group in groups}
    assert found == {frozenset({0, 1, 2, 3}), frozenset({4, 5}), frozenset({6})}


def test_a_common_system_prompt_makes_no_group():
    head = list(range(20))
    rows = [sample(head + [50 + i] * 30, [1, 2]) for i in range(3)]
    assert group_by_prefix(rows, 4) == [[0], [1], [2]]


def test_samples_that_share_most_are_joined_first():
    """Two topics under a long common head: each topic's three styles, not the first four samples in order."""
    head, topics = list(range(100, 140)), ([1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8, 9])
    rows = [sample([*head, *topic, 50 + style, 60], [70]) for topic in topics for style in range(3)]
    assert group_by_prefix(rows, 4) == [[0, 1, 2], [3, 4, 5]]


def test_the_same_prompt_with_several_responses_is_a_group():
    prompt = list(range(10))
    rows = [sample(prompt, [20 + i]) for i in range(3)]
    assert group_by_prefix(rows, 4) == [[0, 1, 2]]
    assert shared_length(rows) == 9  # the last token of the prompt predicts each response


def test_micro_batches_hold_whole_groups_and_at_most_so_many_samples(articles):
    rows = [row for group in articles for row in group]
    batches = SharedPrefixDataset(rows, 4)
    assert [[len(group) for group in batches[i]] for i in range(len(batches))] == [[4], [2, 1]]
    assert [[len(group) for group in batch] for batch in SharedPrefixDataset(rows, 3)] == [[3], [1, 2], [1]]
    with pytest.raises(TKPOError, match="micro-batch-size"):
        SharedPrefixDataset(rows, 1)


def test_a_row_has_each_prefix_once(articles):
    batch = collate([articles])
    shared = [shared_length(group) for group in articles]
    assert shared == [40, 9, 17]
    tails = sum(len(row["input_ids"]) - s for group, s in zip(articles, shared, strict=True) for row in group)
    assert batch["input_ids"].shape == (1, sum(shared) + tails)
    assert int((batch["branch_ids"] == 0).sum()) == sum(shared)
    assert batch["position_ids"].max() == max(len(row["input_ids"]) for row in articles[0]) - 1
