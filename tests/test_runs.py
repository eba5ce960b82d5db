"""Training runs on the preset tiny: what a run leaves behind, and that a killed one ends like one left in peace."""

import itertools
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from tkpo import runs
from tkpo.adapters import adapter_folder, check_base
from tkpo.attributes import get_axis
from tkpo.data import annotate, make_record
from tkpo.encoding import encode_record
from tkpo.errors import TKPOError
from tkpo.methods import CONTINUED, PAIRWISE
from tkpo.presets import load_tokenizer, resolve_model
from tkpo.runs import RunConfig, last_checkpoint, run

ROOT = Path(__file__).parents[1]
METHODS = ("sft", "tkpo", "dpo", "simpo", "orpo")
STEPS = 12  # 12 samples in batches of 2, twice
TOPICS = ("Moss after rain", "A clock in the attic", "Why bread rises", "The night bus", "Salt roads", "Owls in town")
OUTLINES = {
    "literary": "1. {} wakes\n2. The long breath\n3. What the dark kept",
    "objective": "1. Definition of {}\n2. Causes\n3. Measurements\n4. Results",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the data files, and a cache of its own for the tiny model."""
    folder = tmp_path_factory.mktemp("runs")
    axis, samples, pairs = get_axis("language_style"), [], []
    for number, topic in enumerate(TOPICS):
        for attribute, other in axis.flip.items():
            record = {**make_record(axis, attribute, topic), "id": f"t{number}"}
            chosen, rejected = (OUTLINES[a].format(topic) for a in (attribute, other))
            samples.append({**record, "output": chosen})
            pairs.append({**record, "chosen": chosen, "rejected": rejected})
    (folder / "samples.json").write_text(json.dumps(samples))
    (folder / "pairs.json").write_text(json.dumps(pairs))
    (folder / "one.json").write_text(json.dumps(samples[:1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TKPO_CACHE", str(folder / "cache"))
        resolve_model("tiny", progress=False)
        yield folder


def config(home, method, output, **changes):
    """A run of `method` into `home/output`; dpo and simpo continue the finished run `home/sft`."""
    values = {
        "method": method,
        "dataset": str(home / ("pairs.json" if method in PAIRWISE else "samples.json")),
        "axis": "language_style",
        "model": "tiny",
        "output": str(home / output),
        "sft_adapter": str(home / "sft") if method in CONTINUED else None,
        "learning_rate": 2e-3,
        "lora_rank": 4,
        "epochs": 2,
        "batch_size": 2,
        "max_length": 2048,
        "save_steps": 3,
        "dtype": "float32",
        "device": "cpu",
    }
    return RunConfig(**{**values, **changes})


@pytest.fixture(scope="module")
def finished(home, killer):
    """The metrics of one run a method, never interrupted."""
    return {method: run(config(home, method, method)) for method in METHODS}


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def losses_of(folder):
    return [(line["step"], line["loss"]) for line in log_of(folder) if "loss" in line]


def weights_of(folder):
    return load_file(folder / "model" / "adapter_model.safetensors")


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# ---- configuration


def test_a_config_is_read_from_yaml_and_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("method: sft\nlearning_rate: 2e-4\nepochs: 3\nmax_samples: 1e2\ngradient_checkpointing: true\n")
    found = RunConfig.load(path, epochs="0.5", seed=7)
    assert (found.method, found.learning_rate, found.epochs, found.seed) == ("sft", 2e-4, 0.5, 7)
    assert found.max_samples == 100 and isinstance(found.max_samples, int)
    assert found.gradient_checkpointing is True
    assert RunConfig.load() == RunConfig()
    (tmp_path / "empty.yaml").write_text("")
    assert RunConfig.load(tmp_path / "empty.yaml") == RunConfig()


def test_defaults_follow_from_the_method_and_the_data_set():
    tkpo, dpo = RunConfig(), RunConfig(method="dpo", sft_adapter="x", seed=3)
    assert (tkpo.learning_rate, dpo.learning_rate) == (2e-4, 1e-5)
    assert RunConfig(finetuning="full").learning_rate == pytest.approx(2e-5)
    assert (tkpo.axis, tkpo.output) == ("language_style", "runs/tkpo-language_style-0")
    assert dpo.output == "runs/dpo-language_style-3"
    assert (tkpo.preference_weight, tkpo.tau, tkpo.num_rejects) == (0.5, 0.15, 20)
    assert (tkpo.sampler, tkpo.reduction) == ("multinomial", "log_mean")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learningrate: 1", ["run.yaml", "'learningrate'", "learning_rate"]),
        ("epochs: many", ["run.yaml", "epochs", "float", "'many'"]),
        ("batch_size: 2.5", ["run.yaml", "batch_size", "int", "2.5"]),
        ("seed: true", ["seed", "int", "True"]),
        ("gradient_checkpointing: 1", ["gradient_checkpointing", "bool"]),
        ("epochs: [1]", ["epochs", "float"]),
        ("batch_size: .inf", ["batch_size", "int"]),
        ("dataset: [a, b]", ["dataset", "str"]),
        ("method: null", ["method", "str", "None"]),
        ("- method", ["run.yaml"]),
        ("method: [", ["run.yaml"]),
        ("method: ppo", ["'ppo'", "sft, tkpo, contrast, dpo, simpo, orpo"]),
        ("finetuning: qlora", ["'qlora'", "lora, full"]),
        ("epochs: 0", ["epochs", "above 0"]),
        ("batch_size: 4\nmicro_batch_size: 3", ["batch_size 4", "3"]),
    ],
)
def test_a_wrong_config_says_what_is_wrong(tmp_path, text, parts):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(TKPOError) as error:
        RunConfig.load(path)
    for part in parts:
        assert part in str(error.value)


def test_a_wrong_override_is_not_blamed_on_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("epochs: 1")
    with pytest.raises(TKPOError) as error:
        RunConfig.load(path, epochs="many")
    assert "run.yaml" not in str(error.value)
    with pytest.raises(TKPOError, match=r"none\.yaml"):
        RunConfig.load(tmp_path / "none.yaml")
    path.write_bytes("# 详细".encode("gbk"))
    with pytest.raises(TKPOError, match=r"run\.yaml"):
        RunConfig.load(path)


# ---- what a run leaves behind


@pytest.mark.parametrize("method", METHODS)
def test_a_run_writes_its_records_and_an_adapter(home, finished, method):
    folder = home / method
    names = {p.name for p in folder.iterdir()}
    assert names == {"config.json", "environment.json", "log.jsonl", "metrics.json", "model"}
    assert json.loads((folder / "config.json").read_text()) == asdict(config(home, method, method))
    versions = json.loads((folder / "environment.json").read_text())
    assert versions["packages"]["torch"] == torch.__version__ and versions["processes"] == 1
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == finished[method]
    assert (metrics["steps"], metrics["samples"]) == (STEPS, len(TOPICS) * 2)
    assert metrics["seconds"] > 0 and metrics["peak_memory_mib"] > 0
    assert metrics["trainable_parameters"] == sum(w.numel() for w in weights_of(folder).values())
    assert [step for step, _ in losses_of(folder)] == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) for _, loss in losses_of(folder))
    assert metrics["train_loss"] == pytest.approx(sum(x for _, x in losses_of(folder)) / STEPS, rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_safetensors_alone_and_names_no_place_of_this_machine(home, finished, method):
    model = home / method / "model"
    names = {p.name for p in model.rglob("*")}
    assert {"adapter_config.json", "adapter_model.safetensors", "tkpo.json"} <= names
    assert not [n for n in names if Path(n).suffix in (".bin", ".pt", ".pth", ".pkl")]
    for text in (model / "adapter_config.json").read_text(), "".join(map(str, weights_of(home / method))):
        assert str(home) not in text and str(Path.home()) not in text and str(ROOT) not in text
    assert json.loads((model / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    note = json.loads((model / "tkpo.json").read_text())
    assert (note["base_model"], note["method"], note["axis"]) == ("tiny", method, "language_style")
    assert len(note["base_model_sha256"]) == 64


def test_the_methods_end_with_different_adapters_that_load(home, finished):
    adapters = {method: weights_of(home / method) for method in METHODS}
    for one, other in itertools.combinations(METHODS, 2):
        assert any(not torch.equal(adapters[one][k], adapters[other][k]) for k in adapters[one])
    base = Qwen2ForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter_folder(home / "tkpo")))
    ids = torch.tensor([[65, 66, 67]])
    with torch.no_grad(), model.disable_adapter():
        plain = model(input_ids=ids).logits
    with torch.no_grad():
        assert not torch.allclose(model(input_ids=ids).logits, plain)


def test_training_lowers_the_loss(home, finished):
    for method in ("sft", "tkpo"):
        losses = [loss for _, loss in losses_of(home / method)]
        assert sum(losses[-4:]) < sum(losses[:4])


def test_tkpo_logs_its_terms_and_sft_only_cross_entropy(home, finished):
    for line in log_of(home / "tkpo")[:STEPS]:
        assert line["loss"] == pytest.approx(line["cross_entropy"] + 0.5 * line["preference"], abs=1e-3)
        assert 0 < line["reward"] < 1 and 0 <= line["accuracy"] <= 1
    for line in log_of(home / "sft")[:STEPS]:
        assert line["loss"] == pytest.approx(line["cross_entropy"], abs=1e-3)
        assert "preference" not in line


@pytest.mark.parametrize("method", ["tkpo", "dpo"])
def test_on_a_bfloat16_base_the_adapter_is_float32_and_its_products_are_bfloat16(home, finished, monkeypatch, method):
    dtypes, linear = set(), torch.nn.functional.linear

    def spy(states, weight, bias=None):
        out = linear(states, weight, bias)
        if 4 in weight.shape:  # the adapter's rank
            dtypes.add((weight.dtype, out.dtype))
        return out

    small = {"max_samples": 4, "epochs": 1}
    run(config(home, method, f"{method}-float32", **small))
    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    run(config(home, method, f"{method}-bfloat16", dtype="bfloat16", **small))
    assert dtypes == {(torch.float32, torch.bfloat16)}
    half, single = losses_of(home / f"{method}-bfloat16"), losses_of(home / f"{method}-float32")
    assert half != single
    assert [loss for _, loss in half] == pytest.approx([loss for _, loss in single], rel=2e-2)


# ---- against transformers and TRL


def test_the_first_sft_loss_is_transformers_own_and_restart_trains_again(home):
    record = json.loads((home / "one.json").read_text())[0]
    once = config(home, "sft", "one", dataset=str(home / "one.json"), batch_size=1, epochs=1)
    run(once)
    tokenizer = load_tokenizer("tiny")
    turns = [{"role": "user", "content": record["instruction"] + "\n" + record["input"]}]
    start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": record["output"]})
    ids = tokenizer(tokenizer.apply_chat_template(turns, tokenize=False), return_tensors="pt").input_ids
    labels = ids.clone()
    labels[:, : len(tokenizer(start).input_ids)] = -100
    model = Qwen2ForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    with torch.no_grad():
        theirs = model(input_ids=ids, labels=labels).loss.item()
    assert log_of(home / "one")[0]["cross_entropy"] == pytest.approx(theirs, abs=2e-6)
    assert log_of(home / "one")[0]["loss"] == pytest.approx(theirs, abs=1e-4)
    (home / "one" / "metrics.json").write_text('{"stale": 1}')
    assert run(once) == {"stale": 1}
    assert run(once, resume=False)["steps"] == 1


def test_dpo_starts_from_the_sft_adapter_against_a_frozen_copy(home, finished):
    assert losses_of(home / "dpo")[0][1] == pytest.approx(math.log(2), abs=1e-4)
    torch.backends.cuda.enable_cudnn_sdp(True)
    run(config(home, "dpo", "dpo-still", learning_rate=1e-30, max_samples=2, epochs=1))
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # on a GPU its gradients may be NaN
    assert_same_weights(weights_of(home / "dpo-still"), weights_of(home / "sft"))


def test_the_first_simpo_and_orpo_losses_are_those_of_their_papers(home, finished):
    """From the plain probabilities of the model a run starts from, on one pair."""
    pair = json.loads((home / "pairs.json").read_text())[0]
    (home / "pair.json").write_text(json.dumps([pair]))
    tokenizer = load_tokenizer("tiny")
    turns = [{"role": "user", "content": pair["instruction"] + "\n" + pair["input"]}]
    start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    def mean_log_probability(model, response, with_prompt=False):
        prompt, whole = (tokenizer(t, return_tensors="pt").input_ids for t in (start, start + response + "<|im_end|>"))
        with torch.no_grad():
            logs = model(input_ids=whole).logits.double().log_softmax(-1)[0, :-1]
        return logs.gather(1, whole[0, 1:, None])[0 if with_prompt else prompt.shape[1] - 1 :].mean().item()

    base = Qwen2ForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    good, bad = (mean_log_probability(base, pair[key]) for key in ("chosen", "rejected"))
    odds = (good - math.log1p(-math.exp(good))) - (bad - math.log1p(-math.exp(bad)))
    options = {"dataset": str(home / "pair.json"), "batch_size": 1, "epochs": 1, "max_samples": 1}
    run(config(home, "orpo", "orpo-one", **options))
    # arXiv 2403.07691, equations 6 and 7; TRL takes the likelihood of the chosen text with its prompt
    orpo = -mean_log_probability(base, pair["chosen"], True) + 0.1 * math.log1p(math.exp(-odds))
    assert losses_of(home / "orpo-one")[0][1] == pytest.approx(orpo, abs=1e-3)

    model = PeftModel.from_pretrained(base, str(adapter_folder(home / "sft"))).eval()
    good, bad = (mean_log_probability(model, pair[key]) for key in ("chosen", "rejected"))
    run(config(home, "simpo", "simpo-one", **options))
    simpo = math.log1p(math.exp(-(2.0 * (good - bad) - 0.5)))  # arXiv 2405.14734, equation 6
    assert losses_of(home / "simpo-one")[0][1] == pytest.approx(simpo, abs=1e-3)


@pytest.mark.parametrize("method", ["sft", "dpo", "orpo"])
def test_validation_logs_the_cross_entropy_of_the_validation_outlines(home, finished, monkeypatch, method):
    """The same number by our trainer and beside TRL's, from a model that has not moved, and no step of training."""
    records = json.loads((home / "samples.json").read_text())
    validation = annotate(records[:3], get_axis("language_style"))
    load = runs.load_records
    monkeypatch.setattr(
        runs,
        "load_records",
        lambda name, split, *more: validation if split == "validation" else load(name, split, *more),
    )
    pairwise = method in PAIRWISE
    rows = json.loads((home / ("pairs.json" if pairwise else "samples.json")).read_text())
    info = {f"style_en_train{'_pairs' if pairwise else ''}": {"file_name": "train.json"}}
    folder = home / f"data-{method}"
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(rows[:4]))
    (folder / "dataset_info.json").write_text(json.dumps(info))
    still = config(
        home,
        method,
        f"{method}-validated",
        dataset="style",
        data_dir=str(folder),
        epochs=1,
        learning_rate=1e-30,
        eval_steps=1,
    )
    run(still)
    found = [
        line["eval_cross_entropy"] for line in log_of(home / f"{method}-validated") if "eval_cross_entropy" in line
    ]
    model = Qwen2ForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    if method in CONTINUED:
        model = PeftModel.from_pretrained(model, str(adapter_folder(home / "sft"))).eval()
    losses = []
    for record in validation:
        ids, length = encode_record(record, load_tokenizer("tiny"), 2048)
        labels = torch.tensor([[-100] * length + ids[length:]])
        with torch.no_grad():
            losses.append(model(input_ids=torch.tensor([ids]), labels=labels).loss.item())
    assert found == pytest.approx([sum(losses) / 3] * 2, abs=1e-4)


