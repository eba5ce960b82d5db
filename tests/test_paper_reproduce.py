"""paper/reproduce.py: stored runs become tables and figures, missing runs are made, nothing is copied or mixed up."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml
from rouge_score.rouge_scorer import RougeScorer

from paper.reproduction import grid, pages, rendering, tables
from paper.reproduction.experiments import Experiments
from paper.reproduction.intervals import difference, interval
from paper.reproduction.store import Store
from paper.reproduction.tables.questions import answers
from tkpo.data import load_records
from tkpo.errors import TKPOError

ROOT = Path(__file__).parents[1]
PRESET = "qwen2.5-coder-0.5b"
SCRIPT = str(ROOT / "paper" / "reproduce.py")


def reproduce(*arguments, cwd=ROOT, **more):
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=570, **more)


@pytest.fixture(scope="module")
def grids():
    return grid.load_grids()


@pytest.fixture(scope="module")
def preset():
    return grid.load_preset(PRESET)


def record_of(run, preset, predict, seconds=2.0, cpu="AMD EPYC"):
    """A stored run as the runner writes it, whose predictions are `predict(test record)`."""
    config = grid.run_config(run, preset)
    wanted = grid.evaluation(run, preset)
    rows = []
    for lang in ("en", "zh"):
        rows += load_records(run.dataset, run.split, lang)[: wanted["limit"]]
    environment = {"cpu": cpu, "cores": 2, "gpus": [], "revision": "abc"}
    training = {"seconds_a_step": seconds, "steps": 10, "samples": 20, "peak_memory_mib": 1000.0}
    return {
        "format": 1,
        "name": run.name,
        "config": config and {k: v for k, v in vars(config).items() if k not in ("output", "sft_adapter")},
        "environment": environment,
        "training": training,
        "adapter_sha256": None,
        "log": [{"step": s, "eval_cross_entropy": 3 - 0.1 * s, "eval_runtime": 0.5} for s in (5, 10)],
        "evaluation": wanted,
        "predictions": [
            {k: r[k] for k in ("id", "lang", "attribute", "form")}
            | {"reference": r["output"], "prediction": predict(r)}
            for r in rows
        ],
    }


def perfect(record):
    return record["output"]


def blank(record):
    return ""


def first_line(record):
    return record["output"].split("\n")[0]


def bare(outline):
    """Its headings without numbers and indentation."""
    return "\n".join(re.sub(r"^\s*[\d.]+ ", "", line) for line in outline.splitlines())


@pytest.fixture
def stored(tmp_path, preset):
    """Writes the records of some runs and returns their store."""
    store = Store(tmp_path / "results", preset)

    def write(**predictions):
        for method, predict in predictions.items():
            for dataset in ("language_style", "level_of_detail"):
                run = grid.Run(dataset, method, 0)
                store.add(run, record_of(run, preset, predict))
        return store

    return write


def cell(folder, number, *where, column):
    """The cell of a written CSV table whose row begins with `where`."""
    rows = list(csv.reader((folder / f"table{number}.csv").read_text().splitlines()))
    header = rows[0]
    for row in rows:
        if tuple(row[: len(where)]) == where:
            return row[header.index(column)]
    raise AssertionError(f"no row {where}")


# ---- experiments


def test_every_run_of_every_preset_has_a_valid_configuration_and_a_name_of_its_own(grids):
    for name in grid.preset_names():
        preset, seen = grid.load_preset(name), {}
        for one in grids.values():
            if one.tuned_by:
                continue
            for run in one.runs(preset):
                config = grid.run_config(run, preset)
                assert (config is None) == (run.method == "base")
                assert seen.setdefault(run.name, run) == run, "two runs share a file"
                if config:
                    assert (config.method, config.seed, config.dataset) == (run.method, run.seed, run.dataset)


def test_methods_see_the_same_samples_and_are_evaluated_alike(grids, preset):
    for dataset in ("language_style", "level_of_detail"):
        runs = [r for n in ("1-main", "6-simpo-orpo") for r in grids[n].runs(preset) if r.dataset == dataset]
        assert {run.method for run in runs} == {"base", "sft", "tkpo", "dpo", "simpo", "orpo"}
        configs = [grid.run_config(run, preset) for run in runs if run.method != "base"]
        for name in ("max_samples", "batch_size", "lora_rank", "lora_alpha", "max_length"):
            assert len({getattr(c, name) for c in configs}) == 1, name
        for continued in (False, True):  # from the base, or from the SFT run
            assert len({c.epochs for c in configs if bool(c.sft_adapter) == continued}) == 1
        assert len({str(grid.evaluation(run, preset)) for run in runs}) == 1


def test_dpo_and_tkpo_get_the_same_number_of_tries_on_validation(grids, preset):
    runs = grids["4-tuning"].runs(preset)
    assert {run.split for run in runs} == {"validation"}
    for dataset in ("language_style", "level_of_detail"):
        counts = [sum((r.method, r.dataset) == (m, dataset) for r in runs) for m in ("dpo", "tkpo")]
        assert counts == [4, 4]
    rates = {grid.run_config(run, preset).learning_rate for run in runs if run.method == "dpo"}
    main = grid.run_config(grid.Run("language_style", "dpo", 0), preset).learning_rate
    assert sorted(rates) == pytest.approx([main / 4, main])


def test_the_ablations_cover_what_they_promise(grids, preset):
    settings = [dict(run.settings) for run in grids["3-ablations"].runs(preset)]
    assert {} in settings and {"preference_weight": 0} in settings and {"reduction": "mean_log"} in settings
    assert {s["sampler"] for s in settings if "sampler" in s} == {"no_flip", "gumbel", "topk", "uniform"}
    assert {s["num_rejects"] for s in settings if "num_rejects" in s} | {20} == {1, 5, 20, 50}
    assert all(len(s) <= 1 for s in settings)
    assert grid.run_config(grids["3-ablations"].runs(preset)[0], preset).max_samples == round(
        preset.datasets["language_style"]["max_samples"] / 4
    )


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("title: [", "mine.yaml"),
        ("- a", "mine.yaml"),
        ("titel: x", "titel"),
        ("{title: x, serves: [], datasets: [], methods: [ppo], seeds: [0]}", "ppo"),
        ("{title: x, serves: [], datasets: [], methods: [], seeds: [0], share: 0}", "share"),
        ("{title: x, serves: [], datasets: [], methods: [], seeds: [0], tuned_by: {grid: none}}", "none"),
        ("{title: x, serves: [], datasets: [], methods: [], seeds: [0]}", "no table or figure"),
        ("{title: x, serves: [table 99], datasets: [], methods: [], seeds: [0]}", "table 99"),
    ],
)
def test_a_wrong_grid_says_what_is_wrong(tmp_path, text, part):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(TKPOError, match=re.escape(part)) as error:
        grid.load_grids(tmp_path)
    assert "mine.yaml" in str(error.value)


# ---- tables


def test_table_2_scores_the_stored_predictions(stored, grids, tmp_path):
    store = stored(tkpo=first_line, dpo=blank, sft=perfect)
    rendering.write(tables.table2(Experiments(store, grids)), tmp_path)
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=True)
    records = load_records("language_style", "test", "en")[: store.preset.datasets["language_style"]["limit"]]
    for ours, theirs in (("R-1", "rouge1"), ("R-L", "rougeL")):
        values = [100 * scorer.score(bare(r["output"]), bare(first_line(r)))[theirs].fmeasure for r in records]
        found = cell(tmp_path, 2, "language style (pilot)", "English", "TKPO", column=ours)
        assert found.split(" ± ")[0] == f"{statistics.mean(values):.1f}"
    for language in ("English", "Chinese"):
        assert cell(tmp_path, 2, "level of detail (pilot)", language, "SFT", column="R-2") == "100.0 ± 0.0"
        assert cell(tmp_path, 2, "level of detail (pilot)", language, "SFT", column="valid") == "100.0 ± 0.0"
        assert cell(tmp_path, 2, "level of detail (pilot)", language, "DPO", column="BLEU-4") == "0.0 ± 0.0"
        assert cell(tmp_path, 2, "language style (pilot)", language, "SFT", column="seeds") == "1 of 3"
        assert cell(tmp_path, 2, "language style (pilot)", language, "ORPO", column="R-1") == "†"
    text = (tmp_path / "table2.md").read_text()
    assert "python paper/reproduce.py --run --table 2" in text


def test_a_changed_prediction_changes_the_table(stored, grids, preset):
    store = stored(tkpo=perfect)
    before = rendering.csv_text(tables.table2(Experiments(store, grids)))
    path = store.path(grid.Run("language_style", "tkpo", 0))
    record = json.loads(path.read_text())
    record["predictions"][0]["prediction"] = "1. Something else"
    path.write_text(json.dumps(record))
    fresh = Store(store.folder.parent, preset)
    assert rendering.csv_text(tables.table2(Experiments(fresh, grids))) != before


def test_seeds_give_a_mean_and_its_spread(stored, grids, preset, tmp_path):
    store = stored(tkpo=perfect)
    second = grid.Run("language_style", "tkpo", 1)
    store.add(second, record_of(second, preset, blank))
    rendering.write(tables.table2(Experiments(store, grids)), tmp_path)
    mean, half = cell(tmp_path, 2, "language style (pilot)", "English", "TKPO", column="R-1").split(" ± ")
    assert mean == "50.0" and half == "50.0"  # one of two seeds is drawn twice in half of the draws
    assert cell(tmp_path, 2, "language style (pilot)", "English", "TKPO", column="seeds") == "2 of 3"


def test_a_table_says_what_it_lacks_until_it_lacks_nothing(stored, grids, preset):
    store = stored(tkpo=perfect)
    results = Experiments(store, grids)
    (note,) = results.notes("table 4")
    assert "python paper/reproduce.py --run --table 4" in note
    assert note in tables.table4(results).notes
    missing = [run for _, runs in results.serving("table 4") for run in runs if not store.get(run)]
    for run in missing[1:]:
        store.add(run, record_of(run, preset, blank))
    assert Experiments(store, grids).notes("table 4") == [note]
    store.add(missing[0], record_of(missing[0], preset, blank))
    assert Experiments(store, grids).notes("table 4") == []


def test_questions_are_answered_from_differences_with_holm(stored, grids):
    questions = [
        grid.Question("more", ("tkpo", ""), ("dpo", ""), "rouge1"),
        grid.Question("same", ("tkpo", ""), ("sft", ""), "rouge1"),
        grid.Question("less", ("dpo", ""), ("sft", ""), "rouge1"),
        grid.Question("not run", ("orpo", ""), ("sft", ""), "rouge1"),
    ]
    results = Experiments(stored(tkpo=perfect, dpo=first_line, sft=perfect), grids, questions=questions)
    found = answers(results).set_index(["training", "language", "question"])
    own = found.loc[("language_style", "en")]
    assert own["verdict"].to_dict() == {"more": "wins", "same": "ties", "less": "loses"}
    assert own.loc["same", "p"] == 1 and own.loc["same", "found"].mean == 0
    more, less = own.loc["more", "found"], own.loc["less", "found"]
    assert more.low <= more.mean <= more.high and more.mean == pytest.approx(-less.mean)
    assert own.loc["more", "p"] >= 3 * more.p  # of six rows of the training, at least three tests remain
    table = tables.table7(results)
    assert any("not run" in note for note in table.notes)


def test_a_question_must_have_its_rows(tmp_path, grids):
    for text, part in (("a: {ours: ppo, theirs: sft, score: rouge1}", "ppo"), ("a: {ours: sft}", "theirs")):
        (tmp_path / "questions.yaml").write_text(text)
        with pytest.raises(TKPOError, match=part):
            grid.load_questions(grids, tmp_path)
    assert len(grid.load_questions(grids)) > 10


def outlines_of(values, seeds=(0,)):
    """A frame with one outline per article and seed."""
    rows = [(f"a{number}", seed, value) for seed in seeds for number, value in enumerate(values)]
    frame = pd.DataFrame(rows, columns=["article", "seed", "x"])
    return frame.assign(dataset="d", language="en", style="s", form="article", method="tkpo")


def test_intervals_are_those_of_the_normal_approximation_and_grow_with_whole_articles():
    import numpy as np

    values = np.random.default_rng(1).normal(50, 10, 400)
    mean, low, high = interval(outlines_of(values), "x")
    half = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean()) and (high - low) / 2 == pytest.approx(half, rel=0.1)
    frame = outlines_of(values)
    frame["article"] = [f"a{i // 10}" for i in range(400)]  # ten outlines each
    frame["x"] = frame.groupby("article")["x"].transform("first")
    _, low, high = interval(frame, "x")
    assert (high - low) / 2 > 2 * half


def test_differences_pair_outlines_and_seeds():
    import numpy as np

    noise = np.random.default_rng(2).normal(50, 30, 60)
    ours, theirs = outlines_of(noise + 1, (0, 1)), outlines_of(noise, (0, 1, 2))
    found = difference(ours, theirs, "x")
    assert found.outlines == 120 and found.mean == pytest.approx(1)
    assert found.low == pytest.approx(1) and found.high == pytest.approx(1) and found.p < 0.001
    base = outlines_of(noise).assign(method="base")
    assert difference(ours, base, "x").outlines == 120  # zero-shot stands beside every seed
    assert difference(ours, theirs.assign(article="other"), "x") is None


def test_a_record_made_with_other_settings_does_not_count(stored, grids, preset, caplog):
    store = stored(tkpo=perfect)
    path = store.path(grid.Run("language_style", "tkpo", 0))
    record = json.loads(path.read_text())
    record["config"]["max_samples"] = 48
    path.write_text(json.dumps(record))
    fresh = Store(store.folder.parent, preset)
    assert fresh.get(grid.Run("language_style", "tkpo", 0)) is None
    assert str(path) in caplog.text and "max_samples 48" in caplog.text
    assert fresh.get(grid.Run("level_of_detail", "tkpo", 0))


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"config": null}', '{"config": null, "evaluation": {}, "predictions": [1]}']
)
def test_a_broken_record_is_named(tmp_path, preset, text):
    store = Store(tmp_path, preset)
    run = grid.Run("language_style", "sft", 0)
    store.path(run).parent.mkdir(parents=True)
    store.path(run).write_text(text)
    with pytest.raises(TKPOError, match=r"sft-seed0\.json"):
        store.get(run)


def test_tuning_chooses_on_validation_and_waits_until_all_tries_of_a_data_set_are_there(grids, preset, tmp_path):
    store = Store(tmp_path, preset)
    tuned = grids["5-tuned"]
    tries = grids["4-tuning"].runs(preset)
    best = {
        (d, m): [r for r in tries if (r.dataset, r.method) == (d, m)][2] for d in tuned.datasets for m in tuned.methods
    }
    last = {dataset: [run for run in tries if run.dataset == dataset][-1] for dataset in tuned.datasets}
    for run in tries:
        if run not in last.values():
            store.add(run, record_of(run, preset, perfect if run in best.values() else first_line))
    assert Experiments(store, grids).tuned(tuned) is None
    for dataset, run in last.items():
        assert dataset not in {r.dataset for r in Experiments(store, grids).tuned(tuned) or []}
        store.add(run, record_of(run, preset, blank))
        assert dataset in {r.dataset for r in Experiments(store, grids).tuned(tuned)}
    found = Experiments(store, grids).tuned(tuned)
    settings = {"dpo": (("beta", 0.5),), "tkpo": (("preference_weight", 0.1),)}  # beside the preset's own
    assert {(r.dataset, r.method): r.settings for r in found} == {key: settings[key[1]] for key in best}
    assert all(r.split == "test" and r.share == 1 for r in found)
    note = next(n for n in tables.table2(Experiments(store, grids)).notes if "*tuned*" in n)
    assert "DPO on language style: beta 0.5, learning_rate 2e-05" in note


def test_a_choice_that_is_the_presets_own_needs_no_other_run(grids, preset, tmp_path):
    store = Store(tmp_path, preset)
    for run in grids["4-tuning"].runs(preset):
        own = dict(run.settings).items() <= vars(grid.run_config(grid.Run(run.dataset, run.method, 0), preset)).items()
        store.add(run, record_of(run, preset, perfect if own else first_line))
    found = Experiments(store, grids).tuned(grids["5-tuned"])
    assert {run.name for run in found} == {
        f"{dataset}/{method}-seed0" for dataset in ("language_style", "level_of_detail") for method in ("dpo", "tkpo")
    }


def test_asking_for_other_seeds_leaves_the_tries_of_the_tuning_as_they_are(grids, preset, tmp_path):
    results = Experiments(Store(tmp_path, preset), grids, seeds=[7])
    runs = {one.name: runs for one, runs in results.serving("table 2")}
    assert {run.seed for run in runs["4-tuning"]} == {0}
    assert {run.seed for run in runs["1-main"]} == {0, 7}  # zero-shot has no seed
    assert all(run.seed == 7 for run in runs["1-main"] if run.method != "base")


def test_an_english_preset_has_no_chinese_rows(grids, tmp_path):
    results = Experiments(Store(tmp_path, grid.load_preset("small")), grids)
    languages = {value for block in tables.table2(results).blocks for value in block.cells["language"]}
    assert languages == {"English", ""}


def test_the_sft_run_comes_before_the_run_that_continues_it(preset, tmp_path):
    from paper.reproduction.runner import Step, _with_needed

    store = Store(tmp_path, preset)
    sft, dpo = (grid.Run("language_style", method, 5) for method in ("sft", "dpo"))
    assert _with_needed(store, dpo, tmp_path, [dpo, sft]) == [Step(sft), Step(dpo)]
    assert _with_needed(store, dpo, tmp_path, [dpo]) == [Step(sft, alone=True), Step(dpo)]
    (tmp_path / sft.name).mkdir(parents=True)
    (tmp_path / sft.name / "metrics.json").write_text("{}")
    assert _with_needed(store, dpo, tmp_path, [dpo]) == [Step(dpo)]


class Pretended:
    """In place of a run's process: ends after two looks, and fails if `failing` names its run."""

    running, most, log, failing = 0, 0, [], ()

    def __init__(self, store, step, work, device, jobs):
        self.run, self.looks, self.share, self.sentinel = step.run, 0, 0.0, os.pipe()[0]
        Pretended.running += 1
        Pretended.most = max(Pretended.most, Pretended.running)
        Pretended.log.append(f"start {step.run.method}")

    @property
    def alive(self):
        self.looks += 1
        return self.looks < 2

    def finish(self, store):
        Pretended.running -= 1
        if self.run.method in self.failing:
            raise TKPOError(f"{self.run.method} broke")
        Pretended.log.append(f"end {self.run.method}")

    def stop(self):
        Pretended.log.append(f"stop {self.run.method}")


