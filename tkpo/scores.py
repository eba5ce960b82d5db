"""Scores of generated outlines, one flat row per outline: what they say, how they are built, how they read.

Text scores come twice: with numbers and indentation taken off, which alone would score already, and as published with
them (`…_numbered`). Shares are 0 or 100, so that means of rows are per cent.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from tkpo.data import article_length
from tkpo.errors import TKPOError
from tkpo.metrics import StyleClassifier, check_fields, check_lengths, rouge_bleu
from tkpo.outline import MARKS, headings_of, is_valid, obeys_detail, parse, repeats, words

KEYS = ("id", "lang", "axis", "attribute", "form", "length")
TEXT_SCORES = {"rouge1": "rouge-1", "rouge2": "rouge-2", "rougeL": "rouge-l", "bleu4": "bleu-4"}
STYLE_SCORES = ("control", "log_odds", "reference_control")
SCORES = (
    *TEXT_SCORES,
    *(f"{name}_numbered" for name in TEXT_SCORES),
    *STYLE_SCORES,
    "valid",
    "level",
    "loop",
    "distinct2",
    "unsupported_number",
    "heading_count_error",
    "sub_headings",
    "n_headings",
)
WITH_SUB_HEADINGS = ("comprehensive", "详细全面")
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
ONES = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen"),
    *("fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
ENGLISH_NUMBERS = {
    **{word: str(value) for value, word in enumerate(ONES, 1)},
    **{word: str(10 * value) for value, word in enumerate(TENS, 2)},
    **{f"{ten}-{one}": str(10 * t + o) for t, ten in enumerate(TENS, 2) for o, one in enumerate(ONES[:9], 1)},
    "hundred": "100",
    "thousand": "1000",
}
CHINESE_DIGITS = {digit: value for value, digit in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
CHINESE_UNITS = {"十": 10, "百": 100, "千": 1000}


def score_outlines(
    records: Sequence[dict],
    predictions: Sequence[str],
    train_records: Sequence[dict] | None = None,
) -> list[dict]:
    """Score each prediction against its record; one flat dict per outline, in order.

    Args:
        records: annotated records: `id`, `lang`, `attribute`, `axis`, `form`, `input` (the article, for numbers),
            `output` (the reference outline), and `length` ("short" or "long") where it cannot be told from `input`.
        predictions: one outline per record, any text.
        train_records: the training split; a style classifier per language and axis is fitted on its outputs. Without
            them `control`, `log_odds` and `reference_control` are None.

    Returns:
        `KEYS` and `read_as` (the attribute that the classifier assigns), and the `SCORES`:
        rouge1, rouge2, rougeL (F1), bleu4: × 100, of the headings alone; `…_numbered`: of the text as it is.
        control: 100 where the classifier assigns the asked attribute; a blank outline or a loop is in no style.
        log_odds: the classifier's log p / (1 − p) of the asked attribute; of a blank outline or a loop at most 0.
        reference_control: 100 where the classifier assigns the asked attribute to the reference.
        valid: 100 where the text parses. level: 100 where it also has the headings that its attribute asks for, by the
        rule for the article's length; from a topic alone the rule for either length will do.
        loop: 100 where at least half of the headings share 60 % of their words with an earlier one.
        distinct2: share of different pairs among all pairs of neighbouring words of a heading (Li et al. 2016).
        unsupported_number: 100 where a heading has a number that the input does not have.
        heading_count_error: how many top-level headings it has more or fewer than the reference.
        sub_headings: 100 where every heading has one; None where the attribute asks for none.
        n_headings: top-level headings, also of a text that does not parse.

    Raises:
        TKPOError: lengths that differ, a record without a field, or an attribute, axis or language without training
            records.
    """
    check_lengths("records", records, "predictions", predictions)
    check_fields("record", records, ("id", "lang", "attribute", "axis", "form", "output"))
    rows = [
        {key: record.get(key) for key in KEYS}
        | {"length": _length_class(record)}
        | _text_scores(prediction, record)
        | _structure_scores(prediction, record)
        | dict.fromkeys(("read_as", *STYLE_SCORES))
        for record, prediction in zip(records, predictions, strict=True)
    ]
    if train_records is not None:
        for number, found in _style_scores(records, predictions, train_records):
            rows[number] |= found
            if rows[number]["loop"] or not predictions[number].strip():
                rows[number] |= {"control": 0.0, "log_odds": min(0.0, found["log_odds"])}
    return rows


def summary(rows: Sequence[dict]) -> dict:
    """`{lang: {score: mean, …, "n": rows}}` of `score_outlines`' rows; also `by_attribute` and `by_form` within."""
    result: dict = {}
    for lang in sorted({row["lang"] for row in rows}):
        own = [row for row in rows if row["lang"] == lang]
        result[lang] = _means(own)
        for name in ("attribute", "form"):
            values = sorted({row[name] for row in own})
            result[lang][f"by_{name}"] = {value: _means([r for r in own if r[name] == value]) for value in values}
    return result


def _means(rows: Sequence[dict]) -> dict:
    means = {}
    for name in SCORES:
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = round(float(np.mean(values)), 4) if values else None
    return means | {"n": len(rows)}


# ---- text and structure


