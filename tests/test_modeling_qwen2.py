"""Qwen2 with the TKPO loss: plain Qwen2 where it should be, the paper's loss where it trains."""

import inspect
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaModel, Qwen2ForCausalLM

from tkpo.attributes import get_axis
from tkpo.causal_lm import patch
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper
from tkpo.loss import IGNORE_INDEX, fused_reject_tokens, tkpo_loss
from tkpo.modeling_qwen2 import TKPOQwen2ForCausalLM, TKPOSettings, patch_qwen2

TERMS = ("loss", "cross_entropy", "preference", "reward", "accuracy")


@pytest.fixture(scope="session")
def flipper(tiny_tokenizer):
    return PromptFlipper(tiny_tokenizer, get_axis("language_style"))


@pytest.fixture
def settings(flipper):
    """Deterministic: the five likeliest rejects."""

    def make(**changes):
        return TKPOSettings(**{"num_rejects": 5, "sampler": "topk", "flipper": flipper, **changes})

    return make


@pytest.fixture
def ours(tiny_model, settings):
    """A TKPO model in training mode."""

    def make(**changes):
        return adopt(tiny_model(), settings(**changes)).train()

    return make


def adopt(model, settings):
    patch(model, settings)
    return model


@pytest.fixture
def patched(settings):
    """Patches Qwen2ForCausalLM until the test ends."""
    undos = []

    def patch(**changes):
        undos.append(patch_qwen2(settings(**changes)))
        return undos[-1]

    yield patch
    for undo in undos:
        undo()


def batch_of(samples, pad_id, side="right", flip=False, prefix=""):
    rows = [sample.row(flip) for sample in samples]
    width = max(len(ids) for ids, _ in rows)
    columns = []
    for ids, labels in rows:
        fill = width - len(ids)
        parts = [(ids, pad_id), ([1] * len(ids), 0), (labels, IGNORE_INDEX)]
        columns.append([[x] * fill + own if side == "left" else own + [x] * fill for own, x in parts])
    names = [prefix + name for name in ("input_ids", "attention_mask", "labels")]
    return {name: torch.tensor(column) for name, column in zip(names, zip(*columns, strict=True), strict=True)}


@pytest.fixture
def batch(samples, tiny_tokenizer):
    def make(chosen=slice(None), side="right", **kw):
        return batch_of(samples[chosen], tiny_tokenizer.pad_token_id, side, **kw)

    return make


def assert_terms(output, expected, tolerance=1e-5):
    for name in TERMS:
        found, wanted = (float(torch.as_tensor(x).detach()) for x in (getattr(output, name), expected[name]))
        assert found == pytest.approx(wanted, abs=tolerance), name


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found, expected, tolerance=1e-4):
    """Relative to each parameter's largest gradient."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() <= tolerance * grad.abs().max(), name


# ---- where it is plain Qwen2


@pytest.mark.parametrize("side", ["left", "right"])
def test_eval_mode_is_plain_qwen2_bit_for_bit(tiny_model, ours, batch, side):
    inputs, model, plain = batch(side=side), ours().eval(), tiny_model()
    with torch.no_grad():
        found, expected = model(**inputs), plain(**inputs)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_without_labels_training_mode_is_plain_qwen2(tiny_model, ours, batch):
    inputs = batch()
    del inputs["labels"]
    found, expected = ours()(**inputs), tiny_model().train()(**inputs)
    assert torch.equal(found.logits, expected.logits) and found.loss is None


def test_without_settings_it_trains_as_plain_qwen2(tiny_model, ours, batch):
    model = ours()
    model.tkpo = None
    found, expected = model(**batch()), tiny_model().train()(**batch())
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.logits, expected.logits)


@pytest.mark.parametrize("mode", ["before training", "after training", "in training mode"])
def test_generate_is_plain_generate(tiny_model, ours, batch, mode):
    model, plain, inputs = ours(), tiny_model(), batch(side="left")
    del inputs["labels"]
    if mode == "after training":
        model(**batch()).loss.backward()
    model.train(mode == "in training mode")
    for limit in ({"attention_mask": inputs["attention_mask"]}, {}):
        ids = inputs["input_ids"] if limit else inputs["input_ids"][:1]
        kw = {"max_new_tokens": 8, "do_sample": False, **limit}
        assert model.generate(ids, **kw).tolist() == plain.generate(ids, **kw).tolist()


def head_widths(model, inputs):
    """For how many positions the head makes logits, call by call, when `model` generates three tokens."""
    widths = []
    hook = model.lm_head.register_forward_hook(lambda _, args, out: widths.append(out.shape[1]))
    model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=3, min_new_tokens=3)
    hook.remove()
    return widths


def test_generate_makes_logits_of_the_last_position_only(tiny_model, ours, batch, patched):
    """As plain Qwen2 does: a prompt's logits would take (length, vocabulary) for nothing."""
    inputs = batch(slice(0, 1))
    assert head_widths(tiny_model(), inputs) == [1, 1, 1]
    assert head_widths(ours().eval(), inputs) == [1, 1, 1]
    patched()
    assert head_widths(tiny_model(), inputs) == [1, 1, 1]


