"""TKPOTrainer: what it encodes, logs, evaluates, and that a step is the step of the whole batch."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig, LlamaModel

from tkpo.attributes import get_axis
from tkpo.encoding import TKPOCollator, encode_dataset, encode_record
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper
from tkpo.loss import IGNORE_INDEX
from tkpo.training import TKPOConfig, TKPOTrainer

TERMS = ("loss", "cross_entropy", "preference", "reward", "accuracy")


@pytest.fixture
def make_trainer(tiny_model, tiny_tokenizer, samples, tmp_path):
    """A trainer over the samples, deterministic: plain SGD, the five likeliest rejects, one epoch."""

    def make(records=None, eval_dataset=None, model=None, peft_config=None, tokenizer=tiny_tokenizer, **changes):
        args = TKPOConfig(
            **{
                "output_dir": str(tmp_path / "out"),
                "sampler": "topk",
                "num_rejects": 5,
                "optim": "sgd",
                "learning_rate": 0.05,
                "lr_scheduler_type": "constant",
                "max_grad_norm": 0.0,
                "weight_decay": 0.0,
                "num_train_epochs": 1,
                "per_device_train_batch_size": len(samples),
                "per_device_eval_batch_size": len(samples),
                "save_strategy": "no",
                "report_to": [],
                "use_cpu": True,
                "disable_tqdm": True,
                **changes,
            }
        )
        return TKPOTrainer(
            model=model or tiny_model(),
            args=args,
            train_dataset=[s.record for s in samples] if records is None else records,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            peft_config=peft_config,
        )

    return make


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def steps_logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(found, expected, start):
    """Equal to a thousandth of the largest change of each parameter."""
    for name, value in expected.items():
        change = (value - start[name]).abs().max()
        assert (found[name] - value).abs().max() <= 1e-3 * change + 1e-7, name
    assert max((expected[name] - start[name]).abs().max() for name in start) > 1e-3


# ---- samples to tensors


def test_a_record_becomes_prompt_and_response_of_the_chat_template(tiny_tokenizer, samples):
    for sample in samples:
        ids, prompt_length = encode_record(sample.record, tiny_tokenizer, 1024)
        assert ids == sample.prompt + sample.response and prompt_length == len(sample.prompt)


def test_a_published_chinese_record_is_encoded_and_flipped(qwen_tokenizer):
    instruction = "对如下给定文档生成结构化层次化目录。要求：{}。输入：\n"
    record = {"instruction": instruction.format("文学诗意"), "input": "春天来了，花开了。", "output": "一、花开"}
    flipper = PromptFlipper(qwen_tokenizer, get_axis("language_style"))
    row = encode_dataset([record], qwen_tokenizer, flipper, 1024)[0]
    text = qwen_tokenizer.decode(row["input_ids"])
    user = record["instruction"] + "\n" + record["input"]
    assert text.endswith(f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n一、花开<|im_end|>\n")
    answer = [label for label in row["labels"] if label != IGNORE_INDEX]
    assert qwen_tokenizer.decode(answer) == "一、花开<|im_end|>\n"
    assert [label for label in row["flipped_labels"] if label != IGNORE_INDEX] == answer
    assert qwen_tokenizer.decode(row["flipped_input_ids"]) == text.replace("文学诗意", "真实客观")


def test_encoded_rows_and_collated_batches(tiny_tokenizer, samples):
    flipper = PromptFlipper(tiny_tokenizer, get_axis("language_style"))
    rows = list(encode_dataset([s.record for s in samples], tiny_tokenizer, flipper, 1024))
    batch = TKPOCollator(tiny_tokenizer.pad_token_id)(rows)
    for flip, prefix in ((False, ""), (True, "flipped_")):
        for row, sample in zip(rows, samples, strict=True):
            assert (row[prefix + "input_ids"], row[prefix + "labels"]) == sample.row(flip)
        width = max(len(s.row(flip)[0]) for s in samples)
        for i, (ids, labels) in enumerate(s.row(flip) for s in samples):
            fill = width - len(ids)
            assert batch[prefix + "input_ids"][i].tolist() == ids + [tiny_tokenizer.pad_token_id] * fill
            assert batch[prefix + "labels"][i].tolist() == labels + [IGNORE_INDEX] * fill
            assert batch[prefix + "attention_mask"][i].tolist() == [1] * len(ids) + [0] * fill


def test_without_flipper_rows_have_no_flipped_columns(tiny_tokenizer, samples):
    rows = encode_dataset([samples[0].record], tiny_tokenizer, None, 1024)
    assert set(rows.column_names) == {"input_ids", "labels"}
    assert set(TKPOCollator(0)(list(rows))) == {"input_ids", "attention_mask", "labels"}


def test_a_record_that_cannot_fit_is_an_error(make_trainer):
    with pytest.raises(TKPOError, match=r"record 1: does not fit in max_length 20: .* max_length of \d+ takes it"):
        make_trainer(max_length=20)


def test_a_record_without_phrase_is_named(make_trainer, samples):
    records = [samples[0].record, {**samples[1].record, "instruction": "A funny outline.", "id": "sea-2"}]
    with pytest.raises(TKPOError, match=r"record 2 \(sea-2\)"):
        make_trainer(records)
    make_trainer(records, preference_weight=0.0)  # supervised fine-tuning flips nothing
    make_trainer(records, sampler="no_flip")


# ---- loss and gradient accumulation


def test_compute_loss_on_a_collated_batch_is_the_method(make_trainer, tiny_model, samples, by_hand):
    trainer = make_trainer()
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert "flipped_input_ids" in batch
    loss = trainer.compute_loss(trainer.model, batch)
    assert float(loss) == pytest.approx(float(by_hand(tiny_model(), samples)["loss"]), abs=1e-5)


@pytest.mark.parametrize(("per_batch", "accumulate"), [(4, 1), (1, 4), (3, 2)])
def test_one_step_goes_down_the_gradient_of_the_mean_over_sequences(
    make_trainer, tiny_model, samples, by_hand, per_batch, accumulate
):
    """All four samples in one step (3 x 2 leaves the second micro-batch with one), responses of unequal length."""
    model = tiny_model().train()
    start = weights(model)
    by_hand(model, samples)["loss"].backward()
    expected = {name: start[name] - 0.05 * p.grad for name, p in model.named_parameters()}
    trainer = make_trainer(per_device_train_batch_size=per_batch, gradient_accumulation_steps=accumulate)
    trainer.train()
    assert trainer.state.global_step == 1
    assert_same_weights(weights(trainer.model), expected, start)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_accumulated_steps_equal_large_steps_with_an_incomplete_last_group(
    make_trainer, tiny_model, samples, optimizer
):
    """Seven records in steps of 3, 3 and 1."""
    records = [s.record for s in samples + samples[:3]]
    results = []
    for per_batch, accumulate in ((3, 1), (1, 3)):
        trainer = make_trainer(
            records,
            optim=optimizer,
            learning_rate=0.05 if optimizer == "sgd" else 1e-3,
            adam_epsilon=1e-2,  # Adam would blow rounding up where a gradient is nearly zero
            per_device_train_batch_size=per_batch,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        assert trainer.state.global_step == 3
        results.append((weights(trainer.model), steps_logged(trainer)))
    (large, large_logs), (small, small_logs) = results
    assert_same_weights(small, large, weights(tiny_model()))
    for a, b in zip(large_logs, small_logs, strict=True):
        for name in ("loss", "cross_entropy", "preference"):
            assert a[name] == pytest.approx(b[name], abs=1e-4)


# ---- what it logs


def test_logged_terms_are_the_methods(make_trainer, tiny_model, samples, by_hand):
    trainer = make_trainer()
    trainer.train()
    (logged,) = steps_logged(trainer)
    expected = by_hand(tiny_model(), samples)
    for name in TERMS:
        assert logged[name] == pytest.approx(float(expected[name]), abs=1e-4), name
    assert 0 < expected["accuracy"] < 1  # so that equality says something


@pytest.mark.parametrize("changes", [{"reduction": "mean_log", "tau": 0.4}, {"preference_weight": 2.0}])
@pytest.mark.parametrize("logging_steps", [1, 2])
def test_the_logged_loss_is_the_sum_of_its_terms(make_trainer, changes, logging_steps):
    trainer = make_trainer(
        per_device_train_batch_size=1, gradient_accumulation_steps=2, logging_steps=logging_steps, **changes
    )
    trainer.train()
    logs = steps_logged(trainer)
    assert len(logs) == 2 // logging_steps
    for entry in logs:
        total = entry["cross_entropy"] + changes.get("preference_weight", 0.5) * entry["preference"]
        assert entry["loss"] == pytest.approx(total, abs=2e-4)
        assert 0 <= entry["accuracy"] <= 1 and 0 < entry["reward"] < 1


def test_supervised_fine_tuning_logs_no_preference(make_trainer, tiny_model, samples, by_hand):
    trainer = make_trainer(preference_weight=0.0, eval_dataset=[s.record for s in samples])
    trainer.train()
    (logged,) = steps_logged(trainer)
    expected = float(by_hand(tiny_model(), samples)["cross_entropy"])
    assert logged["loss"] == pytest.approx(expected, abs=1e-4)
    assert logged["cross_entropy"] == pytest.approx(expected, abs=1e-4)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_cross_entropy"], abs=1e-5)
    for name in ("preference", "reward", "accuracy"):
        assert name not in logged and f"eval_{name}" not in metrics


@pytest.mark.parametrize("eval_batch", [4, 3])
def test_evaluate_gives_the_same_terms_as_means_over_samples(make_trainer, tiny_model, samples, by_hand, eval_batch):
    """In evaluation mode, without gradient, also where the last batch is smaller."""
    trainer = make_trainer(eval_dataset=[s.record for s in samples], per_device_eval_batch_size=eval_batch)
    trainer.model.eval()
    metrics = trainer.evaluate()
    logged = trainer.state.log_history[-1]
    expected = by_hand(tiny_model(), samples)
    for name in TERMS[:3]:
        assert logged[f"eval_{name}"] == pytest.approx(float(expected[name]), abs=1e-4), name
        assert metrics[f"eval_{name}"] == logged[f"eval_{name}"]
    if eval_batch == 4:
        for name in TERMS[3:]:
            assert metrics[f"eval_{name}"] == pytest.approx(float(expected[name]), abs=1e-4), name
    assert_same_weights_exactly(trainer.model, tiny_model())


def assert_same_weights_exactly(a, b):
    for (name, x), (_, y) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.equal(x, y), name


def test_evaluation_amid_training_keeps_the_two_logs_apart(make_trainer, tiny_model, samples, by_hand):
    trainer = make_trainer(
        eval_dataset=[samples[3].record], eval_strategy="steps", eval_steps=1, learning_rate=0.0, num_train_epochs=2
    )
    trainer.train()
    train_terms, eval_terms = by_hand(tiny_model(), samples), by_hand(tiny_model(), samples[3:])
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(steps_logged(trainer)) == len(evaluations) == 2
    for entry in steps_logged(trainer):
        assert entry["cross_entropy"] == pytest.approx(float(train_terms["cross_entropy"]), abs=1e-4)
    for entry in evaluations:
        assert entry["eval_cross_entropy"] == pytest.approx(float(eval_terms["cross_entropy"]), abs=1e-4)


@pytest.mark.parametrize("sampler", ["topk", "no_flip"])
def test_rows_encoded_without_flip_train_and_evaluate(make_trainer, tiny_tokenizer, samples, sampler):
    """With `labels` alone the model flips by itself, or needs no flip."""
    rows = encode_dataset([s.record for s in samples], tiny_tokenizer, None, 1024)
    trainer = make_trainer(rows, eval_dataset=rows, sampler=sampler, learning_rate=0.0)
    trainer.train()
    (logged,) = steps_logged(trainer)
    metrics = trainer.evaluate()
    assert metrics["eval_cross_entropy"] == pytest.approx(logged["cross_entropy"], abs=1e-4)
    if sampler == "topk":
        assert metrics["eval_preference"] == pytest.approx(logged["preference"], abs=1e-4)


# ---- models


def test_training_leaves_a_tkpo_model_that_generates(make_trainer, tiny_tokenizer, samples):
    trainer = make_trainer()
    assert trainer.model.tkpo is not None and type(trainer.model).__name__ == "Qwen2ForCausalLM"
    trainer.train()
    prompt = torch.tensor([samples[0].prompt])
    made = trainer.model.eval().generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert made.shape == (1, prompt.shape[1] + 4)


def test_training_keeps_off_cudnns_attention(make_trainer):
    """Its gradients are NaN for padded batches of some lengths; only a GPU could show that itself."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        make_trainer()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_peft_config_trains_an_adapter_and_nothing_else(make_trainer, tiny_model, tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    trainer = make_trainer(peft_config=config, num_train_epochs=3)
    assert isinstance(trainer.model, PeftModel)
    start = weights(trainer.model)
    trainer.train()
    changed = {name for name, value in weights(trainer.model).items() if not torch.equal(value, start[name])}
    assert changed and all(".lora_" in name for name in changed)
    losses = [entry["loss"] for entry in steps_logged(trainer)]
    assert losses[-1] < losses[0]
    trainer.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)


