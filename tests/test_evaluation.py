"""Predictions that can be interrupted, and what makes them the same evaluation."""

import json
import shutil

import pytest
from random_adapters import random_adapter

from tkpo.attributes import get_axis
from tkpo.data import make_record, records_digest
from tkpo.errors import TKPOError
from tkpo.evaluation import evaluate, predict
from tkpo.generation import OutlineGenerator
from tkpo.sampling import Decoding

AXIS = get_axis("language_style")
SHORT = Decoding(max_new_tokens=6)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {name: random_adapter(root / name, seed) for seed, name in enumerate(("one", "two"))}


@pytest.fixture(scope="module")
def generator(adapters):
    return OutlineGenerator("tiny", {"adapter": adapters["one"]}, "float32", "cpu")


@pytest.fixture
def records():
    """Three records with one id, attribute and form: nothing but their place tells them apart."""
    rows = [make_record(AXIS, "literary", topic) for topic in ("Salt", "Bread and butter", "Rain over the whole city")]
    return [{**row, "id": "same", "output": "1. A\n2. B"} for row in rows]


class Counting:
    """A generator that says how many outlines were really written."""

    def __init__(self, generator):
        self.generator = generator
        self.identity = generator.identity
        self.written = 0

    def each(self, records, *args, **options):
        for pair in self.generator.each(records, *args, **options):
            self.written += 1
            yield pair


def run(generator, records, part, **options):
    counting = Counting(generator)
    options = {"part": part, "progress": False, "decoding": SHORT, **options}
    return predict(counting, records, "adapter", **options), counting.written


def test_every_record_keeps_its_own_prediction(generator, records, tmp_path):
    texts, written = run(generator, records, tmp_path / "part")
    assert written == 3 and texts == [generator.generate([r], "adapter", max_new_tokens=6)[0] for r in records]
    assert len(set(texts)) == 3, "the texts should differ, or this test shows nothing"


def test_an_interrupted_prediction_is_resumed(generator, records, tmp_path):
    part = tmp_path / "part"
    whole, _ = run(generator, records, part)
    lines = part.read_text(encoding="utf-8").splitlines(keepends=True)
    part.write_text("".join(lines[:2]) + lines[2][:9], encoding="utf-8")  # killed in the middle of a line
    assert run(generator, records, part) == (whole, 2)
    assert run(generator, records, part) == (whole, 0)
    assert all(json.loads(line) for line in part.read_text(encoding="utf-8").splitlines())


def test_sampled_predictions_do_not_depend_on_where_they_were_interrupted(generator, records, tmp_path):
    part, decoding = tmp_path / "part", Decoding(max_new_tokens=8, temperature=1.5, seed=4)
    whole, _ = run(generator, records, part, decoding=decoding)
    kept = part.read_text(encoding="utf-8").splitlines(keepends=True)[:2]
    part.write_text("".join(kept), encoding="utf-8")
    assert run(generator, records, part, decoding=decoding, batch_size=1) == (whole, 2)


@pytest.mark.parametrize(
    "decoding",
    [
        {"max_new_tokens": 7},
        {"guard": "none"},
        {"style_strength": 1.0},
        {"temperature": 1.0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 1.0, "min_p": 0.1},
    ],
)
def test_other_settings_take_nothing_over(generator, records, tmp_path, decoding):
    part = tmp_path / "part"
    for earlier in ({}, {"temperature": 1.0}):
        if {**earlier} != decoding:
            run(generator, records, part, decoding=Decoding(**{"max_new_tokens": 6, **earlier}))
            assert run(generator, records, part, decoding=Decoding(**{"max_new_tokens": 6, **decoding}))[1] == 3


def test_other_records_and_other_weights_take_nothing_over(generator, records, adapters, tmp_path):
    part, folder = tmp_path / "part", tmp_path / "adapter"
    run(generator, records, part)
    changed = [records[0], {**records[1], "input": "Topic: Other"}, records[2]]
    assert run(generator, changed, part)[1] == 3
    assert run(generator, [records[1], records[0], records[2]], part)[1] == 3
    made = []
    for name in ("one", "two"):  # trained again in the same folder
        shutil.copytree(adapters[name], folder, dirs_exist_ok=True)
        made.append(run(OutlineGenerator("tiny", {"adapter": folder}, "float32", "cpu"), records, part))
    assert [count for _, count in made] == [3, 3] and made[0][0] != made[1][0]
    base = OutlineGenerator("tiny", {"adapter": folder}, "bfloat16", "cpu")
    assert run(base, records, part)[1] == 3
    ordered = OutlineGenerator("tiny", {}, "float32", "cpu", base_prompt_order="article_first")
    plain = OutlineGenerator("tiny", {}, "float32", "cpu")
    assert ordered.identity("base") != plain.identity("base")