def test_trainers_still_find_the_labels_in_the_signature(ours, patched):
    """Trainer reads forward's signature to find label names and the columns it may keep."""
    plain = list(inspect.signature(Qwen2ForCausalLM.forward).parameters)
    assert set(plain[1:]) <= set(inspect.signature(ours().forward).parameters)
    patched()
    assert set(plain) <= set(inspect.signature(Qwen2ForCausalLM.forward).parameters)


def test_saved_model_loads_as_plain_qwen2(tiny_model, ours, batch, tmp_path):
    model = ours()
    with torch.no_grad():
        model.lm_head.weight += 0.01
    model.save_pretrained(tmp_path)
    inputs = batch()
    del inputs["labels"]
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
        for loader in (Qwen2ForCausalLM, AutoModelForCausalLM):
            loaded = loader.from_pretrained(tmp_path)
            assert type(loaded) is Qwen2ForCausalLM
            assert torch.equal(loaded(**inputs).logits, expected)
        again = TKPOQwen2ForCausalLM.from_pretrained(tmp_path)
        assert again.tkpo is None and torch.equal(again(**inputs).logits, expected)


def test_saved_config_names_an_architecture_that_other_tools_know(ours, tmp_path):
    """vLLM and llama.cpp's converter look at `architectures`."""
    ours().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]


# ---- the training loss


@pytest.mark.parametrize("reduction", ["log_mean", "mean_log"])
@pytest.mark.parametrize("changes", [{}, {"tau": 0.5, "preference_weight": 2.0, "num_rejects": 9, "chunk_size": 7}])
def test_training_loss_is_the_method_on_plain_logits(tiny_model, ours, batch, samples, by_hand, reduction, changes):
    names = {"preference_weight": "weight", "chunk_size": None}
    formula = {names.get(key, key): value for key, value in changes.items() if names.get(key, key)}
    expected = by_hand(tiny_model(), samples, reduction=reduction, **formula)
    output = ours(reduction=reduction, **changes)(**batch())
    assert_terms(output, expected)
    assert 0 < expected["accuracy"] < 1  # so that equality says something
    assert int(output.num_sequences) == len(samples)
    assert output.logits is None


def test_the_flip_matters(tiny_model, ours, batch, samples, by_hand):
    """A loss whose rejects came from the true prompt would be out of the tolerance above."""
    unflipped = [type(s)(s.record, s.prompt, s.prompt, s.response) for s in samples]
    output = ours()(**batch())
    assert abs(float(by_hand(tiny_model(), unflipped)["preference"]) - float(output.preference)) > 1e-4


def test_training_gradients_are_the_methods(tiny_model, ours, batch, samples, by_hand):
    plain, model = tiny_model().train(), ours()
    expected = gradients(plain, by_hand(plain, samples)["loss"])
    assert_same_gradients(gradients(model, model(**batch()).loss), expected)


