"""The command line as its user runs it: real processes, exit statuses, messages without tracebacks."""

import json
import os
import subprocess
import sys

import pytest

RECORDS = [
    {
        "instruction": "Generate a structured hierarchical outline for the given document. "
        f"Requirement: {attribute}. Input:\n",
        "input": f"Topic: {topic}",
        "output": f"1. {topic}\n2. {attribute} end",
    }
    for topic in ("Salt", "Wind", "Rope")
    for attribute in ("literary", "objective")
]


def tkpo(*args, cwd=None, **extra):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **extra}
    command = [sys.executable, "-m", "tkpo.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=300)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with an Alpaca file, its dataset_info.json, and an SFT adapter trained through the command line."""
    root = tmp_path_factory.mktemp("cli")
    (root / "data").mkdir()
    (root / "data" / "mine.json").write_text(json.dumps(RECORDS))
    info = {f"language_style_en_{split}": {"file_name": "mine.json"} for split in ("train", "test")}
    (root / "data" / "dataset_info.json").write_text(json.dumps(info))
    (root / "run.yaml").write_text("method: sft\nmodel: tiny\nlearning_rate: 1e-3\nepochs: 3\nbatch_size: 2\n")
    done = tkpo(
        "train", "run.yaml", "--dataset", "data/mine.json", "--axis", "language_style", "--output", "r", cwd=root
    )
    assert done.returncode == 0, done.stderr
    return root


def test_train_from_a_yaml_file_with_flags_over_it(workplace):
    config = json.loads((workplace / "r" / "config.json").read_text())
    assert (config["method"], config["epochs"], config["learning_rate"]) == ("sft", 3.0, 0.001)
    metrics = json.loads((workplace / "r" / "metrics.json").read_text())
    assert metrics["steps"] == 9
    again = tkpo(
        "train", "run.yaml", "--dataset", "data/mine.json", "--axis", "language_style", "--output", "r", cwd=workplace
    )
    assert again.returncode == 0 and "finished already" in again.stderr


def test_generate_prints_every_adapter(workplace):
    args = ("generate", "--topic", "Salt", "--style", "literary", "--model", "tiny", "--max-new-tokens", 20)
    done = tkpo(*args, "--adapters", "mine=r", "base", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "── MINE" in done.stdout and "── BASE" in done.stdout
    as_json = tkpo(*args, "--adapters", "mine=r", "base", "--json", cwd=workplace)
    assert set(json.loads(as_json.stdout)) == {"mine", "base"}


def test_evaluate_writes_predictions_and_scores(workplace):
    args = ("evaluate", "--adapter", "r", "--model", "tiny", "--output", "scores.json", "--max-new-tokens", 16)
    done = tkpo(*args, cwd=workplace)
    assert done.returncode == 0, done.stderr
    result = json.loads((workplace / "scores.json").read_text())
    assert result["scores"]["en"]["n"] == 6
    assert len(result["samples"]) == 6 and {"prediction", "reference", "rouge1"} <= set(result["samples"][0])
    assert "R-1" in done.stdout
    assert not list(workplace.glob("*.part*"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", "--style", "literary"), "give --topic, --article or both"),
        (("generate", "--style", "baroque", "--topic", "x"), "no attribute 'baroque'"),
        (("generate", "--style", "literary", "--article", "missing.txt"), "cannot read article missing.txt"),
        (("generate", "--style", "literary", "--topic", "x", "--adapters", "nope=nowhere"), "no adapter in nowhere"),
        (("train", "--method", "ppo"), "method must be one of sft, tkpo, contrast, dpo, simpo, orpo, not 'ppo'"),
        (("train", "--method", "tkpo", "--sft-adapter", "x"), "sft_adapter is for dpo and simpo"),
        (("train", "--learning-rate", "fast"), "learning_rate must be float, not 'fast'"),
        (("train", "missing.yaml"), "cannot read run configuration missing.yaml"),
        (("train", "--model", "tiny", "--dataset", "haiku", "--axis", "language_style"), "no data set 'haiku'"),
        (("train", "--model", "tiny", "--dataset", "haiku"), "no axis 'haiku'"),
        (("train", "--model", "gpt-7", "--dataset", "data/mine.json", "--axis", "language_style"), "gpt-7"),
        (("data", "build", "--corpus", "empty"), "no *.jsonl files in corpus folder empty"),
    ],
)
def test_bad_input_is_one_clear_line_and_status_2(workplace, args, message):
    done = tkpo(*args, cwd=workplace)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_binary_and_empty_articles_are_refused(workplace):
    (workplace / "photo.txt").write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    (workplace / "empty.txt").write_text("  \n")
    for name, message in (("photo.txt", "is not UTF-8 text"), ("empty.txt", "is empty")):
        done = tkpo("generate", "--style", "literary", "--article", name, cwd=workplace)
        assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_data_check_says_file_and_record(workplace):
    (workplace / "bad.json").write_text(json.dumps([RECORDS[0], {**RECORDS[1], "output": ""}]))
    done = tkpo("data", "check", "bad.json", cwd=workplace)
    assert done.returncode == 1
    assert "bad.json, record 2: field 'output' is empty" in done.stdout
    good = tkpo("data", "check", "data/mine.json", cwd=workplace)
    assert good.returncode == 0 and "6 records, 0 faults" in good.stdout


def test_help_names_every_command():
    done = tkpo("--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("generate", "train", "evaluate", "data"))