# ---- killed and resumed

KILLED = """
import json, os, sys
from tkpo.pairwise import import_trl
from tkpo.runs import RunConfig, run
import_trl("dpo")
while line := sys.stdin.readline():  # a config a line; each run in a process of its own, to be killed
    child = os.fork()
    if not child:
        os.dup2(2, 1)  # the trainer prints its log
        run(RunConfig(**json.loads(line)))
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def killer(home):
    """Starts a run in another process and kills it without warning once it is past its first checkpoint."""
    threads = str(torch.get_num_threads())
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads},
    )

    def kill(config):
        process.stdin.write(json.dumps(asdict(config)) + "\n")
        process.stdin.flush()
        child, log = int(process.stdout.readline()), Path(config.output) / "log.jsonl"
        give_up = time.monotonic() + 240
        while not (last_checkpoint(log.parent) and log.read_text().count("\n") > config.save_steps):
            assert time.monotonic() < give_up, "the run did not reach its first checkpoint"
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert int(process.stdout.readline()) == signal.SIGKILL

    yield kill
    process.kill()
    process.wait()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_ends_like_one_left_in_peace(home, finished, killer, method):
    """Losses of every step and the adapter, bit for bit; no step twice in the log."""
    again = config(home, method, f"{method}-killed")
    folder = Path(again.output)
    killer(again)
    assert not (folder / "metrics.json").exists() and last_checkpoint(folder)
    first = Path(last_checkpoint(folder)).name
    assert first != f"checkpoint-{STEPS}"
    half = folder / f"checkpoint-{STEPS - 1}"  # as if a later one had been cut off while it was written
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": STEPS - 1, "loss": 0.0}) + "\n" + '{"step": 12, "lo')

    metrics = run(again)
    assert losses_of(folder) == losses_of(home / method)
    assert_same_weights(weights_of(folder), weights_of(home / method))
    assert not list(folder.glob("checkpoint-*"))
    steps = [line["step"] for line in log_of(folder)]
    assert steps == [line["step"] for line in log_of(home / method)]
    assert metrics["steps"] == STEPS
    assert metrics["train_loss"] == pytest.approx(finished[method]["train_loss"], rel=1e-6)
    done = STEPS - int(first.split("-")[1])
    assert metrics["seconds_a_step"] == pytest.approx(metrics["seconds"] / done, rel=0.05)


def test_a_run_that_fails_while_it_saves_is_completed(home, monkeypatch):
    once = config(home, "sft", "disk-full", max_samples=2, epochs=1)

    def full(*args):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_save", full)
        with pytest.raises(OSError, match="No space"):
            run(once)
    assert not (home / "disk-full" / "metrics.json").exists()
    assert run(once)["steps"] == 1
    run(config(home, "sft", "disk-fine", max_samples=2, epochs=1))
    assert_same_weights(weights_of(home / "disk-full"), weights_of(home / "disk-fine"))
    assert losses_of(home / "disk-full") == losses_of(home / "disk-fine")


def test_the_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-11" / "adapter_model.safetensors").touch()
    assert last_checkpoint(tmp_path) is None
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


# ---- runs that are refused


def test_a_finished_run_is_not_trained_again(home, finished, monkeypatch, caplog):
    monkeypatch.setattr(runs, "load_model", None)  # would raise if it were called
    with caplog.at_level(logging.WARNING, "tkpo"):
        assert run(config(home, "sft", "sft", save_steps=5)) == finished["sft"]
    assert "finished" in caplog.text


@pytest.mark.parametrize(
    "changes", [{"learning_rate": 0.1}, {"method": "tkpo"}, {"seed": 1}, {"max_samples": 4}, {"lora_rank": 2}]
)
def test_another_config_in_the_same_folder_is_refused(home, finished, changes):
    before = (home / "sft" / "config.json").read_bytes()
    with pytest.raises(TKPOError, match=next(iter(changes))) as error:
        run(config(home, **{"method": "sft", "output": "sft", **changes}))
    assert "--output" in str(error.value) and "--restart" in str(error.value)
    assert (home / "sft" / "config.json").read_bytes() == before


def test_dpo_needs_pairs_and_an_adapter_that_is_there(home, finished):
    with pytest.raises(TKPOError, match=r"samples\.json, record 1: no field 'chosen'"):
        run(config(home, "dpo", "none", dataset=str(home / "samples.json")))
    with pytest.raises(TKPOError, match=r"adapter_config\.json"):
        run(config(home, "dpo", "none", sft_adapter=str(home / "cache")))


def test_sft_needs_outputs(home):
    with pytest.raises(TKPOError, match=r"pairs\.json, record 1: no field 'output'"):
        run(config(home, "sft", "none-sft", dataset=str(home / "pairs.json")))


def test_max_samples_are_the_same_for_every_method():
    def chosen(method, count):
        more = {"sft_adapter": "x"} if method in CONTINUED else {}
        made = RunConfig(method=method, data_dir=str(ROOT / "data"), max_samples=count, **more)
        return [(r["id"], r["attribute"], r["form"]) for r in runs._training_records(made)]

    sft, dpo = chosen("sft", 40), chosen("dpo", 40)
    assert sft == dpo == chosen("tkpo", 40)
    assert len(set(sft)) == 40
    assert chosen("sft", 20) == sft[:20]
    assert {attribute for _, attribute, _ in sft} == {"literary", "objective"}
    assert {name.split("-")[0] for name, _, _ in sft} == {"en", "zh"}
    assert len({name.split("-")[1] for name, _, _ in sft}) > 5  # not the first file's


def test_an_adapter_that_meets_another_base_warns(home, finished, caplog):
    other = home / "other-base"
    shutil.copytree(resolve_model("tiny"), other)
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    adapter = adapter_folder(home / "sft")
    assert adapter == adapter_folder(home / "sft" / "model") == home / "sft" / "model"
    with caplog.at_level(logging.WARNING, "tkpo"):
        check_base(adapter, "tiny")
        assert not caplog.records
        check_base(adapter, str(other))
    assert "tiny" in caplog.text and str(other) in caplog.text


# ---- starts that fail, and outputs that cannot be written


def test_a_start_that_fails_leaves_nothing_that_blocks_the_corrected_command(home, monkeypatch):
    wrong = config(home, "sft", "corrected", max_length=4, max_samples=2, epochs=1)  # no record fits
    with pytest.raises(TKPOError, match="max_length"):
        run(wrong)
    assert not Path(wrong.output).exists()
    with monkeypatch.context() as patch:  # and one that fails in its first step, as for lack of memory
        patch.setattr(runs.TKPOTrainer, "training_step", lambda *args: (_ for _ in ()).throw(MemoryError()))
        with pytest.raises(MemoryError):
            run(config(home, "sft", "corrected", max_samples=2, epochs=1, lora_rank=2))
    assert run(config(home, "sft", "corrected", max_samples=2, epochs=1))["steps"] == 1


def test_a_restart_with_a_wrong_setting_deletes_nothing(home, finished):
    before = {p: p.stat().st_mtime_ns for p in (home / "sft").rglob("*")}
    with pytest.raises(TKPOError, match="max_length"):
        run(config(home, "sft", "sft", max_length=4), resume=False)
    assert {p: p.stat().st_mtime_ns for p in (home / "sft").rglob("*")} == before


def test_a_finished_run_says_that_more_epochs_need_another_start(home, finished):
    with pytest.raises(TKPOError, match=r"finished with epochs 2 .* 5: .*--output.*--restart"):
        run(config(home, "sft", "sft", epochs=5))


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_a_half_written_record_is_named(home, finished, name):
    folder = home / f"half-{name}"
    shutil.copytree(home / "sft", folder)
    (folder / name).write_text((folder / name).read_text()[:30])
    with pytest.raises(TKPOError, match=rf"half-{name}/{name} is damaged.*--restart"):
        run(config(home, "sft", f"half-{name}"))


def test_an_output_that_cannot_be_written_is_named_before_the_training(home, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "load_model", None)  # would raise if it were called
    with pytest.raises(TKPOError, match=r"samples\.json is a file"):
        run(config(home, "sft", "samples.json/below"))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)  # root may write anywhere
    with pytest.raises(TKPOError, match=r"no permission to write in .*locked"):
        run(config(home, "sft", str(locked / "run")))


def test_a_full_disk_is_one_line_and_the_run_can_be_resumed(home):
    """A limit on the size of files stands for it: writing fails within the checkpoint."""
    full = config(home, "sft", "full", max_samples=4, epochs=1, save_steps=1)
    path = home / "full.json"
    path.write_text(json.dumps({k: v for k, v in asdict(full).items() if v is not None}))
    code = """
