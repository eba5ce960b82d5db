"""The real LLaMA-Factory with the TKPO loss: its first step against TKPOTrainer on the same samples."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    TrainerCallback,
)

from tkpo.attributes import get_axis
from tkpo.data import make_record
from tkpo.errors import TKPOError
from tkpo.presets import CHATML_TEMPLATE, cache_dir, load_model, load_tokenizer, resolve_model
from tkpo.training import TKPOConfig, TKPOTrainer

pytest.importorskip("llamafactory", reason="needs: bash install.sh llamafactory")

from tkpo import llamafactory

ROOT = Path(__file__).parents[1]
TOPICS = ("Moss after rain", "A clock in the attic", "Why bread rises", "The night bus")
PUBLISHED = "对如下给定文档生成结构化层次化目录。要求：{}。输入：\n"  # the published instruction, word for word


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """dataset_info.json with English samples, Chinese ones in the published format, and faulty ones."""
    folder = tmp_path_factory.mktemp("llamafactory")
    axis, english = get_axis("language_style"), []
    for number, topic in enumerate(TOPICS):
        attribute = axis.attributes[number % 2]
        english.append({**make_record(axis, attribute, topic), "output": "1. It" + f"\n2. {topic}" * number})
    chinese = [
        {"instruction": PUBLISHED.format(phrase), "input": text, "output": output}
        for phrase, text, output in (
            ("文学诗意", "站在平遥南门的城楼上，脚下是一圈约六公里长的砖墙。", "1. 城楼望远\n2. 汇票如诗"),
            ("真实客观", "清末现代银行兴起，票号相继关门。", "1. 票号的兴起\n2. 票号的衰落\n3. 古城的保护"),
        )
    ]
    faulty = [*english[:2], {"instruction": "Write an outline.", "input": "Salt", "output": "1. Salt"}]
    files = {"english": english, "chinese": chinese, "faulty": faulty}
    for name, records in files.items():
        (folder / f"{name}.json").write_text(json.dumps(records))
    (folder / "dataset_info.json").write_text(json.dumps({name: {"file_name": f"{name}.json"} for name in files}))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, tiny_model, tiny_tokenizer):
    """The preset tiny with peaked distributions, so that every setting of the loss matters."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def chinese_model(tmp_path_factory, qwen_tokenizer):
    """A tiny random Qwen2 with the real tokenizer of Qwen2.5."""
    folder = tmp_path_factory.mktemp("chinese")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=151936, num_key_value_heads=1, initializer_range=0.5, **shape)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    qwen_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def said():
    """What LLaMA-Factory's log says, as one text."""

    class Lines(logging.Handler):
        def emit(self, record):
            self.text += record.getMessage() + "\n"

    handler, logger = Lines(), logging.getLogger("llamafactory")
    handler.text = ""
    logger.addHandler(handler)
    yield lambda: handler.text
    logger.removeHandler(handler)


class Log(TrainerCallback):
    """Keeps what LLaMA-Factory's Trainer logs."""

    def __init__(self):
        self.lines = []

    @property
    def losses(self):
        return [line["loss"] for line in self.lines]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.lines.append(dict(logs))


def write_config(home, output, **changes):
    """A YAML file as LLaMA-Factory's users have it, and the section."""
    values = {
        "model_name_or_path": "tiny",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "tkpo": {"axis": "language_style", "sampler": "topk", "num_rejects": 5},
        "dataset_dir": str(home),
        "dataset": "english",
        "disable_shuffling": True,
        "template": "qwen",
        "cutoff_len": 1024,
        "output_dir": str(home / output),
        "logging_steps": 1,
        "report_to": "none",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "max_steps": 2,
        "seed": 0,
        **changes,
    }
    path = home / f"{output}.yaml"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))  # JSON is YAML
    return path


def llamafactory_losses(home, output, **changes):
    log = Log()
    shutil.rmtree(home / output, ignore_errors=True)
    llamafactory.train(write_config(home, output, **changes), callbacks=[log])
    return log.losses