@pytest.fixture
def pretend(preset, tmp_path, monkeypatch):
    """Does runs of these methods, so many at a time, with pretended processes."""
    from paper.reproduction import runner

    monkeypatch.setattr(runner, "RunProcess", Pretended)
    monkeypatch.setattr(runner.multiprocessing.connection, "wait", lambda *_, **__: None)

    def go(*methods, jobs=1, failing=()):
        Pretended.running, Pretended.most, Pretended.log, Pretended.failing = 0, 0, [], failing
        runs = [grid.Run("language_style", method, 0) for method in methods]
        runner.do_runs(Store(tmp_path, preset), runs, tmp_path, "cpu", jobs)
        return Pretended.log

    return go


def test_so_many_runs_at_a_time_and_dpo_after_its_sft(pretend):
    assert pretend("sft", "dpo", "tkpo")[:2] == ["start sft", "end sft"] and Pretended.most == 1
    log = pretend("dpo", "orpo", "base", "tkpo", "sft", jobs=3)
    assert Pretended.most == 3 and log.index("end sft") < log.index("start dpo")
    assert len([line for line in log if line.startswith("end")]) == 5


@pytest.mark.parametrize("methods", [("sft", "dpo", "tkpo"), ("dpo", "tkpo")], ids=["recorded", "for its adapter"])
def test_runs_whose_sft_run_failed_are_left_out_and_named(pretend, methods):
    with pytest.raises(TKPOError, match=r"sft broke\nrun language_style/dpo-seed0 was left out: .*sft-seed0"):
        pretend(*methods, failing=("sft",))
    assert "end tkpo" in Pretended.log and "start dpo" not in Pretended.log