def test_a_frozen_head_leaves_the_other_gradients_as_they_are(ours, batch):
    trained, frozen = ours(), ours()
    frozen.lm_head.weight.requires_grad_(False)
    expected = gradients(trained, trained(**batch()).loss)
    del expected["lm_head.weight"]
    assert_same_gradients(gradients(frozen, frozen(**batch()).loss), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_alone_in_a_batch_and_in_all_three_ways_a_sample_counts_the_same(
    tiny_model, ours, batch, samples, by_hand, patched, settings, side
):
    """The flipped phrase has another token length, so flipped rows are padded otherwise than true ones."""
    alone = [by_hand(tiny_model(), [sample]) for sample in samples]
    expected = {name: sum(float(x[name]) for x in alone) / len(alone) for name in TERMS[:3]}
    for number, sample_alone in enumerate(alone):
        assert_terms(ours()(**batch(slice(number, number + 1), side)), sample_alone)

    flipped = batch(side=side, flip=True, prefix="flipped_")
    outputs = {"flips by itself": ours()(**batch(side=side)), "flipped given": ours()(**batch(side=side), **flipped)}
    patched()
    outputs["patched"] = tiny_model().train()(**batch(side=side))
    model, inputs = tiny_model(), batch(side=side)
    outputs["on hidden states"] = tkpo_loss(
        hidden_states(model, inputs),
        shifted(inputs["labels"]),
        model.lm_head.weight,
        fused_reject_tokens(
            hidden_states(model, flipped, "flipped_"),
            shifted(flipped["flipped_labels"]),
            model.lm_head.weight,
            5,
            "topk",
        ),
    )
    for way, output in outputs.items():
        for name in TERMS[:3]:
            assert float(getattr(output, name)) == pytest.approx(expected[name], abs=1e-5), (way, name)


def hidden_states(model, inputs, prefix=""):
    kw = {name: inputs[prefix + name] for name in ("input_ids", "attention_mask")}
    return model.model(**kw).last_hidden_state


def shifted(labels):
    return torch.cat([labels[:, 1:], torch.full((len(labels), 1), IGNORE_INDEX)], dim=1)


def test_flipped_inputs_ask_for_the_loss_in_eval_mode_too(tiny_model, ours, batch, samples, by_hand):
    model = ours().eval()
    with torch.no_grad():
        output = model(**batch(), **batch(flip=True, prefix="flipped_"))
    assert_terms(output, by_hand(tiny_model(), samples))


def test_num_sequences_divides_by_the_whole_step(ours, batch):
    model = ours()
    whole = model(**batch())
    parts = [model(**batch(part), num_sequences=4) for part in (slice(0, 1), slice(1, 4))]
    for name in TERMS[:3]:
        assert sum(float(getattr(p, name)) for p in parts) == pytest.approx(float(getattr(whole, name)), abs=1e-5)


def test_lambda_zero_is_supervised_fine_tuning(tiny_model, ours, batch):
    """transformers' own loss for one sequence, the mean of it over sequences for more; nothing is flipped."""
    model, plain = ours(preference_weight=0.0, flipper=None), tiny_model().train()
    rows = [plain(**batch(slice(i, i + 1))).loss for i in range(4)]
    for i, row in enumerate(rows):
        torch.testing.assert_close(model(**batch(slice(i, i + 1))).loss, row)
    output = model(**batch())
    torch.testing.assert_close(output.loss, sum(rows) / 4)
    assert output.preference == 0
    assert_same_gradients(gradients(model, output.loss), gradients(plain, sum(rows) / 4))


def backbone_passes(model, inputs):
    passes = []
    hook = model.model.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    model(**inputs)
    hook.remove()
    return passes


def test_passes_of_the_backbone(ours, batch):
    """The cost counted in the paper's terms: one pass more, and that without gradient."""
    assert sorted(backbone_passes(ours(), batch())) == [False, True]
    assert backbone_passes(ours(preference_weight=0.0), batch()) == [True]
    assert backbone_passes(ours(sampler="no_flip", flipper=None), batch()) == [True]


def columns_read(model, inputs):
    """Columns of the token ids that the backbone is given, true pass first."""
    read = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    loss = model(**inputs).loss
    hook.remove()
    return read, loss


def test_what_stands_before_the_attribute_is_read_once(ours, batch):
    """Losses and gradients are those of a model that reads it in both passes, as checkpointing makes it do."""
    twice = ours()
    twice.gradient_checkpointing_enable()
    for chosen in (slice(None), slice(0, 1), slice(1, 2)):
        inputs = {**batch(chosen), **batch(chosen, flip=True, prefix="flipped_")}
        ids, flipped = inputs["input_ids"].T.tolist(), inputs["flipped_input_ids"].T.tolist()
        common = next(i for i, columns in enumerate(zip(ids, flipped, strict=False)) if columns[0] != columns[1])
        assert common > 5
        model = ours()
        (read, loss), (read_twice, expected) = columns_read(model, inputs), columns_read(twice, inputs)
        assert read == [len(ids), len(flipped) - common]
        assert read_twice == [len(ids), len(flipped)]
        torch.testing.assert_close(loss, expected)
        assert_same_gradients(gradients(model, loss), gradients(twice, expected))


@pytest.mark.parametrize("flip", [False, True])
def test_the_flipped_pass_always_reads_the_response(ours, batch, flip):
    """Also where the flip changes nothing; and all of its prompt where positions are given."""
    inputs = {**batch(slice(0, 1)), **batch(slice(0, 1), flip=flip, prefix="flipped_")}
    twice = ours()
    twice.gradient_checkpointing_enable()
    response = int((inputs["flipped_labels"] != IGNORE_INDEX).sum())
    read, loss = columns_read(ours(), inputs)
    assert read[1] > response
    torch.testing.assert_close(loss, twice(**inputs).loss)
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    read, loss = columns_read(ours(), {**inputs, "position_ids": positions})
    assert read[1] == inputs["flipped_input_ids"].shape[1]
    torch.testing.assert_close(loss, twice(**inputs).loss)


def test_no_flip_draws_from_the_true_prompt(tiny_model, ours, batch):
    model, plain, inputs = ours(sampler="no_flip", flipper=None), tiny_model(), batch()
    torch.manual_seed(3)
    output = model(**inputs)
    torch.manual_seed(3)
    hidden, labels = hidden_states(plain, inputs), shifted(inputs["labels"])
    rejects = fused_reject_tokens(hidden.detach(), labels, plain.lm_head.weight, 5)
    expected = tkpo_loss(hidden, labels, plain.lm_head.weight, rejects)
    for name in TERMS:
        torch.testing.assert_close(getattr(output, name), getattr(expected, name))


def test_default_draws_follow_torchs_seed(ours, batch):
    model = ours(sampler="multinomial")

    def loss(seed):
        torch.manual_seed(seed)
        return float(model(**batch()).loss)

    assert loss(1) == loss(1) != loss(2)


def test_gradient_checkpointing_gives_the_same_gradients(ours, batch):
    plain, checkpointed = ours(), ours()
    checkpointed.gradient_checkpointing_enable()
    losses = [model(**batch()).loss for model in (plain, checkpointed)]
    torch.testing.assert_close(*losses)
    assert_same_gradients(gradients(checkpointed, losses[1]), gradients(plain, losses[0]))


def test_bfloat16_stays_near_float32(tiny_model, settings, batch):
    expected = adopt(tiny_model(), settings()).train()(**batch(slice(3, 4)))
    output = adopt(tiny_model(torch.bfloat16), settings()).train()(**batch(slice(3, 4)))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert float(output.cross_entropy) == pytest.approx(float(expected.cross_entropy), rel=0.05)
    assert float(output.loss) == pytest.approx(float(expected.loss), rel=0.05)


def lora(model, **kw):
    """An adapter whose B matrices are not zero, the same each time."""
    torch.manual_seed(0)
    made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **kw))
    return made.train()