def first_loss(*arguments, **settings):
    """The loss that TKPOTrainer logs for its first step, over the first `batch` samples of the file."""
    return first_line(*arguments, **settings)["loss"]


def first_line(home, model, dataset, batch, weight=0.5, **settings):
    """All that TKPOTrainer logs for it."""
    records = json.loads((home / f"{dataset}.json").read_text())[:batch]
    args = TKPOConfig(
        output_dir=str(home / "ours"),
        per_device_train_batch_size=batch,
        max_steps=1,
        preference_weight=weight,
        **{"sampler": "topk", "num_rejects": 5, **settings},
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        train_sampling_strategy="sequential",
    )
    loaded = load_model(model, "float32", "cpu")
    trainer = TKPOTrainer(loaded, args, records, processing_class=load_tokenizer(model))
    trainer.train()
    return next(line for line in trainer.state.log_history if "loss" in line)


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_its_first_step_has_the_loss_of_our_trainer(home, tiny, finetuning):
    changes = {"model_name_or_path": tiny, "finetuning_type": finetuning, "learning_rate": 1e-2, "max_steps": 3}
    losses = llamafactory_losses(home, finetuning, **changes)
    expected = first_loss(home, tiny, "english", 4)
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[2] < losses[0]
    assert expected - first_loss(home, tiny, "english", 4, weight=0.0) > 0.1  # it is not SFT's
    name = "model" if finetuning == "full" else "adapter_model"
    saved = load_file(home / finetuning / f"{name}.safetensors")
    if finetuning == "full":
        start = load_model(tiny, "float32", "cpu").state_dict()
        assert all(not torch.equal(saved[key], start[key]) for key in ("lm_head.weight", "model.norm.weight"))
    else:
        assert all(value.abs().sum() > 0 for key, value in saved.items() if "lora_B" in key)