def test_an_interrupt_stops_all_that_run(pretend, monkeypatch):
    from paper.reproduction import runner

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner.multiprocessing.connection, "wait", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretend("tkpo", "orpo", "base", jobs=2)
    assert Pretended.log == ["start tkpo", "start orpo", "stop tkpo", "stop orpo"]


def test_costs_of_two_machines_are_never_put_together(stored, grids, preset):
    store = stored(sft=perfect, tkpo=perfect)
    gpu = grid.Run("language_style", "dpo", 0)
    store.add(gpu, record_of(gpu, preset, perfect, seconds=0.1, cpu="another"))
    blocks = tables.table3(Experiments(store, grids)).blocks
    found = {block.caption: block.cells for block in blocks if block.caption.startswith("Whole")}
    assert len(found) == 2
    for caption, cells in found.items():
        assert ("DPO" in set(cells["method"])) == ("another" in caption)
    every = pd.concat(found.values()).set_index(["data set", "method"])
    assert (
        every.loc[("language style (pilot)", "DPO"), "s whole pipeline"] == "–"
    )  # its SFT run is from the other machine
    # without validation:
    assert float(every.loc[("language style (pilot)", "TKPO"), "s to train"]) == 2.0 * 10 - 2 * 0.5


def test_the_pipeline_of_dpo_has_its_sft_run_in_it(stored, grids):
    results = Experiments(stored(sft=perfect, tkpo=perfect, dpo=perfect), grids)
    block = next(b for b in tables.table3(results).blocks if b.caption.startswith("Whole"))
    whole = block.cells.set_index(["data set", "method"])["s whole pipeline"]["language style (pilot)"].astype(float)
    assert whole["DPO"] == 2 * whole["TKPO"]