def _text_scores(prediction: str, record: dict) -> dict:
    lang, reference = record["lang"], record["output"]
    bare = rouge_bleu("\n".join(headings_of(prediction)), "\n".join(headings_of(reference)), lang)
    numbered = rouge_bleu(prediction, reference, lang)
    scores = {ours: bare[theirs] for ours, theirs in TEXT_SCORES.items()}
    return scores | {f"{ours}_numbered": numbered[theirs] for ours, theirs in TEXT_SCORES.items()}


def _structure_scores(prediction: str, record: dict) -> dict:
    attribute, lang = record["attribute"], record["lang"]
    headings = [words(heading) for heading in headings_of(prediction)]
    pairs = [pair for heading in headings for pair in itertools.pairwise(heading)]
    repeating, valid, subs = sum(repeats(headings)), is_valid(prediction), sub_heading_counts(prediction)
    kind = _length_class(record) if record["form"] == "article" else None  # a topic does not say how long
    numbers = numbers_in("\n".join(headings_of(prediction))) - numbers_in(record.get("input") or "", words_too=True)
    return {
        "valid": 100.0 * valid,
        "level": 100.0 * (valid and obeys_detail(parse(prediction), attribute, lang, kind)),
        "loop": 100.0 * (bool(headings) and 2 * repeating >= len(headings)),
        "distinct2": 100.0 * len(set(pairs)) / len(pairs) if pairs else 100.0 * any(headings),
        "unsupported_number": 100.0 * bool(numbers),
        "heading_count_error": float(abs(len(subs) - len(sub_heading_counts(record["output"])))),
        "sub_headings": 100.0 * (bool(subs) and all(subs)) if attribute in WITH_SUB_HEADINGS else None,
        "n_headings": float(len(subs)),
    }


def _length_class(record: dict) -> str | None:
    """ "short" or "long", the article's; None where the record neither says it nor has the article."""
    if not record.get("length") and (record["form"] == "topic" or not record.get("input")):
        return None
    return article_length(record)


def sub_heading_counts(text: str) -> list[int]:
    """How many sub-headings each top-level heading of any text has: lines with indentation or a number like 1.1."""
    counts: list[int] = []
    for line in text.strip().splitlines():
        if not line[MARKS.match(line).end() :].strip():
            continue
        is_sub = line[:1].isspace() or re.match(r"[0-9]+\.[0-9]+", line)
        if is_sub and counts:
            counts[-1] += 1
        else:
            counts.append(0)
    return counts


def numbers_in(text: str, words_too: bool = False) -> set[str]:
    """The numbers in figures, without thousands separators; `words_too`: number words and Chinese numerals as well."""
    text = unicodedata.normalize("NFKC", text)
    found = {number.replace(",", "").lstrip("0") or "0" for number in NUMBER.findall(text)}
    if words_too:
        found |= {
            ENGLISH_NUMBERS[word]
            for word in re.findall(r"[a-z]+(?:-[a-z]+)?", text.casefold())
            if word in ENGLISH_NUMBERS
        }
        found |= {_from_chinese(number) for number in re.findall(r"[零〇一二两三四五六七八九十百千]+", text)}
    return found


def _from_chinese(numeral: str) -> str:
    """十二 → 12, 三百五十 → 350, 一九八四 → 1984."""
    if not set(numeral) & set(CHINESE_UNITS):
        return "".join(str(CHINESE_DIGITS[digit]) for digit in numeral)
    total, digit = 0, 0
    for character in numeral:
        if character in CHINESE_UNITS:
            total += (digit or 1) * CHINESE_UNITS[character]
            digit = 0
        else:
            digit = CHINESE_DIGITS[character]
    return str(total + digit)


# ---- style


def _style_scores(
    records: Sequence[dict], predictions: Sequence[str], train_records: Sequence[dict]
) -> Iterator[tuple[int, dict]]:
    """(place, style scores) of every record, by one classifier for each language and axis."""
    check_fields("training record", train_records, ("lang", "attribute", "axis", "output"))
    for lang, axis in sorted({(r["lang"], r["axis"]) for r in records}):
        places = [i for i, r in enumerate(records) if (r["lang"], r["axis"]) == (lang, axis)]
        train = [r for r in train_records if (r["lang"], r["axis"]) == (lang, axis)]
        if not train:
            raise TKPOError(f"no training records in language {lang!r} on axis {axis!r} for the style classifier")
        classifier = StyleClassifier(lang).fit([r["output"] for r in train], [r["attribute"] for r in train])
        assigned = classifier.predict([predictions[i] for i in places])
        of_reference = classifier.predict([records[i]["output"] for i in places])
        odds = classifier.log_odds([predictions[i] for i in places], [_asked(records, i, classifier) for i in places])
        for i, guess, reference_guess, value in zip(places, assigned, of_reference, odds, strict=True):
            attribute = records[i]["attribute"]
            yield (
                i,
                {
                    "read_as": guess,
                    "control": 100.0 * (guess == attribute),
                    "log_odds": value,
                    "reference_control": 100.0 * (reference_guess == attribute),
                },
            )


def _asked(records: Sequence[dict], number: int, classifier: StyleClassifier) -> str:
    record = records[number]
    if record["attribute"] not in classifier.attributes:
        raise TKPOError(
            f"record {number + 1} (id {record['id']}) asks for {record['attribute']!r}, which no training record in "
            f"language {record['lang']!r} on axis {record['axis']!r} has; they have: {', '.join(classifier.attributes)}"
        )
    return record["attribute"]