def test_training_lowers_the_loss(make_trainer):
    trainer = make_trainer(optim="adamw_torch", learning_rate=3e-3, num_train_epochs=8, sampler="multinomial")
    trainer.train()
    first, *_, last = steps_logged(trainer)
    assert last["loss"] < 0.8 * first["loss"]
    assert last["reward"] > first["reward"]


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tau": 0.0}, "tau"),
        ({"num_rejects": 0}, "num_rejects"),
        ({"num_rejects": 259}, "vocabulary has only 259"),
        ({"sampler": "greedy"}, "'greedy'"),
        ({"reduction": "sum"}, "'sum'"),
        ({"preference_weight": -1.0}, "lambda"),
        ({"axis": "tone"}, "no axis 'tone'.*language_style"),
        ({"axes_file": "/nowhere/axes.yaml"}, "/nowhere/axes.yaml"),
        ({"tokenizer": None}, "processing_class"),
    ],
)
def test_bad_settings_are_named(make_trainer, changes, named):
    with pytest.raises(TKPOError, match=named):
        make_trainer(**changes)


def test_models_that_are_no_causal_lm_are_refused(make_trainer):
    config = LlamaConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(TKPOError, match="LlamaModel"):
        make_trainer(model=LlamaModel(config))


# ---- shared prefixes