def test_table_3_reads_the_benchmark(stored, grids):
    store = stored(sft=perfect)
    methods = [
        {
            "key": k,
            "label": k.upper(),
            "median": m,
            "quartiles": [m, m],
            "tokens_per_second": 9,
            "peak_memory_mib": 1,
            "peak_process_mib": 2,
        }
        for k, m in (("tkpo", 1.0), ("dpo", 2.5))
    ]
    methods.append({"key": "llamafactory_sft", "label": "LF", "error": "absent"})
    bench = {
        "model": PRESET,
        "finetuning": "lora",
        "dtype": "float32",
        "batch_size": 1,
        "tokens": {"mean": 400},
        "ratios": {"tkpo/dpo": 0.43},
    }
    bench |= {"machine": {"processor": "CPU", "threads": 2, "gpu": None}, "methods": methods}
    folder = store.folder.parent / "benchmark"
    folder.mkdir()
    (folder / "x.json").write_text(json.dumps(bench))
    (folder / "loss-head.json").write_text("{}")
    rows = tables.table3(Experiments(store, grids)).blocks[0].cells.set_index("method").to_dict("index")
    assert set(rows) == {"TKPO", "DPO"}
    assert (rows["TKPO"]["× DPO"], rows["TKPO"]["× DPO counted"]) == ("0.43", "0.50")
    assert rows["TKPO"]["× DPO published"] == "0.5625"


