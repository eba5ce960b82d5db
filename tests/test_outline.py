"""The outline format and the levels of detail, against the corpus and its published rules."""

import json
import re
from pathlib import Path

import pytest

from tkpo.errors import TKPOError
from tkpo.outline import Outline, is_valid, length, obeys_detail, parse

CORPUS = Path(__file__).parents[1] / "data" / "corpus"
ROWS = [json.loads(line) for file in sorted(CORPUS.glob("*.jsonl")) for line in file.open(encoding="utf-8")]

NESTED = "1. Origins\n   1.1 First finds\n   1.2 Early names\n2. Spread\n   2.1 By sea"


def test_parse_reads_headings_and_their_sub_headings():
    outline = parse(NESTED)
    assert outline == Outline(("Origins", "Spread"), (("First finds", "Early names"), ("By sea",)))
    assert (outline.n_headings, outline.n_sub_headings, outline.depth) == (2, 3, 2)


def test_flat_outline_has_depth_one():
    outline = parse("1. 缘起\n2. 流传")
    assert outline == Outline(("缘起", "流传"), ((), ()))
    assert (outline.n_headings, outline.n_sub_headings, outline.depth) == (2, 0, 1)


def test_numbers_of_two_digits():
    assert parse("\n".join(f"{i}. H{i}" for i in range(1, 13))).n_headings == 12


def test_white_space_around_the_whole_text_is_forgiven():
    assert parse(f"\n  {NESTED} \n\n") == parse(NESTED)


@pytest.mark.parametrize("heading", ["C# generics", "The snake_case habit", "Is it so?", "From 1. to 2."])
def test_plain_text_that_looks_odd_is_accepted(heading):
    assert parse(f"1. {heading}").headings == (heading,)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("1. A\n3. C", 2),  # out of order
        ("2. B\n3. C", 1),  # does not start at 1
        ("1. A\n1. A", 2),  # repeated
        ("01. A", 1),
        ("１. A", 1),  # full-width digit
        ("1. A\n   1.2 B", 2),
        ("1. A\n   2.1 B", 2),
        ("1. A\n   1.1 B\n   1.1 B", 3),
        ("1.1 A", 1),
        ("   1.1 A\n1. B", 1),
        ("1. A\n   1.1 B\n      1.1.1 C", 3),  # a third level
        ("1. A\n\n2. B", 2),  # blank line
        ("1. A\n \n2. B", 2),
        ("Outline\n1. A", 1),  # title line
        ("1. A\n2. B\nDone", 3),
        ("1. **A**", 1),  # Markdown
        ("1. _A_", 1),
        ("1. `A`", 1),
        ("1. # A", 1),
        ("1. [A](b)", 1),
        ("- A", 1),
        ("# 1. A", 1),
        ("1. A\n\t1.1 B", 2),  # tabs
        ("1.\tA", 1),
        ("1. A\tB", 1),
        ("1. A:\n2. B", 1),  # trailing colon
        ("1. 缘起：", 1),
        ("1. A\n  1.1 B", 2),  # two spaces
        ("1. A\n    1.1 B", 2),  # four spaces
        ("1. A\n 2. B", 2),
        ("1. A \n2. B", 1),  # white space at a line's end
        ("1. A\r\n2. B", 1),
        ("1.  A", 1),
        ("1.A", 1),
        ("1) A", 1),
        ("一、缘起", 1),
        ("\n\n1. A\n3. C", 4),  # lines are counted in the text as given
    ],
)
def test_malformed_outline_is_refused_with_its_line(text, line):
    with pytest.raises(ValueError, match=rf"^line {line}, "):
        parse(text)
    assert not is_valid(text)


@pytest.mark.parametrize("text", ["", "  \n\n "])
def test_empty_outline_is_refused(text):
    with pytest.raises(ValueError, match="empty"):
        parse(text)


def test_length_counts_english_words_and_chinese_characters():
    assert length("the paint tube", "en") == 3
    assert length("平遥 古城，1949", "zh") == 9
    with pytest.raises(TKPOError, match="'fr'"):
        length("un", "fr")


def flat(n, heading="A"):
    return parse("\n".join(f"{i}. {heading}" for i in range(1, n + 1)))


def nested(*subs):
    lines = []
    for i, count in enumerate(subs, 1):
        lines += [f"{i}. A", *(f"   {i}.{j} B" for j in range(1, count + 1))]
    return parse("\n".join(lines))