import resource, sys
import tkpo.runs
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from tkpo.cli import main
sys.exit(main(["train", sys.argv[1]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"tkpo: cannot write to {full.output} (" in done.stderr
    assert run(full)["steps"] == 2


def test_metrics_count_the_samples_that_were_trained_on(home):
    """Those whose article is cut too; one that cannot fit is refused, none is skipped."""
    records = json.loads((home / "samples.json").read_text())[:4]
    records[1]["input"] += " " + "very " * 700
    (home / "long.json").write_text(json.dumps(records))
    assert run(config(home, "sft", "counted", dataset=str(home / "long.json"), epochs=1))["samples"] == 4
    records[1]["instruction"] += " " + "very " * 700
    (home / "long.json").write_text(json.dumps(records))
    with pytest.raises(TKPOError, match=r"record 2 .*A max_length of"):
        run(config(home, "sft", "too-long", dataset=str(home / "long.json"), epochs=1))


def test_every_file_of_a_run_has_the_same_permissions(home, finished):
    for method in METHODS:
        modes = {p.stat().st_mode & 0o777 for p in (home / method).rglob("*") if p.is_file()}
        assert modes == {(home / method / "config.json").stat().st_mode & 0o777}


# ---- what users of trainers expect


def first_pair(home, name, method, **changes):
    pair = json.loads((home / "pairs.json").read_text())[:1]
    (home / "first.json").write_text(json.dumps(pair))
    options = {"dataset": str(home / "first.json"), "batch_size": 1, "epochs": 1, **changes}
    run(config(home, method, name, **options))
    return pair[0], losses_of(home / name)[0][1]


def test_dpo_in_one_stage_has_the_base_as_its_reference(home):
    """Its first loss is log 2; a step later it is the formula, with the base as reference."""
    changes = {"sft_adapter": None, "epochs": 2, "learning_rate": 0.05, "scheduler": "constant", "warmup": 0.0}
    _, loss = first_pair(home, "dpo-base", "dpo", **changes)
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    assert losses_of(home / "dpo-base")[1][1] < 0.99 * math.log(2)
    note = json.loads((home / "dpo-base" / "model" / "tkpo.json").read_text())
    assert note["method"] == "dpo"
    base = Qwen2ForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    PeftModel.from_pretrained(base, str(adapter_folder(home / "dpo-base")))


def test_dpo_with_its_likelihood_term_adds_the_chosen_responses_cross_entropy(home, finished):
    pair, loss = first_pair(home, "dpo-rpo", "dpo", rpo_alpha=0.5)
    record = {**pair, "output": pair["chosen"]}
    ids, length = encode_record(record, load_tokenizer("tiny"), 2048)
    ids = ids[:-1]  # TRL ends a response with the end token, without the line break of the template
    base = Qwen2ForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter_folder(home / "sft"))).eval()
    with torch.no_grad():
        labels = torch.tensor([[-100] * length + ids[length:]])
        likelihood = model(input_ids=torch.tensor([ids]), labels=labels).loss.item()
    assert loss == pytest.approx(math.log(2) + 0.5 * likelihood, abs=1e-4)


@pytest.mark.parametrize("method", ["tkpo", "dpo"])
def test_early_stopping_ends_the_run_and_keeps_the_best_weights(home, finished, monkeypatch, method):
    """A learning rate that ruins the model: the first validation stays the best."""
    records = json.loads((home / "samples.json").read_text())
    load, validation = runs.load_records, annotate(records[:2], get_axis("language_style"))
    monkeypatch.setattr(
        runs,
        "load_records",
        lambda name, split, *more: validation if split == "validation" else load(str(home / name), split, *more),
    )
    options = {"learning_rate": 3.0, "scheduler": "constant", "warmup": 0.0, "eval_steps": 1, "early_stopping": 2}
    name = "pairs.json" if method in PAIRWISE else "samples.json"
    made = config(home, method, f"{method}-stopped", epochs=4, dataset="language_style", **options)
    made.dataset = name
    metrics = run(made)
    found = [line["eval_cross_entropy"] for line in log_of(home / f"{method}-stopped") if "eval_cross_entropy" in line]
    best = min(range(len(found)), key=found.__getitem__)
    assert metrics["steps"] == len(found) == best + 3 < 4 * STEPS
    assert metrics["best_step"] == best + 1 and metrics["best_metric"] == pytest.approx(found[best])
    base = Qwen2ForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(adapter_folder(home / f"{method}-stopped"))).eval()
    losses = []
    for record in validation:
        ids, length = encode_record(record, load_tokenizer("tiny"), 2048)
        with torch.no_grad():
            labels = torch.tensor([[-100] * length + ids[length:]])
            losses.append(model(input_ids=torch.tensor([ids]), labels=labels).loss.item())
    assert sum(losses) / 2 == pytest.approx(found[best], rel=0.02)  # the adapter is stored in bfloat16