@pytest.fixture
def styles():
    """Two topics in two styles each, the instruction last, and one topic in one style."""
    return [
        {"instruction": f"Topic: {topic}", "input": f"Outline the above. Requirement: {style}.", "output": output}
        for topic, style, output in (
            ("the sea, its salt and its tides, and who lives by them", "literary", "1. Salt"),
            ("bread and how it rises overnight in a cold kitchen", "objective", "1. Flour\n2. Water"),
            ("the sea, its salt and its tides, and who lives by them", "objective", "1. Tides\n2. Salt\n3. Fish"),
            ("bread and how it rises overnight in a cold kitchen", "literary", "1. It breathes"),
            ("a short walk home after work through the first snow", "literary", "1. White"),
        )
    ]


@pytest.mark.parametrize("losses", [{}, {"preference_weight": 0.0}, {"contrast_weight": 1.0}])
def test_shared_prefixes_train_the_same_weights(make_trainer, tiny_model, styles, losses):
    """One step over all samples: as one micro-batch, and as micro-batches of unequal size."""
    trained = {}
    for name, options in {
        "separate": {"per_device_train_batch_size": 5},
        "shared": {"per_device_train_batch_size": 5, "share_prefix": True},
        "accumulated": {
            "per_device_train_batch_size": 2,
            "share_prefix": True,
            "gradient_accumulation_steps": 3,
        },
    }.items():
        trainer = make_trainer(styles, **losses, **options)
        trainer.train()
        (logged,) = steps_logged(trainer)
        trained[name] = weights(trainer.model), logged["cross_entropy"], logged["loss"]
    for name in ("shared", "accumulated"):
        assert_same_weights(trained[name][0], trained["separate"][0], weights(tiny_model()))
        assert trained[name][1:] == pytest.approx(trained["separate"][1:], abs=1e-4)


def test_shared_prefixes_evaluate_the_same(make_trainer, styles):
    found = {}
    for share in (False, True):
        trainer = make_trainer(styles, styles, share_prefix=share, per_device_eval_batch_size=4)
        found[share] = trainer.evaluate()
    for name in ("eval_cross_entropy", "eval_preference"):
        assert found[True][name] == pytest.approx(found[False][name], abs=1e-5)


def test_more_rejects_than_the_vocabulary_are_refused_by_the_llamafactory_route_too(tiny_model):
    from tkpo.causal_lm import patch
    from tkpo.llamafactory import _Check
    from tkpo.settings import TKPOSettings

    model, settings = tiny_model(), TKPOSettings(num_rejects=259, sampler="no_flip")
    patch(model, settings)
    with pytest.raises(TKPOError, match=r"num_rejects.*259"):
        _Check(settings).on_train_begin(None, None, None, model=model)