@pytest.mark.parametrize(
    "section", [{"tau": 0.5}, {"reduction": "mean_log"}, {"preference_weight": 2}, {"num_rejects": 9}]
)
def test_every_key_of_the_section_reaches_the_loss(home, tiny, section):
    base = {"axis": "language_style", "sampler": "topk", "num_rejects": 5}
    changes = {"model_name_or_path": tiny, "tkpo": {**base, **section}, "max_steps": 1, "save_strategy": "no"}
    (loss,) = llamafactory_losses(home, "section", **changes)
    weight = section.get("preference_weight", 0.5)
    rest = {key: value for key, value in section.items() if key != "preference_weight"}
    assert loss == pytest.approx(first_loss(home, tiny, "english", 4, weight, **rest), rel=1e-5)
    assert loss != pytest.approx(first_loss(home, tiny, "english", 4), rel=1e-5)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The preset small in float32 and with Qwen's chat template, as LLaMA-Factory's template qwen has it."""
    if not (cache_dir() / "models" / "small").is_dir():
        pytest.skip("preset small is not in the cache")
    folder = tmp_path_factory.mktemp("small")
    load_model("small", "float32", "cpu").save_pretrained(folder)
    tokenizer = load_tokenizer("small")
    tokenizer.chat_template = CHATML_TEMPLATE
    tokenizer.save_pretrained(folder)
    yield str(folder)
    shutil.rmtree(folder)


@pytest.mark.parametrize("finetuning", ["full", "lora"])
def test_small(home, small, finetuning):
    changes = {"model_name_or_path": small, "finetuning_type": finetuning, "learning_rate": 1e-4}
    changes |= {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "save_strategy": "no",
    }
    losses = llamafactory_losses(home, f"small-{finetuning}", **changes)
    assert len(losses) == 3
    assert losses[0] == pytest.approx(first_loss(home, small, "english", 1), rel=1e-4)
    shutil.rmtree(home / f"small-{finetuning}")


def test_chinese_samples_in_the_published_format(home, chinese_model):
    changes = {"model_name_or_path": chinese_model, "dataset": "chinese", "gradient_accumulation_steps": 1}
    (loss,) = llamafactory_losses(home, "chinese", **changes, max_steps=1, save_strategy="no")
    assert loss == pytest.approx(first_loss(home, chinese_model, "chinese", 2), rel=1e-5)
    assert loss - first_loss(home, chinese_model, "chinese", 2, weight=0.0) > 0.1


def test_the_log_has_the_terms_beside_the_loss(home, tiny, said):
    log = Log()
    whole = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 1}
    llamafactory.train(write_config(home, "terms", model_name_or_path=tiny, **whole, save_strategy="no"), (), [log])
    expected = first_line(home, tiny, "english", 4)
    for name in ("loss", "cross_entropy", "preference", "reward", "accuracy"):
        assert log.lines[0][name] == pytest.approx(expected[name], rel=1e-4), name
    assert "TKPO is active on Qwen2ForCausalLM: loss = cross_entropy + 0.5 * preference" in said()
    assert "num_rejects 5" in said() and "language_style" in said()
    written = json.loads((home / "terms" / "trainer_state.json").read_text())["log_history"][0]
    assert written["preference"] == log.lines[0]["preference"]


def test_a_llama_trains_with_the_loss_of_our_trainer(home, tmp_path, tiny_folder):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=300, initializer_range=0.5, **shape))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    (loss,) = llamafactory_losses(home, "llama", model_name_or_path=str(tmp_path), max_steps=1)
    assert loss == pytest.approx(first_loss(home, str(tmp_path), "english", 4), rel=1e-5)
    assert json.loads((home / "llama" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert "tkpo" not in vars(LlamaForCausalLM)


def test_eval_loss_is_the_plain_models_cross_entropy(home, tiny, tiny_tokenizer):
    changes = {"model_name_or_path": tiny, "eval_dataset": "chinese", "do_eval": True, "learning_rate": 0.0}
    llamafactory_losses(home, "eval", **changes, max_steps=1, per_device_eval_batch_size=1, eval_strategy="no")
    found = json.loads((home / "eval" / "eval_results.json").read_text())["eval_loss"]
    model, losses = load_model(tiny, "float32", "cpu"), []
    for record in json.loads((home / "chinese.json").read_text()):
        turns = [{"role": "user", "content": f"{record['instruction']}\n{record['input']}"}]
        prompt = tiny_tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        start, end = (tiny_tokenizer(text)["input_ids"] for text in (prompt, record["output"] + "<|im_end|>\n"))
        ids = torch.tensor([start + end])
        losses.append(model(input_ids=ids, labels=torch.tensor([[-100] * len(start) + end])).loss.item())
    assert found == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_keys_that_transformers_has_dropped_are_left_out_with_a_warning(home, said):
    former = {"save_safetensors": True, "no_cuda": True, "evaluation_strategy": "no"}
    losses = llamafactory_losses(home, "former", **former, max_steps=1, save_strategy="no")
    assert len(losses) == 1
    assert "save_safetensors is left out" in said() and "eval_strategy took its place" in said()


# ---- several turns


TURNS = {
    "first": ["Requirement: literary. Topic: the sea", "Make it longer."],
    "last": ["Hello", "Requirement: literary. Topic: the sea"],
}


@pytest.mark.parametrize("turn", TURNS)
def test_every_user_turn_is_searched(home, tiny, tiny_tokenizer, turn):
    questions = TURNS[turn]
    answers = ["1. Salt", "1. Salt\n2. Song"]
    record = {"instruction": questions[1], "input": "", "output": answers[1], "history": [[questions[0], answers[0]]]}
    (home / "turns.json").write_text(json.dumps([record]))
    info = json.loads((home / "dataset_info.json").read_text())
    columns = {"prompt": "instruction", "query": "input", "response": "output", "history": "history"}
    info["turns"] = {"file_name": "turns.json", "columns": columns}
    (home / "dataset_info.json").write_text(json.dumps(info))
    changes = {"model_name_or_path": tiny, "dataset": "turns", "gradient_accumulation_steps": 1, "max_steps": 1}
    (loss,) = llamafactory_losses(home, "turns", **changes, save_strategy="no")

    true = by_turns(tiny_tokenizer, questions, answers)
    flipped = by_turns(tiny_tokenizer, [q.replace("literary", "objective") for q in questions], answers)
    assert loss == pytest.approx(loss_by_hand(load_model(tiny, "float32", "cpu"), true, flipped), rel=1e-5)


def by_turns(tokenizer, questions, answers):
    """(ids, labels) of a conversation in Qwen's template: every answer with its end of turn is trained."""
    ids, labels = [], []
    text = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    for question, answer in zip(questions, answers, strict=True):
        text += f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        prompt, response = (tokenizer(t)["input_ids"] for t in (text, answer + "<|im_end|>\n"))
        ids += prompt + response
        labels += [-100] * len(prompt) + response
        text = ""
    return ids, labels


