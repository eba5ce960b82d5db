"""The data sets: built as committed, split without leaks, loaded and checked with the place of every fault."""

import hashlib
import json
import random
import re
from pathlib import Path

import pytest

from tkpo.attributes import get_axes, get_axis, load_axes
from tkpo.data import (
    annotate,
    arrange,
    article_length,
    balanced_subset,
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
    assert len({key for kind, key in where if kind == "document"}) == len(CORPUS) == 858


def test_every_article_stands_once_an_attribute():
    for dataset, flip in FLIP.items():
        for lang in ("en", "zh"):
            seen = [(r["id"], r["attribute"]) for s in ("train", "validation") for r in rows_of(dataset, s, lang)] + [
                (r["id"], r["attribute"]) for r in rows_of(dataset, "test", lang) if r["form"] == "article"
            ]
            assert len(seen) == len(set(seen))
            assert set(seen) == {(a["id"], at) for a in CORPUS if a["lang"] == lang for at in flip}


# words of English, characters other than white space of Chinese; paragraphs
SIZES = {("en", False): (100, 185), ("zh", False): (180, 360), ("en", True): (450, 950), ("zh", True): (850, 1900)}


def test_articles_are_as_short_or_long_as_the_card_says():
    counts = {}
    for article in CORPUS:
        kind = (article["lang"], "-long-" in article["id"])
        text = article["document"]
        size = len(text.split()) if kind[0] == "en" else len("".join(text.split()))
        paragraphs = text.count("\n\n") + 1
        assert SIZES[kind][0] <= size <= SIZES[kind][1], (article["id"], size)
        assert (5 <= paragraphs <= 16) if kind[1] else (2 <= paragraphs <= 3), (article["id"], paragraphs)
        counts[kind] = counts.get(kind, 0) + 1
    assert counts == {("en", False): 480, ("en", True): 108, ("zh", False): 192, ("zh", True): 78}


def test_records_say_how_long_their_article_is():
    for dataset, split, lang in FILES:
        for pairs in (False, True):
            for row in rows_of(dataset, split, lang, pairs):
                assert row["length"] == ("long" if "-long-" in row["id"] else "short")
                if row["form"] == "article":
                    assert article_length({**row, "length": None}) == row["length"]


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


def test_an_articles_styles_have_the_same_form():
    forms = {}
    for dataset in FLIP:
        for split in ("train", "validation"):
            for row in (
                r for la in ("en", "zh") for pairs in (False, True) for r in rows_of(dataset, split, la, pairs)
            ):
                assert forms.setdefault(row["id"], row["form"]) == row["form"]


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


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_arranged_article_first_the_instruction_follows_in_its_own_words(lang):
    axis = get_axis("language_style")
    record = {
        **make_record(axis, "literary", "Moss", "Moss drinks rain.\n\nIt waits.", lang),
        "id": "m",
        "output": "1. A",
    }
    words = {
        "en": "Generate a structured hierarchical outline of the above. Requirement: literary.",
        "zh": "请根据以上内容生成结构化层次化目录。要求：文学诗意。",
    }
    assert arrange(record, axis, "instruction_first") is record
    moved = arrange(record, axis, "article_first")
    assert user_message(moved) == f"{record['input']}\n\n{words[lang]}"
    assert {k for k in moved if moved[k] != record.get(k)} == {"instruction", "prompt_order"}
    assert arrange(moved, axis, "article_first") == moved
    topic = make_record(axis, "literary", "Moss", None, lang)
    assert user_message(arrange(topic, axis, "article_first")) == f"{topic['input']}\n\n{words[lang]}"


def test_every_committed_record_can_be_arranged():
    axes = load_axes()
    for file in FILES:
        for row in rows_of(*file):
            text = user_message(arrange(row, axes[row["axis"]], "article_first"))
            assert text.startswith(row["input"] + "\n\n")
            assert axes[row["axis"]].phrases[row["attribute"]][row["lang"]] in text[len(row["input"]) :]


def test_a_record_in_words_of_its_own_is_not_arranged():
    axis = get_axis("language_style")
    record = make_record(axis, "literary", "Moss", "Moss drinks rain.")
    for bad in ({"instruction": "Be literary."}, {"input": ""}, {"attribute": "objective"}):
        with pytest.raises(TKPOError, match=r"record r7: article_first needs"):
            arrange({**record, "id": "r7", **bad}, axis, "article_first")
    with pytest.raises(TKPOError, match=r"'attribute_last'.*instruction_first, article_first"):
        arrange(record, axis, "attribute_last")


# ---- loading


@pytest.mark.parametrize("pairs", [False, True], ids=["samples", "pairs"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_two_sets_together_take_a_shared_sample_once(split, pairs):
    both = load_records("language_style,level_of_detail", split, pairs=pairs, folder=DATA)
    style, detail = (load_records(name, split, pairs=pairs, folder=DATA) for name in FLIP)
    assert [r for r in both if r["axis"] == "language_style"] == style
    assert [r for r in both if r["axis"] == "level_of_detail"] == [r for r in detail if r["attribute"] != "objective"]
    keys = [(r["id"], r["attribute"], r["form"]) for r in both]
    assert len(keys) == len(set(keys))
    per_article = {name: sum(key[0] == name for key in keys) for name, _, _ in keys}
    assert set(per_article.values()) == ({8} if split == "test" else {4})  # four styles, in test both forms
    annotated = annotate(both, get_axes("language_style,level_of_detail"))
    assert [r["axis"] for r in annotated] == [r["axis"] for r in both]


def test_records_of_one_file_that_are_alike_all_stay(tmp_path):
    row = {"instruction": "literary", "output": "1. A"}
    path = tmp_path / "a,b.json"
    path.write_text(json.dumps([row, row]), encoding="utf-8")
    assert load_records(str(path)) == [{**row, "input": ""}] * 2
    assert len(load_records(f"language_style,{DATA / 'language_style' / 'test.en.json'}", "test", folder=DATA)) == 320


def test_records_of_several_axes_without_one_get_the_axis_of_their_phrase():
    axes = get_axes("language_style, level_of_detail")
    rows = [{"instruction": f"Be {word}.", "output": "1. A"} for word in ("concise", "literary", "objective")]
    assert [r["axis"] for r in annotate(rows, axes)] == ["level_of_detail", "language_style", "language_style"]
    with pytest.raises(TKPOError, match=r"record 1: field 'axis' is 'mood', not language_style or level_of_detail"):
        annotate([{**rows[0], "axis": "mood"}], axes)


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
    assert load_records(str(path)) == [{**row, "input": ""}] * 2


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
        {"instruction": "Be literary.", "output": "1. A", "attribute": "literary", "lang": "zh"},
    ]
    first, second, third = annotate(rows, axis)
    assert (first["attribute"], first["id"], first["form"]) == ("literary", "x", "topic")
    assert (second["attribute"], second["lang"], second["id"]) == ("objective", "en", "2")
    assert (third["attribute"], third["lang"]) == ("literary", "zh")
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


def test_the_datasets_library_finds_every_set_and_language_in_the_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = [f"{d}_{la}{pairs}" for d in FLIP for la in ("en", "zh") for pairs in ("", "_pairs")]
    assert sorted(datasets.get_dataset_config_names(str(DATA))) == sorted(names)
    for dataset, lang, pairs in (("language_style", "zh", False), ("level_of_detail", "en", True)):
        name = f"{dataset}_{lang}{'_pairs' if pairs else ''}"
        found = datasets.load_dataset(str(DATA), name, cache_dir=str(tmp_path))
        assert {split: rows.to_list() for split, rows in found.items()} == {
            split: rows_of(dataset, split, lang, pairs) for split in ("train", "validation", "test")
        }


def test_the_card_counts_what_is_there():
    card = (DATA / "README.md").read_text(encoding="utf-8")
    total = 0
    for dataset, split, lang in FILES:
        rows = rows_of(dataset, split, lang)
        total += len(rows)
        cells = [f"`{dataset}/{split}.{lang}`", str(len(rows))]
        for attribute in FLIP[dataset]:
            forms = [r["form"] for r in rows if r["attribute"] == attribute]
            cells.append(f"{forms.count('article')} + {forms.count('topic')}")
        if dataset == "level_of_detail":
            assert list(FLIP[dataset]) == ["comprehensive", "concise", "objective"]
        assert f"| {' | '.join(cells)} |" in card
    assert f"{total} samples in all" in card
    for split in ("train", "validation", "test"):
        cells = [split]
        for lang in ("en", "zh"):
            own = [a for a in CORPUS if a["lang"] == lang and split_of(a["document"]) == split]
            long = sum("-long-" in a["id"] for a in own)
            cells.append(f"{len(own) - long} + {long}")
        assert f"| {' | '.join(cells)} |" in card


# ---- checking

GOOD = {"instruction": "Be literary.", "input": "Topic: x", "output": "1. A"}
PAIR = {"instruction": "Be literary.", "input": "Topic: x", "chosen": "1. A", "rejected": "1. B"}


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


def test_the_committed_data_has_no_fault():
    total, faults = check([DATA])
    samples = sum(len(rows_of(*file, pairs)) for file in FILES for pairs in (False, True))
    assert (total, faults) == (samples + 858, [])


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


# ---- subsets


def articles_of(records):
    """{(language, length): {article: its records}}"""
    found = {}
    for r in records:
        found.setdefault((r["lang"], r["length"]), {}).setdefault(r["id"], []).append(r)
    return found


def test_a_training_subset_has_whole_articles_in_the_shares_asked_for():
    everything = load_records("language_style,level_of_detail", "train", folder=DATA)
    chosen = balanced_subset(everything, 180, share_long=1 / 3, share_zh=1 / 2)
    cells = articles_of(chosen)
    assert {kind: len(found) for kind, found in cells.items()} == {
        ("en", "short"): 60,
        ("en", "long"): 30,
        ("zh", "short"): 60,
        ("zh", "long"): 30,
    }
    for found in cells.values():
        for rows in found.values():
            assert sorted(r["attribute"] for r in rows) == ["comprehensive", "concise", "literary", "objective"]
    topics = {kind: sum(rows[0]["form"] == "topic" for rows in found.values()) for kind, found in cells.items()}
    pool = articles_of(everything)
    for kind, count in topics.items():  # as among all articles of the kind
        share = sum(rows[0]["form"] == "topic" for rows in pool[kind].values()) / len(pool[kind])
        assert abs(count - share * len(cells[kind])) < 1
    half = articles_of(balanced_subset(everything, 40, share_long=0.5, share_zh=0.25, share_topic=0.5))
    assert {kind: len(found) for kind, found in half.items()} == {
        ("en", "short"): 15,
        ("en", "long"): 15,
        ("zh", "short"): 5,
        ("zh", "long"): 5,
    }
    topics = [sum(rows[0]["form"] == "topic" for rows in found.values()) for found in half.values()]
    assert sorted(topics) in ([2, 2, 7, 7], [2, 2, 7, 8], [2, 2, 8, 8], [2, 3, 7, 7], [2, 3, 7, 8], [3, 3, 8, 8])


def test_a_subset_does_not_depend_on_order_or_method():
    records = load_records("language_style", "train", folder=DATA)
    pairs = load_records("language_style", "train", pairs=True, folder=DATA)
    chosen = balanced_subset(records, 50)
    assert [r for r in records if r in chosen] == chosen  # in their order
    shuffled = random.Random(0).sample(records, len(records))
    names = {r["id"] for r in chosen}
    assert len(names) == 50
    assert {r["id"] for r in balanced_subset(shuffled, 50)} == names
    assert {r["id"] for r in balanced_subset(pairs, 50)} == names


def test_a_test_subset_is_balanced_over_style_form_language_and_length():
    records = load_records("language_style,level_of_detail", "test", folder=DATA)
    chosen = balanced_subset(records, 12, share_long=0.5, share_zh=0.5)
    counts = {}
    for r in chosen:
        key = (r["attribute"], r["form"], r["lang"], r["length"])
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 4 * 2 * 2 * 2 and set(counts.values()) == {3}


def test_what_one_kind_lacks_the_others_give():
    def article(name, lang, kind):
        return {"id": name, "lang": lang, "length": kind, "form": "article"}

    rows = [article(f"zl{i}", "zh", "long") for i in range(2)] + [article(f"zs{i}", "zh", "short") for i in range(20)]
    rows += [article(f"el{i}", "en", "long") for i in range(3)] + [article(f"es{i}", "en", "short") for i in range(4)]
    cells = articles_of(balanced_subset(rows, 20, share_long=0.5, share_zh=0.5))
    assert {kind: len(found) for kind, found in cells.items()} == {
        ("zh", "long"): 2,
        ("zh", "short"): 11,  # 8 and what English lacks
        ("en", "long"): 3,
        ("en", "short"): 4,
    }
    assert balanced_subset(rows, 1000) == rows
    only = articles_of(balanced_subset([r for r in rows if r["lang"] == "zh"], 10, share_long=0.1))
    assert {kind: len(found) for kind, found in only.items()} == {("zh", "long"): 1, ("zh", "short"): 9}
    assert balanced_subset(rows, 3, share_zh=0, share_long=1) == [r for r in rows if r["id"].startswith("el")]


@pytest.mark.parametrize(
    "options", [{"number_of_articles": 0}, {"share_long": 1.5}, {"share_zh": -0.1}, {"share_topic": 2}]
)
def test_a_subset_that_cannot_be_is_refused(options):
    with pytest.raises(TKPOError, match=next(iter(options))):
        balanced_subset([], **{"number_of_articles": 3, **options})
