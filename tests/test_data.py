"""The data sets: built as committed, split without leaks, loaded and checked with the place of every fault."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from tkpo.attributes import get_axis
from tkpo.cli import main
from tkpo.data import (
    annotate,
    build,
    check,
    data_dir,
    load_records,
    make_record,
    read_rows,
    split_of,
    user_message,
)
from tkpo.errors import TKPOError

DATA = Path(__file__).parents[1] / "data"
CORPUS = [json.loads(x) for f in sorted((DATA / "corpus").glob("*.jsonl")) for x in f.open(encoding="utf-8")]
ARTICLE = {a["id"]: a for a in CORPUS}
FLIP = {
    "language_style": {"literary": "objective", "objective": "literary"},
    "level_of_detail": {"comprehensive": "concise", "concise": "objective", "objective": "concise"},
}
FILES = [(d, s, la) for d in FLIP for s in ("train", "validation", "test") for la in ("en", "zh")]


def rows_of(dataset, split, lang, pairs=False, root=DATA):
    path = root / dataset / f"{split}.{lang}{'.pairs' if pairs else ''}.json"
    return json.loads(path.read_text(encoding="utf-8"))


def write_corpus(folder, articles, name="a.jsonl"):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in articles)
    (folder / name).write_text(lines, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    return out, build(DATA / "corpus", out)


# ---- building


def test_the_committed_files_are_what_the_corpus_builds(built):
    out, counts = built
    made = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    committed = {p.relative_to(DATA).as_posix() for p in DATA.rglob("*.json")}
    assert set(made) == committed == {"dataset_info.json", *counts}
    for name, content in made.items():
        assert content == (DATA / name).read_bytes(), name
        assert b"\r" not in content


def test_counts_are_the_records_written(built):
    out, counts = built
    assert len(counts) == 24
    assert all(len(json.loads((out / name).read_text(encoding="utf-8"))) == count for name, count in counts.items())


def test_dataset_info_names_every_file_with_its_columns(built):
    out, counts = built
    info = json.loads((out / "dataset_info.json").read_text(encoding="utf-8"))
    assert {entry["file_name"] for entry in info.values()} == set(counts)
    for name, entry in info.items():
        row = json.loads((out / entry["file_name"]).read_text(encoding="utf-8"))[0]
        assert set(entry["columns"].values()) <= set(row)
        assert entry.get("ranking", False) is name.endswith("_pairs") is ("chosen" in entry["columns"])


def test_no_article_stands_in_two_splits():
    where = {}
    for dataset, split, lang in FILES:
        for pairs in (False, True):
            for row in rows_of(dataset, split, lang, pairs):
                article = ARTICLE[row["id"]]
                for key in (("document", article["document"]), ("topic", article["topic"].lower())):
                    assert where.setdefault(key, split) == split
                if row["form"] == "article":
                    assert row["input"].endswith(article["document"])
    assert len({key for kind, key in where if kind == "document"}) == len(CORPUS) == 560


def test_every_article_stands_once_an_attribute():
    for dataset, flip in FLIP.items():
        for lang in ("en", "zh"):
            seen = [(r["id"], r["attribute"]) for s in ("train", "validation") for r in rows_of(dataset, s, lang)] + [
                (r["id"], r["attribute"]) for r in rows_of(dataset, "test", lang) if r["form"] == "article"
            ]
            assert len(seen) == len(set(seen))
            assert set(seen) == {(a["id"], at) for a in CORPUS if a["lang"] == lang for at in flip}


def test_splits_are_80_10_10_by_a_hash_of_the_words_alone():
    for article in CORPUS:
        words = " ".join(article["document"].split())
        digest = hashlib.sha256(words.encode("utf-8")).hexdigest()
        due = (["train"] * 8 + ["validation", "test"])[int(digest[:16], 16) % 10]
        assert split_of(article["document"]) == due
        assert split_of("\n" + article["document"].replace("\n\n", " \n")) == due


def test_splits_stay_when_articles_come_and_the_order_changes(tmp_path):
    old = random.Random(1).sample(CORPUS, 60)
    new = old + [{**a, "id": f"{a['id']}-more"} for a in CORPUS if a not in old][:30]
    random.Random(2).shuffle(new)
    before, after = {}, {}
    for name, articles, into in (("old", old, before), ("new", new, after)):
        build(write_corpus(tmp_path / f"{name}-corpus", articles), tmp_path / name)
        for path in (tmp_path / name).glob("*/*.json"):
            split = path.name.split(".")[0]
            for row in json.loads(path.read_text(encoding="utf-8")):
                key = (row["id"], row["axis"], row["attribute"], row["form"])
                into.setdefault(key, set()).add(split)
    assert all(len(splits) == 1 for splits in after.values())
    assert {key: after[key] for key in before} == before  # the same samples, topic-only ones too


def test_about_a_third_of_the_training_samples_are_topics_alone():
    for dataset in FLIP:
        for attribute in FLIP[dataset]:
            rows = [r for la in ("en", "zh") for r in rows_of(dataset, "train", la) if r["attribute"] == attribute]
            assert 0.28 < sum(r["form"] == "topic" for r in rows) / len(rows) < 0.39


def test_the_test_split_has_both_forms_of_each_sample():
    for dataset in FLIP:
        for lang in ("en", "zh"):
            forms = {}
            for row in rows_of(dataset, "test", lang):
                forms.setdefault((row["id"], row["attribute"]), []).append(row["form"])
            assert forms and all(found == ["article", "topic"] for found in forms.values())


@pytest.mark.parametrize(("dataset", "split", "lang"), FILES)
def test_records_carry_their_articles_outline_and_prompt(dataset, split, lang):
    for row in rows_of(dataset, split, lang):
        article = ARTICLE[row["id"]]
        assert row["output"] == article["outlines"][row["attribute"]]
        assert (row["lang"], row["axis"]) == (article["lang"], dataset) == (lang, dataset)
        if row["form"] == "topic":
            assert row["input"] == ("Topic: " if lang == "en" else "主题：") + article["topic"]
        else:
            assert row["input"] == (
                f"Topic: {article['topic']}\n\n{article['document']}" if lang == "en" else article["document"]
            )


@pytest.mark.parametrize(("dataset", "split", "lang"), FILES)
def test_a_pair_rejects_the_flipped_attributes_outline_of_the_same_article(dataset, split, lang):
    rows, pairs = rows_of(dataset, split, lang), rows_of(dataset, split, lang, pairs=True)
    assert len(rows) == len(pairs)
    for row, pair in zip(rows, pairs, strict=True):
        assert pair["chosen"] == row["output"]
        assert pair["rejected"] == ARTICLE[row["id"]]["outlines"][FLIP[dataset][row["attribute"]]] != row["output"]
        assert "output" not in pair
        assert {k: v for k, v in pair.items() if k not in ("chosen", "rejected")} == {
            k: v for k, v in row.items() if k != "output"
        }


def test_an_axis_of_ones_own_is_built(tmp_path):
    table = tmp_path / "axes.yaml"
    table.write_text("axes: {mine: {literary: concise, concise: literary}}", encoding="utf-8")
    counts = build(write_corpus(tmp_path / "c", CORPUS[:40]), tmp_path / "out", table)
    assert all(name.startswith("mine/") for name in counts)
    pairs = load_records("mine", "train", pairs=True, folder=tmp_path / "out")
    article = ARTICLE[pairs[0]["id"]]
    assert (pairs[0]["chosen"], pairs[0]["rejected"]) == (
        article["outlines"]["literary"],
        article["outlines"]["concise"],
    )


def test_with_the_attribute_last_only_the_order_of_the_prompt_differs(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", CORPUS[:60])
    build(corpus, tmp_path / "first")
    assert main(["data", "build", "--corpus", str(corpus), "--out", str(tmp_path / "last"), "--attribute-last"]) == 0
    for pairs in (False, True):
        first, last = (load_records("language_style", "train", None, pairs, tmp_path / n) for n in ("first", "last"))
        assert {r["form"] for r in last} == {"article", "topic"}
        for ours, theirs in zip(last, first, strict=True):
            assert user_message(ours) == theirs["input"] + "\n" + theirs["instruction"]
            parts = ("instruction", "input")
            assert {k: v for k, v in ours.items() if k not in parts} == {
                k: v for k, v in theirs.items() if k not in parts
            }


def test_a_faulty_corpus_builds_nothing(tmp_path):
    bad = {**CORPUS[1], "outlines": {**CORPUS[1]["outlines"], "concise": "- no\n- numbers"}}
    corpus = write_corpus(tmp_path / "c", [CORPUS[0], bad])
    with pytest.raises(TKPOError, match=r"a\.jsonl, record 2: concise: "):
        build(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(TKPOError, match="empty"):
        build(tmp_path / "empty", tmp_path / "out")


def test_an_article_that_stands_in_two_corpus_files_builds_nothing(tmp_path):
    write_corpus(tmp_path / "c", CORPUS[:2])
    write_corpus(tmp_path / "c", CORPUS[1:3], "b.jsonl")
    with pytest.raises(TKPOError, match=r"b\.jsonl, record 1: .*a\.jsonl, record 2"):
        build(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_an_axis_outlines_builds_nothing(tmp_path):
    some = {k: v for k, v in CORPUS[0]["outlines"].items() if k in ("literary", "objective")}
    corpus = write_corpus(tmp_path / "c", [{**CORPUS[0], "outlines": some}])
    with pytest.raises(TKPOError, match=f"{CORPUS[0]['id']}.*'comprehensive'.*level_of_detail"):
        build(corpus, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- prompts


def test_prompts_in_every_form():
    axis = get_axis("language_style")
    english = make_record(axis, "literary", "Moss", "Moss drinks rain.")
    assert english["input"] == "Topic: Moss\n\nMoss drinks rain."
    assert (english["lang"], english["form"], english["attribute"]) == ("en", "article", "literary")
    assert make_record(axis, "literary", "Moss")["input"] == "Topic: Moss"
    assert make_record(axis, "literary", "Moss", "")["form"] == "topic"
    assert make_record(axis, "objective", "苔藓", "苔藓喝雨水。")["input"] == "苔藓喝雨水。"
    topic = make_record(axis, "objective", "苔藓")
    assert (topic["input"], topic["lang"], topic["form"]) == ("主题：苔藓", "zh", "topic")
    assert make_record(axis, "objective", "苔藓", lang="en")["input"] == "Topic: 苔藓"
    assert make_record(axis, "literary", "{topic} {attribute}")["input"] == "Topic: {topic} {attribute}"


def test_instruction_and_input_join_with_a_line_break():
    assert user_message({"instruction": "Do.\n", "input": "Topic: x"}) == "Do.\n\nTopic: x"
    assert user_message({"instruction": "Do.", "input": ""}) == user_message({"instruction": "Do."}) == "Do."


# ---- loading


def test_a_data_set_is_loaded_by_name_in_one_language_or_both():
    english = load_records("language_style", "validation", "en", folder=DATA)
    both = load_records("language_style", "validation", folder=DATA)
    assert english == rows_of("language_style", "validation", "en")
    assert both == english + rows_of("language_style", "validation", "zh")
    assert load_records("level_of_detail", "test", "zh", True, DATA) == rows_of("level_of_detail", "test", "zh", True)


def test_the_data_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_dir().samefile(DATA)
    with pytest.raises(TKPOError, match="tkpo data build"):
        data_dir(tmp_path)


def test_the_published_format_loads_and_gets_its_attribute(tmp_path):
    instruction = "对如下给定文档生成结构化层次化目录。要求：{}。输入：\n"
    rows = [
        {"instruction": instruction.format(phrase), "input": "文学诗意的春天来了。", "output": "1. 春"}
        for phrase in ("详细全面", "简洁关键", "真实客观")
    ]
    path = tmp_path / "published.json"
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    records = annotate(load_records(str(path)), get_axis("level_of_detail"))
    assert [r["attribute"] for r in records] == ["comprehensive", "concise", "objective"]
    assert {(r["lang"], r["form"], r["axis"]) for r in records} == {("zh", "article", "level_of_detail")}
    assert len({r["id"] for r in records}) == 3
    assert [{k: r[k] for k in row} for r, row in zip(records, rows, strict=True)] == rows
    assert check([path]) == (3, [])


def test_json_lines_a_byte_order_mark_and_blank_lines_are_fine(tmp_path):
    row = {"instruction": "literary", "output": "1. A"}
    path = tmp_path / "a.jsonl"
    path.write_text("\ufeff" + json.dumps(row) + "\n\n" + json.dumps(row) + "\n", encoding="utf-8")
    assert load_records(str(path)) == [row, row]


def test_unicode_line_separators_inside_a_record_do_not_cut_it(tmp_path):
    row = {"instruction": "literary", "output": "1. A\u2028B\x85C"}
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_rows(path) == [row]


def test_annotation_keeps_what_a_record_says_and_looks_in_the_input_last():
    axis = get_axis("language_style")
    rows = [
        {"instruction": "Be literary.", "input": "objective", "output": "1. A", "id": "x", "form": "topic"},
        {"instruction": "Outline this.", "input": "Objective, please.", "output": "1. A"},
        {"instruction": "Be literary.", "output": "1. A", "attribute": "objective", "lang": "en"},
    ]
    first, second, third = annotate(rows, axis)
    assert (first["attribute"], first["id"], first["form"]) == ("literary", "x", "topic")
    assert (second["attribute"], second["lang"], second["id"]) == ("objective", "en", "2")
    assert third["attribute"] == "objective"
    with pytest.raises(TKPOError, match="record 2: no attribute phrase of axis language_style"):
        annotate([rows[0], {"instruction": "Be brief.", "output": "1. A"}], axis)


def test_an_unknown_data_set_lists_what_there_is():
    with pytest.raises(TKPOError) as error:
        load_records("mood", "train", folder=DATA)
    for part in ("'mood'", "language_style_en_train", "level_of_detail_zh_test_pairs"):
        assert part in str(error.value)
    with pytest.raises(TKPOError, match="dev"):
        load_records("language_style", "dev", folder=DATA)


def test_records_that_cannot_be_used_are_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "literary", "output": "1. A"}, {"instruction": "literary"}]))
    with pytest.raises(TKPOError, match=r"a\.json, record 2: no field 'output'"):
        load_records(str(path))
    with pytest.raises(TKPOError, match=r"a\.json, record 1: no field 'chosen'"):
        load_records(str(path), pairs=True)
    path.write_text("[]")
    with pytest.raises(TKPOError, match=r"no records in .*a\.json"):
        load_records(str(path))
    path.write_text(json.dumps([{"instruction": "literary", "output": "1. A", "lang": "en"}]))
    with pytest.raises(TKPOError, match="language zh"):
        load_records(str(path), lang="zh")
    with pytest.raises(TKPOError, match=r"none\.json"):
        load_records(str(tmp_path / "none.json"))


def test_an_info_entry_without_a_file_is_named_when_it_is_loaded(tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine_en_train": {"columns": {}}}))
    with pytest.raises(TKPOError, match="mine_en_train"):
        load_records("mine", "train", folder=tmp_path)


def test_the_datasets_library_reads_the_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    for name in ("language_style/test.zh.json", "level_of_detail/validation.en.pairs.json"):
        found = datasets.load_dataset("json", data_files=str(DATA / name), split="train", cache_dir=str(tmp_path))
        assert found.to_list() == json.loads((DATA / name).read_text(encoding="utf-8"))


# ---- checking

GOOD = {"instruction": "Be literary.", "input": "Topic: x", "output": "1. A"}
PAIR = {"instruction": "Be literary.", "input": "Topic: x", "chosen": "1. A", "rejected": "1. B"}


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


def test_the_committed_data_has_no_fault():
    total, faults = check([DATA])
    samples = sum(len(rows_of(*file, pairs)) for file in FILES for pairs in (False, True))
    assert (total, faults) == (samples + 560, [])


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        (GOOD, without(GOOD, "output"), "no field 'output'"),
        (GOOD, without(GOOD, "instruction"), "no field 'instruction'"),
        (GOOD, {**GOOD, "output": " \n"}, "field 'output' is empty"),
        (GOOD, {**GOOD, "output": ["1. A"]}, "field 'output' is list, not text"),
        (GOOD, {**GOOD, "instruction": None}, "field 'instruction' is NoneType, not text"),
        (GOOD, {**GOOD, "input": 5}, "field 'input' is int, not text"),
        (GOOD, {**GOOD, "lang": "fr"}, "field 'lang' is 'fr'"),
        (GOOD, {}, "no field 'instruction'"),
        (PAIR, {**PAIR, "rejected": "1. A"}, "the same text"),
        (PAIR, {**PAIR, "rejected": ""}, "field 'rejected' is empty"),
        (PAIR, without(PAIR, "chosen"), "no field 'chosen'"),
        (CORPUS[0], without(CORPUS[1], "topic"), "no field topic"),
        (CORPUS[0], {**CORPUS[1], "document": ""}, "'document' is empty"),
        (CORPUS[0], {**CORPUS[1], "lang": "de"}, "field 'lang' is 'de'"),
        (CORPUS[0], {**CORPUS[1], "outlines": {}}, "'outlines'"),
        (CORPUS[0], {**CORPUS[1], "outlines": {"concise": 7}}, "concise: "),
        (CORPUS[0], {**CORPUS[1], "outlines": {"literary": "1. A\n3. B"}}, "literary: line 2"),
        (CORPUS[0], {**CORPUS[1], "outlines": {"concise": "1. A\n2. B"}}, "concise: the outline breaks"),
        (CORPUS[0], {**CORPUS[1], "id": CORPUS[0]["id"]}, "stands already at"),
        (CORPUS[0], {**CORPUS[1], "topic": CORPUS[0]["topic"].upper()}, "stands already at"),
    ],
)
def test_check_says_file_record_and_fault(tmp_path, good, bad, fault):
    path = tmp_path / "a.json"
    other = {**CORPUS[2]} if "outlines" in good else good
    path.write_text(json.dumps([good, bad, other], ensure_ascii=False), encoding="utf-8")
    total, faults = check([path])
    assert total == 3
    assert faults and all(line.startswith(f"{path}, record 2: ") for line in faults)
    assert any(fault in line for line in faults)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.json", b'[{"instruction": "x"', "a.json is not valid JSON"),
        ("a.jsonl", b'{"instruction": "x", "output": "y"}\n{oops}\n', "a.jsonl, line 2: not valid JSON"),
        ("a.json", b'["text"]', "a.json, record 1: expected an object, found str"),
        ("a.json", "要求".encode("gbk"), "a.json is not UTF-8"),
        ("a.json", b"[]", "a.json: no records"),
        ("a.json", b"", "a.json: no records"),
        ("dataset_info.json", b'{"mine": {"columns": {}}}', "dataset_info.json, entry 'mine': no file_name"),
        ("dataset_info.json", b'{"mine": {"file_name": "b.json"}}', "entry 'mine': file b.json does not exist"),
        ("dataset_info.json", b'{"mine": {"file_name": 5}}', "dataset_info.json, entry 'mine'"),
        ("dataset_info.json", b'{"mine": "b.json"}', "entry 'mine': no file_name"),
        ("dataset_info.json", b"[]", "dataset_info.json: expected an object"),
        ("dataset_info.json", b"{", "dataset_info.json"),
    ],
)
def test_check_names_a_file_that_cannot_be_used(tmp_path, name, content, fault):
    (tmp_path / name).write_bytes(content)
    _, faults = check([tmp_path])
    assert len(faults) == 1 and fault in faults[0]


def test_check_lists_every_fault_and_finds_duplicates_across_files(tmp_path):
    write_corpus(tmp_path, [CORPUS[0], without(CORPUS[1], "id"), {**CORPUS[2], "lang": "xx"}])
    write_corpus(tmp_path, [CORPUS[3], CORPUS[0]], "b.jsonl")
    total, faults = check([tmp_path])
    places = [re.match(r".*?([ab])\.jsonl, record (\d)", line).groups() for line in faults]
    assert total == 5
    assert set(places) == {("a", "2"), ("a", "3"), ("b", "2")}
    assert any(f"{tmp_path / 'a.jsonl'}, record 1" in line for line in faults if "b.jsonl" in line)


def test_check_of_nothing_is_an_error(tmp_path):
    with pytest.raises(TKPOError, match=r"no \.json or \.jsonl"):
        check([tmp_path])
    assert "none.json" in check([tmp_path / "none.json"])[1][0]