def loss_by_hand(model, true, flipped, num_rejects=5, tau=0.15, weight=0.5):
    """The method position by position in float64, with the likeliest tokens of the flipped conversation as rejects."""
    own, other = ([], [])
    for (ids, labels), kept in ((true, own), (flipped, other)):
        with torch.no_grad():
            predictions = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
        kept += [(predictions[i - 1], label) for i, label in enumerate(labels) if label != -100]
    losses, rewards = [], []
    for (p, gold), (q, same) in zip(own, other, strict=True):
        assert gold == same
        rivals = [v for v in q.argsort(descending=True).tolist() if v != gold][:num_rejects]
        scores = [(p[v] / tau).exp() for v in (gold, *rivals)]
        losses.append(-p[gold].log())
        rewards.append(scores[0] / sum(scores))
    return float(sum(losses) / len(losses) - weight * (sum(rewards) / len(rewards)).log())


def test_without_the_section_it_is_llamafactorys_own(home):
    from llamafactory.train.tuner import run_exp

    path = write_config(home, "plain", tkpo=None, max_steps=1, save_strategy="no")
    ours, theirs = Log(), Log()
    llamafactory.train(path, callbacks=[ours])
    arguments = json.loads(path.read_text())
    arguments |= {"model_name_or_path": str(resolve_model("tiny")), "output_dir": str(home / "theirs")}
    run_exp(arguments, [theirs])
    assert ours.losses == theirs.losses and len(ours.losses) == 1
    assert "tkpo" not in vars(Qwen2ForCausalLM)


@pytest.mark.parametrize("name", ["qwen_sft_tkpo.yaml", "qwen_sft.yaml", "qwen_dpo.yaml"])
def test_shipped_configurations_run_from_any_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    log = Log()
    overrides = ["model_name_or_path=tiny", "max_samples=1", "max_steps=1", "logging_steps=1", "cutoff_len=2048"]
    llamafactory.train(name, overrides + ["ref_model=tiny"] * (name == "qwen_dpo.yaml"), [log])
    assert len(log.losses) == 1
    assert list(tmp_path.rglob("*.safetensors"))
    if name == "qwen_dpo.yaml":
        assert log.losses[0] == pytest.approx(0.6931, abs=1e-3)  # -log sigmoid(0): the policy is the reference
    assert "tkpo" not in vars(Qwen2ForCausalLM)


