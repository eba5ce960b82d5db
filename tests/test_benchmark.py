"""The benchmarks: the plain loss against the fused one, a small real run of two processes, and of decoding."""

import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_adapters import random_adapter

from paper import benchmark, benchmark_decoding, benchmark_ideas
from tkpo.loss import tkpo_loss
from tkpo.presets import default_dtype

ROOT = Path(__file__).parent.parent


def test_the_plain_loss_is_the_fused_one_where_nothing_is_left_to_chance():
    """With all other tokens as rejects, the draw is the same set every time."""
    torch.manual_seed(0)
    vocabulary, size, length, added = 9, 4, 7, 2
    weight = torch.randn(vocabulary, size)
    hidden, flipped = torch.randn(1, length, size), torch.randn(1, length + added, size)
    response = torch.tensor([3, 0, 8])
    labels, flipped_labels = torch.full((1, length), -100), torch.full((1, length + added), -100)
    labels[0, -3:] = flipped_labels[0, -3:] = response
    hidden.requires_grad_()
    plain = benchmark.plain_loss(
        (hidden @ weight.T)[0], labels[0], (flipped @ weight.T)[0], flipped_labels[0], vocabulary - 1
    )
    (plain_grad,) = torch.autograd.grad(plain, hidden)
    rejects = torch.tensor([[v for v in range(vocabulary) if v != gold] for gold in response.tolist()])
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    fused = tkpo_loss(hidden, shifted, weight, rejects).loss
    (fused_grad,) = torch.autograd.grad(fused, hidden)
    torch.testing.assert_close(plain, fused)
    torch.testing.assert_close(plain_grad, fused_grad)


def test_rejects_of_the_plain_loss_come_from_the_flipped_response_positions():
    vocabulary, gold, reject = 6, 2, 4
    logits = torch.zeros(3, vocabulary)
    labels = torch.tensor([-100, -100, gold])
    flipped = torch.full((5, vocabulary), -50.0)
    flipped[3, reject] = 50.0  # the position that predicts the response in the longer, flipped sequence
    flipped_labels = torch.tensor([-100] * 4 + [gold])
    logits[1, reject] = 3.0
    found = benchmark.plain_loss(logits, labels, flipped, flipped_labels, 1)
    p = logits[1].double().softmax(-1)
    r = (p[gold] / 0.15).exp() / ((p[gold] / 0.15).exp() + (p[reject] / 0.15).exp())
    assert found.item() == pytest.approx((-p[gold].log() - 0.5 * r.log()).item(), rel=1e-5)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the command writes for the tiny model, TKPO beside the plain form."""
    folder = tmp_path_factory.mktemp("benchmark")
    flags = ["--model", "tiny", "--steps", "2", "--threads", "1", "--rivals", "tkpo_plain", "--output", str(folder)]
    done = subprocess.run(
        [sys.executable, "paper/benchmark.py", *flags], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "tiny-lora.json").read_text()), done.stdout


def test_simpo_and_orpo_are_timed_as_well(tmp_path):
    flags = ["--model", "tiny", "--steps", "1", "--warmup", "0", "--threads", "1", "--output", str(tmp_path)]
    command = [sys.executable, "paper/benchmark.py", *flags, "--rivals", "simpo", "orpo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "tiny-lora.json").read_text())
    assert [(m["key"], m["error"]) for m in found["methods"]] == [("simpo", None), ("orpo", None), ("tkpo", None)]
    assert all(ratio > 0 for ratio in found["ratios"].values())


def test_a_run_times_both_on_the_same_samples(result):
    found, printed = result
    methods = {m["key"]: m for m in found["methods"]}
    assert list(methods) == ["tkpo", "tkpo_plain"] and not any(m["error"] for m in methods.values())
    own, plain = methods["tkpo"], methods["tkpo_plain"]
    assert len(own["steps"]) == len(plain["steps"]) == 2 == len(found["samples"])
    assert found["ratios"]["tkpo/tkpo_plain"] == pytest.approx(
        statistics.median(a / b for a, b in zip(own["steps"], plain["steps"], strict=True)), rel=1e-2
    )
    # Same samples and seed, other draws of reject tokens: the losses lie close together.
    assert own["loss_first"] == pytest.approx(plain["loss_first"], rel=0.02)
    assert found["versions"]["torch"] == torch.__version__ and found["machine"]["threads"] == 1
    for name in (own["label"], plain["label"], found["model"]):
        assert name in printed


def test_the_table_of_an_earlier_result(result, tmp_path, capsys):
    found, _ = result
    found["methods"].append({"key": "dpo", "label": "DPO (TRL)", "error": "it was ill"})
    path = tmp_path / "x.json"
    path.write_text(json.dumps(found))
    assert benchmark.main(["--table", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| DPO (TRL) | it was ill |" in printed
    assert f"{found['ratios']['tkpo/tkpo_plain']:.2f}" in printed


def test_a_method_whose_process_dies_is_reported_and_not_timed():
    process = benchmark.Process("sft", benchmark.Setup(model="tiny", threads=1))
    os.kill(process._process.pid, signal.SIGKILL)
    assert process.step() == {} and "ended from outside" in process.error
    process.close()


def test_a_method_that_raises_says_where():
    process = benchmark.Process("sft", benchmark.Setup(model="no-such-model", threads=1))
    assert process.receive() == {} and "no-such-model" in process.error
    process.close()


def test_the_loss_head_alone():
    shape = {"vocabulary": 20_000, "hidden": 32, "tokens": 512, "response_tokens": 32}
    found = benchmark.benchmark_head(benchmark.Setup(steps=2, threads=1), shape)
    assert [(m["weight"], m["key"]) for m in found["methods"]] == [
        (weight, kind) for weight in ("frozen", "trained") for kind in ("fused", "plain")
    ]
    assert all(len(m["steps"]) == 2 and min(m["steps"]) > 0 for m in found["methods"])
    assert found["ratios"]["frozen"]["time"] < 0.8 and found["ratios"]["frozen"]["memory"] < 0.5
    assert "fused / plain" in benchmark.table(found)


def test_flags_that_make_no_sense(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--steps", "0"])
    assert "at least 1" in capsys.readouterr().err
    assert benchmark.main(["--model", "tiny", "--steps", "100000"]) == 2
    assert "fewer --steps" in capsys.readouterr().err


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two random adapters of the tiny model that write different text."""
    return {name: random_adapter(tmp_path_factory.mktemp(name), seed) for seed, name in enumerate(("one", "two"))}


