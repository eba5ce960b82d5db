"""Records of the published shape and length: checked, trained and evaluated from the command line, none lost."""

import json
from pathlib import Path

import pytest

from tkpo.cli import main

LONG = json.loads((Path(__file__).parent / "cases" / "long-zh.json").read_text(encoding="utf-8"))
STYLES = {"language_style": ("文学诗意", "真实客观"), "level_of_detail": ("详细全面", "简洁关键", "真实客观")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Thirty records for each data set, as the published toy data has them, from the articles of the case file."""
    root = tmp_path_factory.mktemp("published")
    articles = list({row["input"]: row for row in LONG}.values())
    for name, phrases in STYLES.items():
        rows = []
        for number in range(30):
            article = articles[number % len(articles)]
            instruction = f"对如下给定文档生成结构化层次化目录。要求：{phrases[number % len(phrases)]}。输入：\n"
            document = f"{article['input']}\n\n（第{number}版）"
            rows.append({"instruction": instruction, "input": document, "output": article["output"]})
        (root / f"{name}.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return root


@pytest.mark.parametrize("name", STYLES)
def test_they_pass_the_check_and_their_lengths_are_said(folder, name, capsys):
    file = str(folder / f"{name}.json")
    assert main(["data", "check", file, "--axis", name, "--model", "tiny", "--max-length", "6000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "30 records, 0 faults"
    assert lines[0].startswith(f"{file}: 30 records of ") and "would be cut by" in lines[0]
    assert main(["data", "check", file, "--axis", "language_style", "--max-length", "0"]) == 2
    wrong = "level_of_detail" if name == "language_style" else "language_style"
    assert main(["data", "check", file, "--axis", wrong]) == 1
    faults = capsys.readouterr().out.splitlines()[:-1]
    assert faults and all(f"no attribute phrase of axis {wrong}" in line for line in faults)


@pytest.mark.parametrize("name", STYLES)
def test_they_train_and_evaluate_without_losing_one(folder, name, capsys, caplog):
    file, run = str(folder / f"{name}.json"), str(folder / f"run-{name}")
    tiny = ["--model", "tiny", "--dtype", "float32", "--device", "cpu"]
    training = ["train", "--method", "tkpo", "--dataset", file, "--axis", name, "--output", run, "--max-length", "1024"]
    assert main([*training, *tiny, "--batch-size", "15"]) == 0
    metrics = json.loads((folder / f"run-{name}" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["samples"] == 30
    assert "30 of 30 records are longer than max_length 1024: their articles were cut by" in caplog.text
    scores = folder / f"{name}-scores.json"
    evaluation = ["evaluate", "--adapter", run, "--dataset", file, "--axis", name, "--output", str(scores)]
    assert main([*evaluation, *tiny, "--max-new-tokens", "2", "--batch-size", "10"]) == 0
    result = json.loads(scores.read_text(encoding="utf-8"))
    assert result["scores"]["zh"]["n"] == len(result["samples"]) == 30
    assert {row["attribute"] for row in result["samples"]} == {
        "language_style": {"literary", "objective"},
        "level_of_detail": {"comprehensive", "concise", "objective"},
    }[name]