def test_the_patch_applies_in_every_process_of_torchrun(home):
    path = write_config(home, "torchrun", deepspeed="zero3", use_cpu=True, gradient_accumulation_steps=1, max_steps=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tkpo.cli", "llamafactory", "train", str(path), "tkpo.tau=0.3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    line = json.loads((home / "torchrun" / "trainer_log.jsonl").read_text().splitlines()[0])
    assert line["loss"] == pytest.approx(first_loss(home, "tiny", "english", 4, tau=0.3), rel=1e-5)
    model = Qwen2ForCausalLM.from_pretrained(home / "torchrun")
    assert type(model) is Qwen2ForCausalLM


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"dataset": "faulty"}, ["training sample 3", "literary", "the prompt, which ends in"]),
        ({"tkpo": {"axis": "level_of_detail"}}, ["training sample 1", "level_of_detail", "comprehensive"]),
        ({"tkpo": {"axis": "lengths"}}, ["'lengths'", "language_style"]),
        ({"tkpo": {"tau": 0.1}}, ["axis"]),
        ({"tkpo": {"axis": "language_style", "lambda": 1}}, ["'lambda'", "preference_weight"]),
        ({"tkpo": {"axis": "language_style", "tau": "warm"}}, ["tau", "float", "'warm'"]),
        ({"tkpo": {"axis": "language_style", "sampler": "best"}}, ["'best'", "multinomial"]),
        ({"tkpo": {"axis": "language_style", "tau": 0}}, ["tau", "0"]),
        ({"tkpo": {"axis": "language_style", "preference_weight": -1}}, ["preference_weight", "-1"]),
        ({"tkpo": {"axis": "language_style", "num_rejects": 0}}, ["num_rejects", "0"]),
        ({"tkpo": {"axis": "language_style", "num_rejects": 259}}, ["num_rejects", "only 259 tokens"]),
        ({"tkpo": {"axis": "language_style", "reduction": "sum"}}, ["'sum'", "log_mean"]),
        ({"model_name_or_path": "nobody/nothing"}, ["nobody/nothing"]),
        ({"upcast_lmhead_output": True}, ["upcast_lmhead_output"]),
        ({"tkpo": 3}, ["tkpo", "3"]),
        ({"packing": True}, ["packing", "one row"]),
        ({"stage": "dpo"}, ["stage", "dpo"]),
        ({"learningrate": 1}, ["learningrate"]),
        ({"dataset": "missing"}, ["missing"]),
        ({"finetuning_type": "half"}, ["Invalid fine-tuning method"]),
        ({"deepspeed": "zero9"}, ["'zero9'", "zero3-offload"]),
    ],
)
def test_wrong_input_is_refused_before_training(home, changes, parts):
    path = write_config(home, "refused", **changes)
    with pytest.raises(TKPOError) as error:
        llamafactory.train(path)
    for part in parts:
        assert part in str(error.value)
    assert not list((home / "refused").glob("*.safetensors"))
    assert "tkpo" not in vars(Qwen2ForCausalLM)


def test_a_model_that_the_patch_does_not_cover_is_refused(home, tmp_path, tiny_folder):
    """Phi's output head has a bias."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=300, **shape)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(TKPOError, match=r"PhiForCausalLM.*bias"):
        llamafactory.train(write_config(home, "phi", model_name_or_path=str(tmp_path)))
    assert not list((home / "phi").glob("*.safetensors"))


def test_a_model_that_is_no_causal_lm_is_refused(home, tmp_path, tiny_folder):
    T5Config(vocab_size=300).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(TKPOError, match="not t5"):
        llamafactory.train(write_config(home, "t5", model_name_or_path=str(tmp_path)))


def test_the_command_says_it_without_a_traceback(home):
    from tkpo.cli import main

    assert main(["llamafactory", "train", str(home / "nothing.yaml")]) == 2


def test_torchaudio_is_left_out_on_a_cpu_build_only(monkeypatch):
    from transformers.utils import is_torchaudio_available

    assert "torchaudio" not in sys.modules
    assert is_torchaudio_available() is False
    monkeypatch.setattr(torch.version, "cuda", None)
    with llamafactory._torchaudio_left_out():
        assert "torchaudio" in sys.modules
    assert "torchaudio" not in sys.modules
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with llamafactory._torchaudio_left_out():
        assert "torchaudio" not in sys.modules
