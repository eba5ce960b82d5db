"""A run's settings: every wrong one is refused with the allowed values before anything is imported or written."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from tkpo.errors import TKPOError
from tkpo.methods import CONTINUED, METHODS, PAIRWISE
from tkpo.run_config import DTYPES, SCHEDULERS, RunConfig
from tkpo.settings import SAMPLERS, TKPOSettings

ROOT = Path(__file__).parents[1]
REFUSED = [
    ("learning_rate", "0", "above 0"),
    ("learning_rate", "-1e-4", "above 0"),
    ("learning_rate", "nan", "finite"),
    ("learning_rate", "inf", "finite"),
    ("warmup", "-0.1", "at least 0"),
    ("warmup", "1.5", "at most 1"),
    ("max_samples", "0", "at least 1"),
    ("max_samples", "-3", "at least 1"),
    ("eval_samples", "0", "at least 1"),
    ("seed", "-1", "at least 0"),
    ("beta", "-0.1", "at least 0"),
    ("rpo_alpha", "-1", "at least 0"),
    ("lora_alpha", "-16", "at least 1"),
    ("lora_rank", "0", "at least 1"),
    ("eval_steps", "-1", "at least 0"),
    ("save_steps", "0", "at least 1"),
    ("epochs", "-1", "above 0"),
    ("batch_size", "0", "at least 1"),
    ("micro_batch_size", "0", "at least 1"),
    ("max_length", "0", "at least 1"),
    ("scheduler", "cosin", "cosine_with_restarts"),
    ("dtype", "fp16", "bfloat16"),
    ("device", "gpu", "cuda:N"),
    ("lang", "fr", "en, zh"),
    ("deepspeed", "zero9", "zero3"),
    ("tau", "0", "above 0"),
    ("tau", "-1", "above 0"),
    ("preference_weight", "-0.5", "at least 0"),
    ("num_rejects", "0", "at least 1"),
    ("sampler", "greedy", "no_flip"),
    ("reduction", "sum", "mean_log"),
    ("quantization", "8bit", "4bit"),
    ("report_to", "comet", "tensorboard"),
    ("early_stopping", "0", "at least 1"),
    ("early_stopping", "2", "eval_steps"),
    ("hub_model_id", "me/mine", "push_to_hub"),
]


@pytest.mark.parametrize(("name", "value", "part"), REFUSED)
def test_a_value_outside_its_range_is_refused_naming_what_is_allowed(name, value, part):
    with pytest.raises(TKPOError) as error:
        RunConfig.load(**{name: value})
    message = str(error.value)
    assert name in message.lower() and part in message and "\n" not in message


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"method": "sft", "sft_adapter": "x"}, "sft_adapter"),
        ({"method": "tkpo", "rpo_alpha": 1.0}, "rpo_alpha"),
        ({"finetuning": "full", "quantization": "4bit"}, "quantization"),
        ({"eval_steps": 5, "dataset": "mine.json"}, "eval_steps"),
        ({"method": "dpo", "eval_steps": 5, "early_stopping": 1, "early_stopping_metric": "loss"}, "cross_entropy"),
    ],
)
def test_values_that_exclude_each_other_are_refused(values, part):
    with pytest.raises(TKPOError, match=part):
        RunConfig(**values)


def test_a_wrong_flag_is_one_line_and_imports_neither_torch_nor_transformers():
    code = "import sys; from tkpo.cli import main; code = main(sys.argv[1:]); print(code, 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, "train", "--learning-rate", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"]
    assert done.stderr.splitlines() == ["tkpo: learning_rate must be above 0, not 0.0"]


def test_help_shows_the_choices_not_their_type(capsys):
    from tkpo.cli import main

    with pytest.raises(SystemExit):
        main(["train", "--help"])
    shown = "".join(capsys.readouterr().out.split())
    for choices in (METHODS, SAMPLERS, SCHEDULERS, DTYPES, ("en", "zh"), ("lora", "full")):
        assert "{" + ",".join(choices) + "}" in shown


def test_choices_are_those_of_the_libraries():
    from transformers.trainer_utils import SchedulerType

    from tkpo import presets

    assert set(SCHEDULERS) <= {kind.value for kind in SchedulerType}
    assert set(DTYPES) == {"auto", *presets.DTYPES}


def test_paths_may_begin_with_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(
        "method: dpo\noutput: ~/out\nsft_adapter: ~/sft\ndata_dir: ~/data\nmodel: ~/base\n"
    )
    made = RunConfig.load(tmp_path / "run.yaml")
    assert (made.output, made.sft_adapter) == (str(tmp_path / "out"), str(tmp_path / "sft"))
    assert (made.data_dir, made.model) == (str(tmp_path / "data"), str(tmp_path / "base"))


def test_defaults_of_the_loss_have_one_home():
    import inspect

    from tkpo.loss import draw_reject_tokens, preference_loss, tkpo_loss
    from tkpo.training import TKPOConfig

    homes = {
        f.name: f.default for f in dataclasses.fields(TKPOSettings) if f.name not in ("flipper", "contrast_weight")
    }
    assert (homes["preference_weight"], homes["tau"], homes["num_rejects"]) == (0.5, 0.15, 20)
    for config in (RunConfig, TKPOConfig):
        own = {f.name: f.default for f in dataclasses.fields(config)}
        assert {name: own[name] for name in homes.keys() & own.keys()} == {
            n: homes[n] for n in homes.keys() & own.keys()
        }
    for function in (preference_loss, draw_reject_tokens, tkpo_loss):
        for name, parameter in inspect.signature(function).parameters.items():
            if name in homes and parameter.default is not inspect.Parameter.empty:
                assert parameter.default == homes[name]


def test_the_methods_say_what_they_are():
    assert PAIRWISE == ("dpo", "simpo", "orpo") and CONTINUED == ("dpo", "simpo")
    costs = {name: method.cost for name, method in METHODS.items()}
    assert costs == {
        "sft": 3,
        "tkpo": 4,
        "contrast": 6,
        "dpo": 8,
        "simpo": 6,
        "orpo": 6,
    }  # backward is two forward passes
