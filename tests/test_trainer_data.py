"""TKPOTrainer takes what Trainer takes: every kind of data set and arguments, or one clear line."""

import re

import datasets
import pytest
import torch
from transformers import TrainingArguments

from tkpo.errors import TKPOError
from tkpo.training import TKPOConfig, TKPOTrainer

BASICS = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
TERMS = ("cross_entropy", "preference", "reward", "accuracy")


@pytest.fixture
def train(tiny_model, tiny_tokenizer, samples, tmp_path):
    """Makes a trainer on the samples; the loss does not depend on draws."""

    def make(data=None, arguments=None, options=None, **more):
        loss = {"sampler": "topk", "num_rejects": 5}
        args = arguments or TKPOConfig(str(tmp_path / "out"), **{**BASICS, **loss, **(options or {})})
        records = [s.record for s in samples] if data is None else data
        return TKPOTrainer(tiny_model(), args, records, processing_class=tiny_tokenizer, **more)

    return make


def expected(by_hand, model, samples, prefix):
    return {f"{prefix}_{name}": float(value) for name, value in by_hand(model, samples).items()}


def test_eval_sets_by_name_are_evaluated_each_under_its_name(train, tiny_model, samples, by_hand):
    sets = {
        "first": [s.record for s in samples[:2]],
        "rest": datasets.Dataset.from_list([s.record for s in samples[2:]]),
    }
    trainer = train(eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, part in (("first", samples[:2]), ("rest", samples[2:])):
        for key, value in expected(by_hand, tiny_model(), part, f"eval_{name}").items():
            assert metrics[key] == pytest.approx(value, abs=1e-5), key
    given = trainer.evaluate(sets)
    assert {k: given[k] for k in given if k.endswith(TERMS)} == {k: metrics[k] for k in given if k.endswith(TERMS)}


def test_evaluate_and_predict_take_records(train, tiny_model, samples, by_hand):
    trainer = train()
    records = [s.record for s in samples[:3]]
    evaluated = trainer.evaluate(records)
    predicted = trainer.predict(records)
    assert predicted.predictions is None
    for prefix, found in (("eval", evaluated), ("test", predicted.metrics)):
        for key, value in expected(by_hand, tiny_model(), samples[:3], prefix).items():
            assert found[key] == pytest.approx(value, abs=1e-5), key
    again = trainer.evaluate(records)  # a prediction leaves nothing in the next evaluation's means
    assert {k: again[k] for k in again if k.endswith(TERMS)} == {k: evaluated[k] for k in again if k.endswith(TERMS)}


@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_a_stream_trains_like_the_list(train, samples, kind):
    records = [s.record for s in samples]

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(records)

    stream = datasets.Dataset.from_list(records).to_iterable_dataset() if kind == "datasets" else Stream()
    options = {"max_steps": 2, "train_sampling_strategy": "sequential"}
    losses = []
    for data in (stream, records):
        trainer = train(data, options=options)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_plain_training_arguments_keep_what_they_say(train, tmp_path):
    trainer = train(arguments=TrainingArguments(str(tmp_path / "plain"), **{**BASICS, "num_train_epochs": 2}))
    assert isinstance(trainer.args, TKPOConfig)
    assert (trainer.args.learning_rate, trainer.args.per_device_train_batch_size) == (0.05, 2)
    assert (trainer.args.preference_weight, trainer.args.max_length) == (0.5, TKPOConfig.max_length)
    trainer.train()
    assert trainer.state.global_step == 4


BAD = [None, 7, ["list"]]
NAMED = "record 2.*output"


@pytest.mark.parametrize(
    ("case", "part"),
    [
        (lambda make, records: make([]), "train_dataset is empty"),
        (lambda make, records: make(datasets.Dataset.from_list([])), "train_dataset is empty"),
        (lambda make, records: make(eval_dataset=[]), "eval_dataset is empty"),
        (lambda make, records: make(eval_dataset={"mine": []}), r"eval_dataset\['mine'\] is empty"),
        (lambda make, records: make().evaluate([]), "eval_dataset is empty"),
        (lambda make, records: make(["text"]), "record 1: expected an object, found str"),
        (lambda make, records: make("samples.json"), "must be a list or Dataset of records, not str"),
        (lambda make, records: make(datasets.Dataset.from_list(records).to_iterable_dataset()), "max_steps"),
        (
            lambda make, records: make(
                datasets.Dataset.from_list(records).to_iterable_dataset(),
                options={"share_prefix": True, "max_steps": 1},
            ),
            "must not be a stream",
        ),
        (lambda make, records: make(compute_metrics=len), "compute_metrics needs logits"),
        (lambda make, records: make(preprocess_logits_for_metrics=len), "preprocess_logits_for_metrics needs logits"),
        (lambda make, records: make(compute_loss_func=len), "compute_loss_func would replace"),
        (lambda make, records: make(options={"label_smoothing_factor": 0.1}), "label_smoothing_factor"),
        (lambda make, records: make(arguments={"output_dir": "x"}), "args must be a TKPOConfig, not dict"),
        *(
            (lambda make, records, bad=bad: make([records[0], {**records[1], "output": bad}]), "record 2")
            for bad in BAD
        ),
        (lambda make, records: make([records[0], {"instruction": records[1]["instruction"]}]), NAMED),
    ],
)
def test_what_cannot_be_trained_on_is_one_clear_line(train, samples, case, part):
    with pytest.raises(TKPOError) as error:
        case(train, [s.record for s in samples])
    assert re.search(part, str(error.value)) and "\n" not in str(error.value)


def test_a_record_of_a_stream_is_named_by_its_number(train, samples):
    records = [samples[0].record, {**samples[1].record, "instruction": "Outline this."}]
    trainer = train(datasets.Dataset.from_list(records).to_iterable_dataset(), options={"max_steps": 1})
    with pytest.raises(TKPOError, match="record 2 of the stream"):
        trainer.train()
