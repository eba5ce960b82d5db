"""Scores per outline against values worked out by hand; the classifier against its own probabilities."""

import json
import math
from pathlib import Path

import pytest

from tkpo.content_free import content_free
from tkpo.errors import TKPOError
from tkpo.metrics import StyleClassifier, rouge_bleu
from tkpo.scores import SCORES, numbers_in, score_outlines, sub_heading_counts, summary

CORPUS = Path(__file__).parents[1] / "data" / "corpus"
ARTICLE = "The map of 1884 cost 1,200 marks, and forty-two men drew it in twelve weeks; a third of them went home."


def record(**changes):
    base = {"id": "a", "lang": "en", "attribute": "concise", "axis": "detail", "form": "article", "input": ARTICLE}
    return {**base, "output": "1. ice\n2. sea\n3. map", **changes}


def score(text, **changes):
    (row,) = score_outlines([record(**changes)], [text])
    return row


def test_numbers_and_indentation_are_taken_off_text_scores():
    # Bare, "ice / sea / end" and "ice / sea / map" share two of three words and one of two pairs, in order.
    row = score("1. ice\n2. sea\n3. end")
    assert row["rouge1"] == row["rougeL"] == pytest.approx(200 / 3, abs=1e-3)
    assert row["rouge2"] == pytest.approx(50)
    # With numbers: six words, five of them shared; pairs "1 ice", "ice 2", "2 sea", "sea 3" of five.
    assert row["rouge1_numbered"] == pytest.approx(500 / 6, abs=1e-3)
    assert row["rouge2_numbered"] == pytest.approx(80)
    # BLEU-4 bare: precisions 2/3, 1/2, (1/2)/1, and for no 4-gram at all (1/4)/1.
    assert row["bleu4"] == pytest.approx(100 * (2 / 3 * 1 / 2 * 1 / 2 * 1 / 4) ** 0.25, abs=1e-3)
    other = score("3) ice\n   - sea\n# map")
    assert other["rouge1"] == 100 and other["rouge1_numbered"] < 100


def test_numbers_alone_score_nothing_bare():
    row = score("1. x\n2. x\n3. x\n4. x\n5. x")
    assert row["rouge1"] == row["bleu4"] == row["rougeL"] == 0
    assert row["rouge1_numbered"] == pytest.approx(100 * 2 * 3 / (6 + 10), abs=1e-3)
    zh = score("1. 春\n2. 夏", lang="zh", output="1. 秋\n2. 冬", input="秋冬")
    assert zh["rouge1"] == 0 < zh["rouge1_numbered"]


def test_the_published_scores_are_those_of_the_text_as_it_is():
    text, reference = "1. 盐的历史\n2. 运河", "1. 盐的运输\n2. 城墙"
    row = score(text, lang="zh", output=reference)
    whole = rouge_bleu(text, reference, "zh")
    assert [row[f"{k}_numbered"] for k in ("rouge1", "rouge2", "rougeL", "bleu4")] == list(whole.values())


@pytest.mark.parametrize(
    ("headings", "loop"),
    [
        (["the old map", "the old sea"], 100),  # 2 of 3 words, in one of two headings
        (["the old map", "the new sea"], 0),
        (["the old map", "an old map", "ice", "sea"], 0),  # one of four
        (["the old map", "an old map", "ice", "map old"], 100),  # two of four
        (["a b c d e", "a b c x y", "e"], 100),  # 3 of 5 is 60 %; the single word stands before too
        (["a b c d e", "a b x y z"], 0),
        (["a a a", "a b c"], 0),  # a word counts as often as it stands there
        (["", ""], 0),
        (["盐的历史", "盐的未来"], 0),
        (["盐的历史", "盐的历程"], 100),
    ],
)
def test_loops(headings, loop):
    assert score("\n".join(f"{n}. {heading}" for n, heading in enumerate(headings, 1)))["loop"] == loop


def test_distinct_pairs():
    # Pairs: the-sea, sea-and, and-the, the-sea | the-sea: five, three different ones. Numbers and breaks make none.
    assert score("1. the sea and the sea\n2. The sea!\n3. ice")["distinct2"] == pytest.approx(60)
    assert score("1. 春天的春天\n2. 春")["distinct2"] == pytest.approx(75)  # 春天 twice, 天的, 的春
    assert score("1. ice\n2. sea")["distinct2"] == 100
    assert score("")["distinct2"] == 0


@pytest.mark.parametrize(
    ("text", "unsupported"),
    [
        ("1. The map of 1884\n2. 1200 marks\n3. 42 men, 12 weeks", 0),
        ("1. The map of 1885", 100),
        ("1. 1,200 marks", 0),
        ("1. 120 marks", 100),
        ("1. A map\n   1.1 Its men\n   1.2 Home", 0),  # the outline's own numbers do not count
        ("1. １８８４", 0),
    ],
)
def test_numbers_that_the_article_does_not_have(text, unsupported):
    assert score(text)["unsupported_number"] == unsupported


def test_chinese_numerals_support_figures():
    assert numbers_in("三百五十人，一九八四年，十二周，二〇二三", words_too=True) == {"350", "1984", "12", "2023"}
    assert score("1. 12周", lang="zh", input="他们画了十二周")["unsupported_number"] == 0
    assert score("1. 13周", lang="zh", input="他们画了十二周")["unsupported_number"] == 100