def test_table_1_counts_the_files(grids, preset, tmp_path):
    rendering.write(tables.table1(Experiments(Store(tmp_path, preset), grids)), tmp_path)
    raw = json.loads((ROOT / "data" / "language_style" / "train.zh.json").read_text())
    for attribute in ("literary", "objective"):
        own = [r for r in raw if r["attribute"] == attribute]
        where = ("language style", "Chinese", "train", attribute)
        assert cell(tmp_path, 1, *where, column="samples") == str(len(own))
        assert cell(tmp_path, 1, *where, column="topic only") == str(sum(r["form"] == "topic" for r in own))
        lines = [len(r["output"].split("\n")) for r in own]
        assert cell(tmp_path, 1, *where, column="headings") == f"{statistics.mean(lines):.1f}"


def test_latex_is_balanced_and_escaped(stored, grids):
    text = rendering.latex(tables.table2(Experiments(stored(sft=perfect), grids)))
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == text.count(r"\label{tab:2") == 1
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert len({line.count(" & ") for line in body if "R-1" in line or "SFT" in line}) <= 2
    assert not re.search(r"(?<!\\)[%_#]", "\n".join(body))


# ---- figures and the whole script

NO_TORCH = """
import socket, sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"no {name} here")
sys.meta_path.insert(0, NoTorch())
def refuse(*a, **k): raise OSError("no network here")
socket.socket.connect = refuse
from paper import reproduce
sys.exit(reproduce.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory, preset):
    """Every table and figure of some stored runs, made twice, without torch and network."""
    folder = tmp_path_factory.mktemp("paper")
    store = Store(folder / "results", preset)
    for dataset in ("language_style", "level_of_detail"):
        for method, predict in (("sft", perfect), ("tkpo", perfect), ("dpo", first_line)):
            run = grid.Run(dataset, method, 0)
            store.add(run, record_of(run, preset, predict))
    for name in ("one", "two"):
        command = [sys.executable, "-c", NO_TORCH, "--all", "--format", "md"]
        command += ["--results", str(folder / "results"), "--output", str(folder / name)]
        env = {**os.environ, "PYTHONHASHSEED": {"one": "1", "two": "2"}[name], "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, timeout=500)
        assert done.returncode == 0, done.stderr
        assert "Glyph" not in done.stderr and "missing from font" not in done.stderr
        time.sleep(1.1)  # so that a date in a file would show
    return folder


def test_every_table_and_figure_is_made_the_same_twice(everything):
    names = {str(p.relative_to(everything / "one")) for p in (everything / "one").rglob("*.*")}
    figures = {
        f"figures/{n}.{e}"
        for n in ("figure1-en", "figure1-zh", "figure2", "figure3", "figure4")
        for e in ("png", "pdf")
    }
    assert names == figures | {f"tables/table{n}.{e}" for n in grid.TABLES for e in ("md", "csv", "tex")} | {
        "tables/outlines.parquet"
    }
    for name in names:
        assert (everything / "one" / name).read_bytes() == (everything / "two" / name).read_bytes(), name


def test_pdfs_hold_no_date_and_figures_are_not_empty(everything):
    from matplotlib import image

    for path in (everything / "one" / "figures").iterdir():
        data = path.read_bytes()
        assert not re.search(rb"CreationDate|ModDate|tIME", data), path
        if path.suffix == ".png":
            assert image.imread(path)[..., :3].std() > 0.02, path


def test_the_font_has_every_chinese_character_of_the_corpus():
    from matplotlib.ft2font import FT2Font

    from paper.reproduction.figures.style import FONT

    known = set(FT2Font(str(FONT)).get_charmap())
    for path in (ROOT / "data" / "corpus").glob("zh-*.jsonl"):
        missing = {c for c in path.read_text() if ord(c) > 32} - set(map(chr, known))
        assert not missing, path


def test_the_projects_own_tables_are_those_of_its_results(tmp_path):
    done = reproduce("--table", *grid.TABLES, "--format", "md", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    for path in (tmp_path / "tables").iterdir():
        assert path.read_bytes() == (ROOT / "paper" / "tables" / path.name).read_bytes(), (
            f"{path.name} is not what the results give: run python paper/reproduce.py --all"
        )


PAGES = {
    "README.md": ("scores", "topics"),
    "docs/results.md": ("outlines",),
    "paper/README.md": ("findings",),
    "paper/speed.md": ("steps", "articles", "head"),
}


def test_the_projects_own_pages_say_what_its_results_say(grids, preset, tmp_path):
    (tmp_path / "paper").mkdir()
    (tmp_path / "docs").mkdir()
    for name, sections in PAGES.items():
        text = (ROOT / name).read_text()
        for section in sections:
            text = re.sub(rf"(<!-- {section} -->\n).*?(<!-- /{section} -->)", r"\1old\n\2", text, flags=re.DOTALL)
        assert text.count("old\n<!--") == len(sections)
        (tmp_path / name).write_text(text)
    store, questions = Store(ROOT / "paper" / "results", preset), grid.load_questions(grids)
    pages.write(Experiments(store, grids, questions=questions), tmp_path)
    for name in PAGES:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), (
            f"{name} is not what the results give: run python paper/reproduce.py --all"
        )


def test_ratios_stand_beneath_their_aims(tmp_path):
    bench = {"model": "m", "finetuning": "lora", "dtype": "float32", "batch_size": 2, "attribute_last": True}
    bench |= {"machine": {"processor": "CPU"}, "memory_ratios": {"tkpo/dpo": 0.604}}
    bench["ratios"] = {"tkpo/dpo": 0.504, "tkpo/dpo_precomputed": 0.712, "tkpo/trl_sft": None}
    (tmp_path / "one.json").write_text(json.dumps(bench))
    (tmp_path / "ideas.json").write_text("{}")
    head, _, aims, row = pages.steps(tmp_path).splitlines()
    found = dict(zip(head.split(" | "), zip(aims.split(" | "), row.split(" | "), strict=True), strict=True))
    assert row.startswith("| `m`, lora, float32, batch 2, attribute last (CPU) |")
    assert found["DPO (TRL)"] == ("≤ 0.50", "**0.50**") and found["DPO, reference precomputed"] == ("≤ 0.70", "0.71")
    assert found["SFT (TRL)"] == ("≤ 1.33", "–") and found["memory: DPO (TRL)"] == ("≤ 0.60", "**0.60**")
    assert pages.head(tmp_path) is None


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["--table"]),
        (["--all", "--preset", "huge"], ["'huge'", "qwen2.5-3b"]),
        (["--run", "--only", "language_style/ppo-seed0"], ["ppo-seed0", "--list"]),
        (["--only", "x"], ["--run"]),
        (["--import-run", "x"], ["--predictions"]),
        (["--import-run", "none", "--predictions", "none.json"], ["none.json"]),
        (["--all", "--experiments", "/none"], ["/none"]),
        (["--run", "--preset", "tiny", "--results", "/tmp/none", "--table", "4", "--device", "gpu"], ["'gpu'", "cuda"]),
    ],
)
def test_wrong_arguments_are_explained(arguments, parts):
    done = reproduce(*arguments)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for part in parts:
        assert part in done.stderr


def test_figures_do_not_see_the_fonts_of_the_machine(tmp_path):
    import matplotlib
    from matplotlib import font_manager

    from paper.reproduction.figures import style

    copy = tmp_path / "system-font.otf"  # of the same name, as an installed Noto Sans CJK SC is
    shutil.copy(style.FONT, copy)
    font_manager.fontManager.addfont(str(copy))
    style.setup()
    name = font_manager.FontProperties(fname=str(style.FONT)).get_name()
    assert font_manager.findfont(name) == str(style.FONT)
    assert font_manager.findfont("DejaVu Sans").startswith(matplotlib.get_data_path())
    assert str(copy) not in {font.fname for font in font_manager.fontManager.ttflist}


# ---- making runs, on the preset tiny


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """A folder of experiments as small as can be, of the same kinds as the project's."""
    folder = tmp_path_factory.mktemp("experiments")
    tiny = yaml.safe_load((grid.FOLDER / "presets.yaml").read_text())["tiny"]
    tiny["datasets"] = {"language_style": {"max_samples": 4, "limit": 1, "max_new_tokens": 8}}
    tiny["train"]["eval_steps"] = 0
    (folder / "presets.yaml").write_text(yaml.safe_dump({"tiny": tiny}))
    common = {"datasets": ["language_style"], "seeds": [0]}
    for name, values in {
        "1-main": {"serves": ["table 2", "table 3", "figure 4"], "methods": ["base", "sft", "tkpo", "dpo"]},
        "2-tuning": {
            "serves": ["table 2"],
            "methods": ["tkpo"],
            "split": "validation",
            "variants": {"tkpo": [{"tau": 0.3}, {"tau": 0.5}]},
        },
        "3-tuned": {
            "serves": ["table 2"],
            "methods": ["tkpo"],
            "label": "tuned",
            "tuned_by": {"grid": "2-tuning", "score": "rougeL_numbered"},
        },
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"title": name, **common, **values}))
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, experiments, tiny_folder):
    """Runs the script on these experiments; `folder` keeps what it leaves."""
    folder = tmp_path_factory.mktemp("pipeline")
    env = {**os.environ, "TKPO_CACHE": str(tiny_folder.parents[1]), "OMP_NUM_THREADS": "1"}

    def go(*arguments, **more):
        options = ["--preset", "tiny", "--experiments", experiments, "--results", folder]
        return reproduce(*options, *arguments, env=env, **more)

    go.folder, go.env, go.records = folder, env, folder / "tiny" / "language_style"
    return go