def test_the_digest_sees_every_field_and_the_order(records):
    digest = records_digest(records)
    assert digest == records_digest([dict(reversed(r.items())) for r in records])
    assert digest != records_digest(records[::-1])
    for field, value in (("input", "x"), ("output", "1. C"), ("attribute", "objective"), ("system", "You are…")):
        assert digest != records_digest([{**records[0], field: value}, *records[1:]])


def test_predictions_say_how_they_were_made(generator, tmp_path, monkeypatch):
    rows = [{**make_record(AXIS, a, t), "output": f"1. {t} {a}\n2. End"} for t in ("Salt", "Sea") for a in AXIS.flip]
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    info = {"language_style_en_train": {"file_name": "mine.json"}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    options = {"axis": "language_style", "data_dir": str(tmp_path), "max_new_tokens": 4}
    data = str(tmp_path / "mine.json")
    guarded = evaluate(generator, "adapter", tmp_path / "a.json", data, **options)
    free = evaluate(generator, "adapter", tmp_path / "b.json", data, guard="none", temperature=0.7, seed=2, **options)
    assert guarded["settings"]["guard"] == "structure-1" and guarded["settings"]["decoding"] == "greedy"
    assert (free["settings"]["guard"], free["settings"]["decoding"], free["settings"]["seed"]) == (
        "none",
        "sampling",
        2,
    )
    assert {"adapter_sha256", "model_sha256", "dtype", "prompt_order", "records_sha256"} <= set(free["settings"])
    assert json.loads((tmp_path / "a.json").read_text())["samples"] == guarded["samples"]
    monkeypatch.setattr(generator, "each", lambda *args, **kwargs: pytest.fail("predicted before the check"))
    for bad in (tmp_path, tmp_path / "a.json" / "c.json"):
        with pytest.raises(TKPOError, match="cannot write"):
            evaluate(generator, "adapter", bad, data, **options)


# ---- a user's own axis

MOOD = """
attributes: {merry: {en: merry}, grim: {en: grim}}
axes: {mood: {merry: grim, grim: merry}}
"""


@pytest.fixture
def mood(tmp_path):
    """A folder with an axes table, test records and training records of its own."""
    (tmp_path / "mood.yaml").write_text(MOOD, encoding="utf-8")
    outlines = {"merry": "1. Laughter at noon\n2. A dance", "grim": "1. Ashes at night\n2. A grave"}
    rows = [
        {"instruction": f"Be {mood}.", "input": f"Topic: day {i}", "output": outlines[mood]}
        for i in range(3)
        for mood in outlines
    ]
    (tmp_path / "train.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "test.json").write_text(json.dumps(rows[:2]), encoding="utf-8")
    return tmp_path


def evaluate_mood(generator, folder, name="scores.json", **options):
    return evaluate(
        generator,
        "base",
        folder / name,
        str(folder / "test.json"),
        axis="mood",
        axes_file=str(folder / "mood.yaml"),
        max_new_tokens=4,
        **options,
    )


def test_an_own_axis_without_training_outlines_is_scored_without_control(generator, mood, caplog):
    result = evaluate_mood(generator, mood)
    assert "without control" in caplog.text and "--style-data" in caplog.text and "mood" in caplog.text
    assert result["scores"]["en"]["control"] is None and result["scores"]["en"]["rouge1"] is not None
    assert [row["attribute"] for row in result["samples"]] == ["merry", "grim"]
    assert {row["axis"] for row in result["samples"]} == {"mood"}


def test_an_own_axis_with_training_outlines_has_control(generator, mood, caplog):
    result = evaluate_mood(generator, mood, style_data=str(mood / "train.json"))
    assert "without control" not in caplog.text
    assert result["settings"]["style_data"] == str(mood / "train.json")
    assert result["scores"]["en"]["reference_control"] == 100
    assert 0 <= result["scores"]["en"]["control"] <= 100


def test_style_data_that_lacks_a_style_is_refused_before_a_word_is_written(generator, mood):
    rows = json.loads((mood / "train.json").read_text(encoding="utf-8"))
    (mood / "merry.json").write_text(json.dumps(rows[::2]), encoding="utf-8")
    with pytest.raises(
        TKPOError, match=r"record 2 asks for 'grim' \(axis mood, language en\).*merry\.json has no outline"
    ):
        evaluate_mood(generator, mood, style_data=str(mood / "merry.json"))
    with pytest.raises(TKPOError, match=r"none\.json"):
        evaluate_mood(generator, mood, style_data=str(mood / "none.json"))