def test_headings_are_counted_whether_or_not_the_text_parses():
    assert sub_heading_counts("1. A\n   1.1 B\n   1.2 C\n2. D\n3. E\n 3.1 F") == [2, 0, 1]
    assert sub_heading_counts("1. A\n1.1 B\n\n- C") == [1, 0] and sub_heading_counts(" \n") == []
    row = score("1. A\n3. B\n4. C\n5. D\n6. E")
    assert (row["valid"], row["n_headings"], row["heading_count_error"]) == (0, 5, 2)
    assert score("")["heading_count_error"] == 3


def test_sub_headings_are_asked_of_comprehensive_outlines_alone():
    nested, gap = "1. A\n   1.1 B\n   1.2 C\n2. D\n   2.1 E", "1. A\n   1.1 B\n2. D"
    for attribute in ("comprehensive", "详细全面"):
        assert [score(t, attribute=attribute)["sub_headings"] for t in (nested, gap, "")] == [100, 0, 0]
    assert score(nested)["sub_headings"] is None


def test_level_follows_the_articles_length():
    flat = lambda n: "\n".join(f"{i}. H{i}" for i in range(1, n + 1))  # noqa: E731
    long = "word " * 500
    level = lambda n, **changes: score(flat(n), attribute="objective", **changes)["level"]  # noqa: E731
    assert [level(n) for n in (4, 6, 7, 9)] == [100, 100, 0, 0]
    assert [level(n, input=long) for n in (4, 5, 9, 10)] == [0, 100, 100, 0]
    assert [level(n, length="long") for n in (4, 9)] == [0, 100]
    # A topic does not say how long its article is: either rule will do.
    assert [level(n, form="topic", input="Topic: Salt") for n in (3, 4, 9, 10)] == [0, 100, 100, 0]
    row = score(flat(9), attribute="objective", form="topic", length="short")
    assert (row["level"], row["length"]) == (100, "short")


@pytest.fixture(scope="module")
def training():
    rows = [json.loads(line) for f in sorted(CORPUS.glob("zh-*.jsonl")) for line in f.open(encoding="utf-8")]
    return [
        {"id": row["id"], "lang": "zh", "axis": "style", "attribute": a, "form": "topic", "output": row["outlines"][a]}
        for row in rows[:80]
        for a in ("literary", "objective", "concise")
    ]


def test_style_odds_are_the_classifiers_and_no_loop_is_praised(training):
    classifier = StyleClassifier("zh").fit([r["output"] for r in training], [r["attribute"] for r in training])
    tests, texts = training[:6], [r["output"] for r in training[:3]] + [r["output"] for r in training[1:4]]
    for row, test, text in zip(score_outlines(tests, texts, training), tests, texts, strict=True):
        p = classifier.predict_proba(text)
        assert row["log_odds"] == pytest.approx(math.log(p[test["attribute"]] / (1 - p[test["attribute"]])), abs=1e-6)
        assert row["read_as"] == max(p, key=p.get)
        assert row["control"] == 100 * (row["read_as"] == test["attribute"]) and row["reference_control"] == 100
    line = next(r["output"] for r in training if r["attribute"] == "literary").split("\n")[0][3:]
    loop = "\n".join(f"{n}. {line}" for n in range(1, 6))
    assert classifier.predict([loop]) == ["literary"]
    rows = score_outlines([training[0]] * 2, [loop, ""], training)
    assert all(row["control"] == 0 and row["log_odds"] <= 0 for row in rows) and rows[0]["read_as"] == "literary"


def test_without_training_records_there_is_no_style(training):
    (row,) = score_outlines(training[:1], [training[0]["output"]])
    assert row["control"] is row["log_odds"] is row["read_as"] is None and row["rouge1"] == pytest.approx(100)
    assert summary([row])["zh"]["control"] is None
    with pytest.raises(TKPOError, match="no training records in language 'zh'"):
        score_outlines(training[:1], ["1. A"], [])


def test_rows_are_flat_and_their_means_are_the_summary(training):
    tests = training[:6]
    rows = score_outlines(tests, ["1. 春\n2. 夏", *(r["output"] for r in tests[1:])], training)
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())
    assert json.loads(json.dumps(rows)) == rows
    means = summary(rows)["zh"]
    assert means["n"] == 6 and set(SCORES) < set(means)
    for name in set(SCORES) - {"sub_headings"}:
        assert means[name] == pytest.approx(sum(row[name] for row in rows) / 6, abs=1e-4)
    literary = [row["rouge1"] for row in rows if row["attribute"] == "literary"]
    assert means["by_attribute"]["literary"]["rouge1"] == pytest.approx(sum(literary) / 2, abs=1e-4)


def test_content_free_rows(training):
    tests = [record(lang="zh", attribute=a, id=str(i)) for i in range(20) for a in ("literary", "concise")]
    rows = content_free(tests, training)
    assert rows == content_free(tests, training) != content_free(tests, training, seed=1)
    assert set(rows["numbers_only"]) == {"1. x\n2. x\n3. x\n4. x\n5. x"}
    assert len(set(rows["constant_outline"])) == 1 and len(set(rows["random_outline"])) > 20
    for test, outline in zip(tests, rows["random_outline"], strict=True):
        assert outline in {r["output"] for r in training if r["attribute"] == test["attribute"]}
    with pytest.raises(TKPOError, match="no training outline in language 'en'"):
        content_free([record()], training)