def test_decoding_forms_write_the_same_tokens(adapters, tmp_path, capsys):
    named = [f"{name}={folder}" for name, folder in adapters.items()]
    flags = ["--model", "tiny", "--tokens", "8", "--rounds", "2", "--threads", "1", "--output", str(tmp_path)]
    assert benchmark_decoding.main([*flags, "--adapters", *named]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "decoding.json").read_text())
    half = "transformers_bfloat16"
    keys = [key for key in benchmark_decoding.FORMS if key != half or default_dtype("cpu") == torch.bfloat16]
    assert [form["key"] for form in found["forms"]] == keys
    assert all(form["same_tokens"] for form in found["forms"] if form["key"] != half)
    for form in found["forms"]:
        steps = [seconds for run in form["steps"] for seconds in run]
        assert len(steps) == 2 * 7 and form["step_s"] == pytest.approx(statistics.median(steps), abs=1e-4)
        assert form["tokens_per_second"] == pytest.approx(2 / form["step_s"])
        assert form["label"] in printed
    assert [row["rows"] for row in found["products"]] == list(benchmark_decoding.ROWS)


def test_decoding_benchmark_refuses_what_it_cannot_measure(adapters, tmp_path, capsys):
    assert benchmark_decoding.main(["--adapters", "one"]) == 2
    assert "NAME=FOLDER" in capsys.readouterr().err
    assert benchmark_decoding.main(["--adapters", f"one={tmp_path}"]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        benchmark_decoding.main(["--tokens", "1"])
    assert "at least 2" in capsys.readouterr().err


def test_padding_counts_the_columns_of_each_batch():
    one_batch = {row["batch_size"]: row for row in benchmark_ideas.padding([1, 9] * 8, seed=0)}[16]
    assert one_batch["random"] == one_batch["grouped"] == 16 * 9 / 80
    for row in benchmark_ideas.padding([1, 9] * 800, seed=0):  # half of the tokens' places: nearly every batch mixed
        assert 1.65 < row["random"] <= 1.8 and 1 <= row["grouped"] < 1.1


def test_ideas_are_measured_on_a_model(tmp_path, capsys):
    assert benchmark_ideas.main(["--model", "tiny", "--rounds", "2", "--threads", "1", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "ideas.json").read_text())
    assert [len(seconds) for seconds in found["passes"].values()] == [2, 2]
    assert all(len(seconds) == 2 for seconds in found["draws"].values())
    assert found["compile"]["compiled"]["first"] > found["compile"]["plain"]["first"]
    assert "compiled / plain" in printed and "batches of 16" in printed