def test_lora_trains_its_adapters_only_and_by_the_same_loss(tiny_model, ours, batch, samples, by_hand):
    model, plain = lora(ours()), lora(tiny_model())
    output = model(**batch())
    expected = by_hand(plain, samples)
    assert_terms(output, expected)
    found = gradients(model, output.loss)
    assert found and all(".lora_" in name for name in found)
    assert_same_gradients(found, gradients(plain, expected["loss"]))


def test_lora_on_the_head_is_refused_or_trained(tiny_model, settings, batch, samples, by_hand):
    """The loss reads the head's weight, not its output: an adapter on it must not be passed over in silence."""

    def on_head(model):
        torch.manual_seed(0)
        return get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).train()

    model = on_head(adopt(tiny_model(), settings()))
    try:
        output = model(**batch())
    except TKPOError as error:
        assert "lm_head" in str(error)
    else:
        assert_terms(output, by_hand(on_head(tiny_model()), samples))


def test_a_head_that_peft_trains_in_full_counts(tiny_model, settings, batch, samples, by_hand):
    config = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    model = get_peft_model(adopt(tiny_model(), settings()), LoraConfig(**config)).train()
    plain = get_peft_model(tiny_model(), LoraConfig(**config)).train()
    expected = by_hand(plain, samples)
    output = model(**batch())
    assert_terms(output, expected)
    names = [name for name, p in model.named_parameters() if "lm_head" in name and p.requires_grad]
    found, wanted = gradients(model, output.loss), gradients(plain, expected["loss"])
    assert names and all(name in found for name in names)
    assert_same_gradients({n: found[n] for n in names}, {n: wanted[n] for n in names})