def digests(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.json")}


def test_from_nothing_to_tables_survives_being_killed(pipeline, experiments):
    command = [sys.executable, SCRIPT, "--preset", "tiny", "--experiments", str(experiments)]
    command += ["--results", str(pipeline.folder), "--run", "--table", "2"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=pipeline.env,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    give_up = time.monotonic() + 400
    while not (pipeline.records / "sft-seed0.json").exists():
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = digests(pipeline.records)
    assert before and "dpo-seed0.json" not in before

    done = pipeline("--run", "--table", "2", "3", "--figure", "4", "--format", "md")
    assert done.returncode == 0, done.stderr
    after = digests(pipeline.records)
    assert {name: after[name] for name in before} == before, "a stored run was made again"
    methods = {name.split("-")[0] for name in after}
    assert methods == {"base", "sft", "tkpo", "dpo"}
    assert sum("validation" in name for name in after) == 2
    assert sum("tau=" in name and "validation" not in name for name in after) == 1
    rows = list(csv.reader((pipeline.folder / "tiny" / "tables" / "table2.csv").read_text().splitlines()))
    rows = [row for row in rows if row[:2] == ["language style", "English"]]
    for name in ("zero-shot", "SFT", "DPO", "TKPO", "TKPO, tuned"):
        row = next(r for r in rows if r[2] == name)
        assert row[3] == "1" and "†" not in row, row
    record = json.loads((pipeline.records / "dpo-seed0.json").read_text())
    assert record["continues"] == "language_style/sft-seed0" and record["training"]["samples"] == 4
    assert record["environment"]["revision"] and record["training"]["peak_memory_mib"] > 0
    assert "scores" not in record and str(pipeline.folder) not in json.dumps(record)


def test_a_deleted_result_alone_is_made_again(pipeline):
    if not (pipeline.records / "dpo-seed0.json").exists():
        pytest.fail("the pipeline did not finish")
    before = digests(pipeline.records)
    old = json.loads((pipeline.records / "tkpo-seed0.json").read_text())
    (pipeline.records / "tkpo-seed0.json").unlink()
    assert "missing: language_style/tkpo-seed0" in pipeline("--list", "--table", "2").stdout
    done = pipeline("--run", "--table", "2", "--format", "csv")
    assert done.returncode == 0, done.stderr
    lines = done.stderr.replace("\r", "\n")
    assert re.findall(r"^\[(\d+/\d+)\] (\S+)", lines, re.MULTILINE) == [("1/1", "language_style/tkpo-seed0")]
    new = json.loads((pipeline.records / "tkpo-seed0.json").read_text())
    assert new["training"]["seconds"] != old["training"]["seconds"], "it was not trained again"
    assert new["predictions"] == old["predictions"]
    after = digests(pipeline.records)
    assert {n: d for n, d in after.items() if n != "tkpo-seed0.json"} == {
        n: d for n, d in before.items() if n != "tkpo-seed0.json"
    }
    assert "nothing to run" in pipeline("--run", "--only", "language_style/tkpo-seed0").stderr


def test_a_run_of_the_tkpo_commands_is_imported(pipeline, tmp_path):
    from tkpo.evaluation import evaluate
    from tkpo.generation import OutlineGenerator

    if not (pipeline.records / "dpo-seed0.json").exists():
        pytest.fail("the pipeline did not finish")
    folder = pipeline.folder / "runs" / "tiny" / "language_style" / "sft-seed0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TKPO_CACHE", pipeline.env["TKPO_CACHE"])
        generator = OutlineGenerator("tiny", {"adapter": folder}, "float32", "cpu")
        for name, count in (("right", 8), ("wrong", 9)):
            output = tmp_path / f"{name}.json"
            evaluate(
                generator,
                "adapter",
                output,
                "language_style",
                limit=1,
                max_new_tokens=count,
                adapter_source=str(folder),
            )
    made = json.loads((pipeline.records / "sft-seed0.json").read_text())
    (pipeline.records / "sft-seed0.json").unlink()
    done = pipeline("--import-run", folder, "--predictions", tmp_path / "wrong.json")
    assert done.returncode == 2 and "max_new_tokens 9" in done.stderr and "Traceback" not in done.stderr
    done = pipeline("--import-run", "base", "--predictions", tmp_path / "right.json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    done = pipeline("--import-run", folder, "--predictions", tmp_path / "right.json")
    assert done.returncode == 0 and done.stdout.strip().endswith("sft-seed0.json")
    imported = json.loads((pipeline.records / "sft-seed0.json").read_text())
    for key in ("config", "training", "log", "adapter_sha256", "predictions"):
        assert imported[key] == made[key], key


def test_a_run_that_fails_names_its_log(experiments, pipeline, tmp_path):
    broken = tmp_path / "experiments"
    shutil.copytree(experiments, broken)
    table = yaml.safe_load((broken / "presets.yaml").read_text())
    table["tiny"]["train"]["max_length"] = 8
    (broken / "presets.yaml").write_text(yaml.safe_dump(table))
    command = ("--preset", "tiny", "--experiments", broken, "--results", tmp_path / "results", "--run")
    done = reproduce(*command, "--only", "language_style/sft-seed0", env=pipeline.env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "max_length 8" in done.stderr and "sft-seed0.log" in done.stderr
    assert not list((tmp_path / "results").rglob("*-seed0.json"))


def test_runs_made_together_are_those_made_alone_but_not_timed(experiments, pipeline, tmp_path):
    names = [f"language_style/{method}-seed0" for method in ("dpo", "base", "sft", "tkpo")]  # dpo waits for sft
    options = ["--preset", "tiny", "--experiments", experiments, "--results", tmp_path]
    done = reproduce(*options, "--run", "--jobs", "3", "--only", *names, env=pipeline.env)
    assert done.returncode == 0, done.stderr
    for name in names:
        record = json.loads((tmp_path / "tiny" / f"{name}.json").read_text())
        alone = json.loads((pipeline.folder / "tiny" / f"{name}.json").read_text())
        assert record["jobs"] == 3 and "jobs" not in alone
        assert record["predictions"] == alone["predictions"]
        assert record.get("adapter_sha256") == alone.get("adapter_sha256")
    whole = "Whole training runs on"
    assert whole in pipeline("--table", "3", "--format", "md").stdout
    assert whole not in reproduce(*options, "--table", "3", "--format", "md", env=pipeline.env).stdout
    assert reproduce(*options, "--run", "--jobs", "0", "--table", "2", env=pipeline.env).returncode == 2


def test_a_run_that_fails_keeps_only_those_that_need_it_from_being_done(experiments, pipeline, tmp_path):
    broken = tmp_path / "experiments"
    shutil.copytree(experiments, broken)
    table = yaml.safe_load((broken / "presets.yaml").read_text())
    table["tiny"]["methods"]["sft"] = {"max_length": 8}
    (broken / "presets.yaml").write_text(yaml.safe_dump(table))
    command = ("--preset", "tiny", "--experiments", broken, "--results", tmp_path / "results", "--run", "--only")
    names = [f"language_style/{method}-seed0" for method in ("sft", "dpo", "base")]
    done = reproduce(*command, *names, env=pipeline.env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "sft-seed0.log" in done.stderr and "dpo-seed0 was left out" in done.stderr
    assert [p.name for p in (tmp_path / "results" / "tiny").rglob("*.json")] == ["base-seed0.json"]


def test_a_gpu_takes_the_samples_of_a_step_at_once(preset, tmp_path, monkeypatch):
    from paper.reproduction import process

    store = Store(tmp_path, preset)
    sizes = {}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(process, "device_type", lambda _, device=device: device)
        for method in ("tkpo", "orpo"):
            run = grid.Run("language_style", method, 0)
            sizes[device, method] = process._config(store, run, tmp_path, device, restart=False)
    assert {key: config.micro_batch_size for key, config in sizes.items()} == {
        ("cpu", "tkpo"): 1,
        ("cpu", "orpo"): 1,
        ("cuda", "tkpo"): 4,
        ("cuda", "orpo"): 2,
    }
    begun = tmp_path / run.name / "config.json"
    begun.parent.mkdir(parents=True)
    begun.write_text(json.dumps({"micro_batch_size": 1}))  # it goes on as it began
    assert process._config(store, run, tmp_path, "cuda", restart=False).micro_batch_size == 1
    assert process._config(store, run, tmp_path, "cuda", restart=True).micro_batch_size == 2
    assert not grid.differences(run, preset, vars(sizes["cuda", "orpo"]), grid.evaluation(run, preset))