@pytest.mark.parametrize("method", ["tkpo", "dpo", "sft-full"])
def test_a_card_says_what_the_weights_are_and_how_they_load(home, finished, method):
    from huggingface_hub import ModelCard

    name, changes = method, {}
    if method == "sft-full":
        method, changes = "sft", {"finetuning": "full", "max_samples": 2, "epochs": 1}
        run(config(home, "sft", "card-full", **changes))
        name = "card-full"
    card = ModelCard.load(home / name / "model" / "README.md")
    assert card.data.library_name == ("transformers" if changes else "peft") and method in card.data.tags
    for part in (
        str(config(home, method, name).learning_rate),
        "`samples.json`" if method != "dpo" else "`pairs.json`",
    ):
        assert part in card.content
    if not changes:
        note = json.loads((home / name / "model" / "tkpo.json").read_text())
        assert note["base_model_sha256"] in card.content and "PeftModel" in card.content
    assert str(home) not in card.content and str(Path.home()) not in card.content


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"report_to": "trackio"}, "pip install trackio"),
        ({"quantization": "4bit"}, "pip install bitsandbytes"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2"),
        ({"attn_implementation": "flashy"}, "flashy"),
        ({"push_to_hub": True}, "hf upload"),
        ({"method": "tkpo", "num_rejects": 259}, "259"),
        ({"device": "cuda"}, "cpu"),
        ({"device": "mps"}, "cpu"),
    ],
)
def test_what_cannot_be_had_here_is_refused_and_leaves_no_folder(home, monkeypatch, changes, part):
    import importlib.util

    find = importlib.util.find_spec
    absent = ("trackio", "bitsandbytes")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name in absent else find(name, *more))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", lambda self: (_ for _ in ()).throw(ConnectionError("offline")))
    method = changes.get("method", "sft")
    with pytest.raises(TKPOError, match=part) as error:
        run(config(home, method, "refused", **{k: v for k, v in changes.items() if k != "method"}))
    assert "\n" not in str(error.value) and not (home / "refused").exists()


