"""Read an outline's text into headings and sub-headings, and judge its level of detail."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tkpo.errors import TKPOError

TOP = re.compile(r"([1-9][0-9]*)\. (\S.*\S|\S)")
SUB = re.compile(r"   ([1-9][0-9]*)\.([1-9][0-9]*) (\S.*\S|\S)")
# Marks that act as Markdown; "C#" and "snake_case" are plain text.
MARKDOWN = re.compile(r"[*`]|(?<!\w)[#_]|_(?!\w)|\]\(")

# What stands before a heading's words: `1. `, `   1.1 `, also while it is being written.
NUMBERING = re.compile(r"\s*[0-9]+\.(?:[0-9]+(?:\.[0-9]+)*\.?(?![0-9A-Za-z]))?\s*")
# The same with the marks of Markdown lists and other ways of numbering, which models write too.
OTHER_NUMBERING = r"[0-9]+[)）、．]\s*|[(（]?[一二三四五六七八九十]+[)）、]\s*"
MARKS = re.compile(rf"\s*(?:[-*•#]+\s+)?(?:{NUMBERING.pattern}|{OTHER_NUMBERING})?")
# A Chinese character is a word; other words may hold apostrophes and hyphens.
CHINESE = "\u3400-\u9fff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{CHINESE}]|[^\W_{CHINESE}]+(?:['’-][^\W_{CHINESE}]+)*")

REPEATED = 0.6  # share of its words that a heading has in common with an earlier one which it repeats
LOOP = 3  # repeating headings of a looping outline, at the least; they are also at least half of its headings

CONCISE_LENGTH = {"en": 6, "zh": 14}
CHINESE_NAMES = {"简洁关键": "concise", "详细全面": "comprehensive", "真实客观": "objective", "文学诗意": "literary"}
# Fewest and most headings of an outline, and sub-headings under each of a comprehensive one, by the article's length.
HEADINGS = {
    "short": {"concise": (3, 5), "comprehensive": (4, 6), "objective": (4, 6), "literary": (3, 6)},
    "long": {"concise": (3, 6), "comprehensive": (5, 9), "objective": (5, 9), "literary": (4, 8)},
}
SUB_HEADINGS = {"short": (2, 3), "long": (2, 4)}


@dataclass(frozen=True)
class Outline:
    """A parsed outline: `sub_headings[i]` are the sub-headings under `headings[i]`, often none."""

    headings: tuple[str, ...]
    sub_headings: tuple[tuple[str, ...], ...]

    @property
    def depth(self) -> int:
        """Levels of headings: 2 where any heading has sub-headings, else 1."""
        return 2 if any(self.sub_headings) else 1

    @property
    def n_headings(self) -> int:
        """How many top-level headings."""
        return len(self.headings)

    @property
    def n_sub_headings(self) -> int:
        """How many sub-headings in all."""
        return sum(map(len, self.sub_headings))


def parse(text: str) -> Outline:
    """Parse an outline in the corpus's format, strictly.

    Headings are `1. Heading` at the left margin, sub-headings `   1.1 Sub-heading` (three spaces),
    both numbered in order from 1. Nothing else may stand in it: no blank line, tab, Markdown, title line
    or trailing colon. Only white space before and after the whole text is forgiven.

    Raises:
        ValueError: what is wrong with which line of `text` (counted from 1).
    """
    body = text.strip()
    if not body:
        raise ValueError("the outline is empty")
    skipped = text[: len(text) - len(text.lstrip())].count("\n")
    headings: list[str] = []
    subs: list[list[str]] = []
    for number, line in enumerate(body.split("\n"), skipped + 1):
        where = f"line {number}, {line!r}"
        if top := TOP.fullmatch(line):
            heading, got, due = top[2], top[1], str(len(headings) + 1)
            headings.append(heading)
            subs.append([])
        elif sub := SUB.fullmatch(line):  # never the first line: the body starts with a visible character
            subs[-1].append(sub[3])
            heading, got, due = sub[3], f"{sub[1]}.{sub[2]}", f"{len(headings)}.{len(subs[-1])}"
        else:
            raise ValueError(f"{where}: neither `1. Heading` nor `   1.1 Sub-heading`")
        if got != due:
            raise ValueError(f"{where}: number {got} where {due} was due")
        if "\t" in heading or MARKDOWN.search(heading):
            raise ValueError(f"{where}: a tab or Markdown in a plain-text outline")
        if heading.endswith((":", "：")):
            raise ValueError(f"{where}: a trailing colon")
    return Outline(tuple(headings), tuple(map(tuple, subs)))


def is_valid(text: str) -> bool:
    """Whether `parse` accepts the text."""
    try:
        parse(text)
    except ValueError:
        return False
    return True


def words(text: str) -> tuple[str, ...]:
    """The words of a heading, without case and punctuation; a Chinese character is one word."""
    return tuple(WORD.findall(text.casefold()))


def is_chinese(character: str) -> bool:
    """Whether it is one Chinese character."""
    return bool(re.fullmatch(f"[{CHINESE}]", character))


def headings_of(text: str) -> list[str]:
    """What the lines of any text say, without numbers, list marks and indentation; blank lines are left out."""
    lines = (MARKS.sub("", line, count=1).strip() for line in text.splitlines())
    return [line for line in lines if line]


def repeats(headings: Sequence[tuple[str, ...]]) -> list[bool]:
    """Whether each heading, given as its words, shares `REPEATED` of them with one earlier heading."""
    counts = [Counter(heading) for heading in headings]
    return [
        bool(heading) and any((own & earlier).total() >= REPEATED * len(heading) for earlier in counts[:number])
        for number, (heading, own) in enumerate(zip(headings, counts, strict=True))
    ]


def loops(headings: Sequence[tuple[str, ...]]) -> bool:
    """Whether an outline goes round in circles: `LOOP` of its headings, and at least half, repeat earlier ones."""
    repeating = sum(repeats(headings))
    return repeating >= LOOP and 2 * repeating >= len(headings)


def check_lang(lang: str) -> None:
    """TKPOError for a language other than "en" and "zh"."""
    if lang not in CONCISE_LENGTH:
        raise TKPOError(f"unknown language {lang!r}: outlines are in 'en' or 'zh'")


def length(text: str, lang: str) -> int:
    """Words of English text ("en"); characters other than white space of Chinese text ("zh")."""
    check_lang(lang)
    return len(text.split()) if lang == "en" else len(re.sub(r"\s", "", text))


def obeys_detail(outline: Outline, attribute: str, lang: str, article_length: str | None = "short") -> bool:
    """Whether an outline has the number and size of headings that its attribute asks for.

    The rules are the corpus's own (data card), `HEADINGS` and `SUB_HEADINGS`: only a comprehensive outline has
    sub-headings, under every heading; a concise one has at most 6 English words or 14 Chinese characters a heading.
    An attribute that has no rule here (a user's own) asks for nothing: True.

    outline: as `parse` returns it.
    attribute: its name or its published Chinese phrase.
    lang: "en" or "zh".
    article_length: "short" or "long", for what the article's outlines must have; None accepts either.

    Raises:
        TKPOError: for a language other than "en" and "zh".
    """
    attribute = CHINESE_NAMES.get(attribute, attribute)
    longest = max(length(heading, lang) for heading in outline.headings)
    if attribute not in HEADINGS["short"]:
        return True
    if attribute == "concise" and longest > CONCISE_LENGTH[lang]:
        return False
    for kind in (article_length,) if article_length else HEADINGS:
        fewest, most = HEADINGS[kind][attribute]
        low, high = SUB_HEADINGS[kind] if attribute == "comprehensive" else (0, 0)
        if fewest <= outline.n_headings <= most and all(low <= len(s) <= high for s in outline.sub_headings):
            return True
    return False