def test_lora_with_gradient_checkpointing(ours, batch):
    plain, checkpointed = lora(ours()), lora(ours())
    checkpointed.gradient_checkpointing_enable()
    checkpointed.enable_input_require_grads()
    expected = gradients(plain, plain(**batch()).loss)
    assert_same_gradients(gradients(checkpointed, checkpointed(**batch()).loss), expected)


# ---- the patch


def test_patch_gives_the_loss_of_the_class_and_its_undo_the_old_forward(tiny_model, ours, batch, patched):
    original, names = Qwen2ForCausalLM.forward, set(vars(Qwen2ForCausalLM))
    early = tiny_model().train()
    expected = ours()(**batch())
    undo = patched()
    for model in (early, tiny_model().train()):
        output = model(**batch())
        for name in TERMS:
            assert torch.equal(getattr(output, name), getattr(expected, name))
    assert early.accepts_loss_kwargs is False
    assert ours()(**batch()).loss == expected.loss  # the class, under the patch
    with pytest.raises(TKPOError, match="patched already"):
        patched()
    undo()
    assert Qwen2ForCausalLM.forward is original
    assert set(vars(Qwen2ForCausalLM)) == names
    undo()  # does nothing
    assert Qwen2ForCausalLM.forward is original
    assert torch.equal(early(**batch()).logits, tiny_model().train()(**batch()).logits)


def test_patched_models_evaluate_and_generate_as_plain_ones(tiny_model, batch, patched):
    inputs, model = batch(side="left"), tiny_model()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        expected = model(**inputs)
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        patched()
        found = model(**inputs)
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), tokens)


def test_a_second_undo_leaves_a_later_patch_alone(patched, tiny_model):
    first = patched()
    first()
    patched()
    later = Qwen2ForCausalLM.forward
    first()
    assert Qwen2ForCausalLM.forward is later


def test_patch_without_flipper_is_refused_where_it_needs_one(settings):
    forward = Qwen2ForCausalLM.forward
    with pytest.raises(TKPOError, match="flipper"):
        patch_qwen2(settings(flipper=None))
    assert Qwen2ForCausalLM.forward is forward
    for changes in ({"preference_weight": 0.0}, {"sampler": "no_flip"}):
        patch_qwen2(settings(flipper=None, **changes))()
    assert Qwen2ForCausalLM.forward is forward


# ---- what is refused


def test_models_that_are_no_causal_lm_are_refused(settings):
    config = LlamaConfig(vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(TKPOError, match="LlamaModel"):
        patch(LlamaModel(config), settings())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tau": 0.0}, "tau"),
        ({"tau": float("nan")}, "tau"),
        ({"num_rejects": 0}, "num_rejects"),
        ({"preference_weight": -0.1}, "lambda"),
        ({"sampler": "greedy"}, "'greedy'.*multinomial.*no_flip"),
        ({"reduction": "sum"}, "'sum'.*log_mean, mean_log"),
    ],
)
def test_bad_settings_are_named(settings, changes, named):
    with pytest.raises(TKPOError, match=named):
        settings(**changes)


def test_inputs_it_cannot_train_from_are_refused(ours, batch):
    inputs = batch(slice(0, 1))
    length = inputs["input_ids"].shape[1]
    with pytest.raises(TKPOError, match="packing"):
        ours()(**{**inputs, "attention_mask": torch.ones(1, 1, length, length)})
    with pytest.raises(TKPOError, match="input_ids"):
        ours()(inputs_embeds=torch.zeros(1, length, 64), labels=inputs["labels"])
    with pytest.raises(TKPOError, match="flipper"):
        ours(flipper=None)(**inputs)


def test_a_prompt_without_phrase_is_refused_by_its_row(ours, batch, tiny_tokenizer):
    ids = torch.tensor([tiny_tokenizer("a funny outline", add_special_tokens=False)["input_ids"]])
    labels = torch.cat([torch.full_like(ids[:, :-1], IGNORE_INDEX), ids[:, -1:]], dim=1)
    with pytest.raises(TKPOError, match="row 0 of the batch"):
        ours()(input_ids=ids, labels=labels)