def test_the_attention_that_is_asked_for_is_used(home, finished):
    used = []
    load = runs.load_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "load_model", lambda *a, **k: used.append(load(*a, **k)) or used[-1])
        run(config(home, "sft", "eager", attn_implementation="eager"))
    assert used[0].config._attn_implementation == "eager"
    eager, plain = ([loss for _, loss in losses_of(home / name)] for name in ("eager", "sft"))
    assert eager == pytest.approx(plain, rel=1e-3)


def test_the_device_is_the_machines_best_unless_named(monkeypatch):
    from tkpo.machine import find_device
    from tkpo.presets import default_dtype

    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert find_device().type == expected
        assert find_device("cpu").type == "cpu"
    assert default_dtype("mps") == torch.float32


def test_the_upload_takes_the_model_folder_and_a_failure_does_not_cost_the_run(home, monkeypatch, caplog):
    from huggingface_hub import HfApi

    sent = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **more: type("Url", (), {"repo_id": f"me/{name}"}))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **what: sent.append(what) or "https://hub")
    small = {"max_samples": 2, "epochs": 1, "push_to_hub": True}
    run(config(home, "sft", "pushed", **small))
    assert (sent[0]["repo_id"], Path(sent[0]["folder_path"])) == ("me/pushed", home / "pushed" / "model")

    def offline(self, **what):
        raise ConnectionError("no route")

    monkeypatch.setattr(HfApi, "upload_folder", offline)
    with caplog.at_level(logging.WARNING, "tkpo"):
        assert run(config(home, "sft", "not-pushed", **small))["steps"] == 1
    assert "no route" in caplog.text and "hf upload" in caplog.text


# ---- the whole model


@pytest.mark.parametrize("method", ["sft", "tkpo"])
def test_full_fine_tuning_saves_a_model_that_loads(home, method):
    metrics = run(config(home, method, f"{method}-full", finetuning="full", max_samples=2, epochs=1))
    folder = home / f"{method}-full" / "model"
    base = Qwen2ForCausalLM.from_pretrained(resolve_model("tiny"), dtype=torch.float32)
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert type(model) is Qwen2ForCausalLM
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert metrics["trainable_parameters"] == sum(p.numel() for p in base.parameters())
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, base.get_parameter(name))]
    assert {"lm_head.weight", "model.norm.weight"} <= set(changed)
    assert load_tokenizer(folder).chat_template == load_tokenizer("tiny").chat_template
    for path in folder.iterdir():
        assert path.suffix not in (".bin", ".pt", ".pkl"), "a pickle can run code where it is opened"
        if path.suffix == ".json":
            assert str(home) not in path.read_text()
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["Qwen2ForCausalLM"]