@pytest.mark.parametrize(
    ("attribute", "counts"),
    [("concise", {3, 4, 5}), ("objective", {4, 5, 6}), ("literary", {3, 4, 5, 6}), ("comprehensive", set())],
)
def test_flat_outlines_obey_by_their_count(attribute, counts):
    assert {n for n in range(1, 9) if obeys_detail(flat(n), attribute, "en")} == counts


@pytest.mark.parametrize(
    ("attribute", "counts"),
    [
        ("concise", {3, 4, 5, 6}),
        ("objective", {5, 6, 7, 8, 9}),
        ("literary", {4, 5, 6, 7, 8}),
        ("comprehensive", set()),
    ],
)
def test_a_long_article_wants_more_headings(attribute, counts):
    def obeying(kind):
        return {n for n in range(1, 12) if obeys_detail(flat(n), attribute, "zh", kind)}

    assert obeying("long") == counts
    assert obeying(None) == counts | obeying("short")


def test_a_long_article_takes_up_to_four_sub_headings_under_each():
    assert obeys_detail(nested(2, 3, 4, 2, 2), "comprehensive", "en", "long")
    assert not obeys_detail(nested(2, 3, 4, 2), "comprehensive", "en", None)  # too few for long, too wide for short
    for subs in [(2,) * 4, (2,) * 10, (2, 2, 2, 2, 1), (2, 2, 2, 2, 5), (2, 2, 0, 2, 2)]:
        assert not obeys_detail(nested(*subs), "comprehensive", "en", "long")


def test_comprehensive_wants_two_or_three_sub_headings_under_each():
    assert obeys_detail(nested(2, 3, 2, 3), "comprehensive", "en")
    assert obeys_detail(nested(2, 2, 2, 2, 2, 2), "comprehensive", "zh")
    for subs in [(2, 2, 2), (2,) * 7, (2, 2, 2, 1), (2, 2, 2, 4), (2, 0, 2, 2)]:
        assert not obeys_detail(nested(*subs), "comprehensive", "en")


@pytest.mark.parametrize("attribute", ["concise", "objective", "literary"])
def test_the_others_want_no_sub_headings(attribute):
    assert not obeys_detail(nested(0, 0, 0, 1), attribute, "en")


def test_concise_headings_are_short():
    assert obeys_detail(flat(4, "one two three four five six"), "concise", "en")
    assert not obeys_detail(flat(4, "one two three four five six seven"), "concise", "en")
    assert obeys_detail(flat(4, "一二三四五六七八九十一二三四"), "concise", "zh")
    assert not obeys_detail(flat(4, "一二三四五六七八九十一二三四五"), "concise", "zh")


def test_chinese_phrases_name_the_same_rules():
    for english, chinese in [("concise", "简洁关键"), ("objective", "真实客观"), ("literary", "文学诗意")]:
        for n in range(1, 9):
            assert obeys_detail(flat(n), english, "zh") == obeys_detail(flat(n), chinese, "zh")
    assert obeys_detail(nested(2, 2, 2, 2), "详细全面", "zh")
    assert not obeys_detail(flat(4), "详细全面", "zh")


def test_an_attribute_without_a_rule_asks_for_nothing():
    assert obeys_detail(flat(1), "casual", "en")
    assert obeys_detail(nested(9), "casual", "zh")


def test_every_corpus_outline_parses_and_obeys_its_attribute():
    assert len(ROWS) >= 500
    for row in ROWS:
        for attribute, text in row["outlines"].items():
            outline = parse(text)
            kind = "long" if "-long-" in row["id"] else "short"
            assert obeys_detail(outline, attribute, row["lang"], kind), (row["id"], attribute)
            assert obeys_detail(outline, attribute, row["lang"], None)
            # Independent of the parser: one number a line, the text after it untouched.
            told = [h for t, s in zip(outline.headings, outline.sub_headings, strict=True) for h in (t, *s)]
            assert told == [re.sub(r"^\s*[\d.]+ ", "", line) for line in text.splitlines()]


def test_the_corpus_comprehensive_outlines_obey_nothing_else():
    for row in ROWS[::10]:
        outline = parse(row["outlines"]["comprehensive"])
        assert not any(obeys_detail(outline, a, row["lang"]) for a in ("concise", "objective", "literary"))
