"""Control attributes: their phrases, their axes and their flips, read from one YAML table.

An *attribute* is what a prompt asks for (literary). An *axis* is a set of attributes that exclude one
another (language style) with the *flip* of each: the attribute that takes its place in the flipped prompt.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import yaml

from tkpo.errors import TKPOError

LANGUAGES = ("en", "zh")
DEFAULT_TABLE = Path(__file__).parent / "configs" / "axes.yaml"


class Found(NamedTuple):
    """An attribute phrase in a text: which, in what language, and its characters."""

    attribute: str
    lang: str
    start: int
    end: int

    def inside(self, other: Found) -> bool:
        """Whether another phrase holds this one and more."""
        wider = other.end - other.start > self.end - self.start
        return wider and other.start <= self.start and self.end <= other.end


@dataclass(frozen=True)
class Axis:
    """Attributes that exclude one another, with the prompt that asks for them.

    name: e.g. "language_style".
    flip: attribute → the attribute that replaces it in the flipped prompt.
    phrases: attribute → language → the words that ask for it.
    instructions: language → instruction with an `{attribute}` slot, which stands before the article.
    instructions_after: the same in words that stand after the article.
    topics: language → input line with a `{topic}` slot.
    """

    name: str
    flip: dict[str, str]
    phrases: dict[str, dict[str, str]]
    instructions: dict[str, str]
    instructions_after: dict[str, str]
    topics: dict[str, str]

    @property
    def attributes(self) -> tuple[str, ...]:
        return tuple(self.flip)

    def instruction(self, attribute: str, lang: str, after: bool = False) -> str:
        """The instruction that asks for `attribute`; TKPOError if the axis has no such attribute or words.

        after: in the words that stand after the article, not before it.
        """
        if attribute not in self.flip:
            raise TKPOError(f"axis {self.name} has no attribute {attribute!r}; it has: {', '.join(self.flip)}")
        instructions = self.instructions_after if after else self.instructions
        if lang not in instructions or lang not in self.phrases[attribute]:
            raise TKPOError(
                f"attribute {attribute!r} has no phrase or instruction in language {lang!r}: add one to the axes table"
            )
        return instructions[lang].replace("{attribute}", self.phrases[attribute][lang])

    def find(self, text: str) -> tuple[str, str] | None:
        """(attribute, language) of the phrase that `locate` finds in `text`, or None."""
        found = self.locate(text)
        return (found.attribute, found.lang) if found else None

    def locate(self, text: str) -> Found | None:
        """The attribute phrase that `text` asks in, or None.

        It is the one that stands where an instruction of the table has it (in the whole instruction, or after its last
        words, as in "Requirement: …"), else the last one in the text. English phrases match whole words in any case.
        """
        for patterns, pick_last in self._passes:
            found = [
                Found(attribute, lang, *match.span("phrase"))
                for attribute, lang, pattern in patterns
                for match in pattern.finditer(text)
            ]
            whole = [f for f in found if not any(f.inside(other) for other in found)]
            if whole:
                return (max if pick_last else min)(whole, key=lambda f: f.start)
        return None

    @cached_property
    def _passes(self) -> list[tuple[list[tuple[str, str, re.Pattern]], bool]]:
        """(patterns of (attribute, language, expression), whether the last hit counts) of each way to look."""
        following: list[tuple[str, str, re.Pattern]] = []
        leading: list[tuple[str, str, re.Pattern]] = []
        anchored: list[tuple[str, str, re.Pattern]] = []
        loose: list[tuple[str, str, re.Pattern]] = []
        for attribute in self.flip:
            for lang, words in self.phrases[attribute].items():
                phrase = _phrase_pattern(words)
                for templates, found in ((self.instructions_after, following), (self.instructions, leading)):
                    if lang not in templates:
                        continue
                    before, after = templates[lang].strip().split("{attribute}")
                    found.append((attribute, lang, re.compile(re.escape(before) + phrase + re.escape(after))))
                    word = r"(?<!\w)" if before.isascii() else ""
                    if anchor := re.split(r"[.。!?！？\n]", before)[-1].strip():
                        anchored.append((attribute, lang, re.compile(rf"{word}(?i:{re.escape(anchor)})\W*?{phrase}")))
                loose.append((attribute, lang, re.compile(phrase)))
        return [(following, True), (leading, False), (anchored, False), (loose, True)]

    def replace(self, text: str, found: Found) -> str:
        """`text` with the phrase `found` in it replaced by its flip's, in the case that it is written in."""
        replacement = self.phrases[self.flip[found.attribute]][found.lang]
        written = text[found.start : found.end]
        as_given = written == self.phrases[found.attribute][found.lang]
        if written.isupper() and not as_given:
            replacement = replacement.upper()
        elif written[0].isupper() and not as_given:
            replacement = replacement[0].upper() + replacement[1:]
        return text[: found.start] + replacement + text[found.end :]

    def flip_text(self, text: str) -> tuple[str, str, str]:
        """Replace the attribute phrase in `text` by its flip's.

        Returns (flipped text, attribute, flipped attribute); TKPOError if no phrase is found.
        """
        found = self.locate(text)
        if not found:
            raise TKPOError(self.missing(text))
        return self.replace(text, found), found.attribute, self.flip[found.attribute]

    def missing(self, text: str) -> str:
        """What to say of a text without an attribute phrase."""
        known = ", ".join(p for a in self.flip for p in self.phrases[a].values())
        return f"no attribute phrase of axis {self.name} ({known}) in {text[:120]!r}"


def _phrase_pattern(phrase: str) -> str:
    """An expression with the group `phrase`."""
    escaped = re.escape(phrase)
    return rf"(?P<phrase>(?<!\w)(?i:{escaped})(?!\w))" if phrase.isascii() else f"(?P<phrase>{escaped})"


@lru_cache(maxsize=16)
def load_axes(path: str | Path | None = None) -> dict[str, Axis]:
    """Read the axes table at `path` (default: the one the package ships) → {name: Axis}.

    Raises TKPOError that names the file and the entry when the table does not hold together.
    """
    path = Path(path or DEFAULT_TABLE)
    table = _read_table(path)
    default = {} if path == DEFAULT_TABLE else _read_table(DEFAULT_TABLE)
    instructions, after, topics, phrases = (
        {**(default.get(key) or {}), **(table.get(key) or {})}
        for key in ("instruction", "instruction_after", "topic", "attributes")
    )
    slots = (("instruction", "{attribute}", instructions), ("instruction_after", "{attribute}", after))
    for kind, slot, texts in (*slots, ("topic", "{topic}", topics)):
        for lang, text in texts.items():
            if not isinstance(text, str) or text.count(slot) != 1:
                raise TKPOError(f"{path}: {kind} {lang!r} must be text with the slot {slot} exactly once")
    for attribute, words in phrases.items():
        if not isinstance(words, dict) or not all(isinstance(w, str) and w.strip() for w in [*words.values()] or [""]):
            raise TKPOError(f"{path}: attribute {attribute!r} needs a phrase a language, e.g. {{en: casual}}")
    axes = {}
    for name, flip in table["axes"].items():
        _check_flip(path, name, flip, phrases)
        axes[name] = Axis(name, dict(flip), {a: phrases[a] for a in flip}, instructions, after, topics)
    return axes


def _read_table(path: Path) -> dict:
    """The axes table as YAML has it; TKPOError if it cannot be read or its keys do not hold what they should."""
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TKPOError(f"cannot read axes table {path}: {error.strerror or error}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise TKPOError(f"{path} is not valid YAML in UTF-8: {error}") from error
    if not isinstance(table, dict) or not isinstance(table.get("axes"), dict) or not table["axes"]:
        raise TKPOError(f"{path}: an axes table needs the keys `attributes` and `axes` (see {DEFAULT_TABLE})")
    for key in ("instruction", "instruction_after", "topic", "attributes"):
        if not isinstance(table.get(key) or {}, dict):
            raise TKPOError(f"{path}: {key!r} must hold keys and values, not {table[key]!r}")
    return table


def _check_flip(path: Path, name: str, flip: dict[str, str], phrases: dict[str, dict[str, str]]) -> None:
    """TKPOError unless each attribute of an axis flips to another one, whose phrases are others in the same languages.

    path, name: of the table and the axis, for the error.
    flip: attribute → the attribute that it flips to.
    phrases: attribute → language → phrase.
    """
    if not isinstance(flip, dict) or len(flip) < 2:
        raise TKPOError(f"{path}: axis {name!r} needs at least two attributes with their flips")
    for attribute in flip:
        if attribute not in phrases:
            raise TKPOError(f"{path}: axis {name!r}: attribute {attribute!r} has no entry in `attributes`")
    for attribute, other in flip.items():
        if other not in list(flip) or other == attribute:
            raise TKPOError(
                f"{path}: axis {name!r}: {attribute!r} must flip to another attribute of the axis, not to {other!r}"
            )
        missing = set(phrases[attribute]) - set(phrases[other])
        if missing:
            raise TKPOError(
                f"{path}: {other!r} lacks a phrase in {', '.join(sorted(missing))}, which {attribute!r} has"
            )
        for lang, phrase in phrases[attribute].items():
            if phrase.casefold() == phrases[other][lang].casefold():
                raise TKPOError(f"{path}: {attribute!r} and {other!r} have the same phrase {phrase!r} in {lang}")


def get_axis(name: str, path: str | Path | None = None) -> Axis:
    """The axis called `name`; TKPOError that lists the axes there are."""
    axes = load_axes(path)
    if name not in axes:
        raise TKPOError(f"no axis {name!r}; there are: {', '.join(axes)}")
    return axes[name]


def get_axes(names: str, path: str | Path | None = None) -> dict[str, Axis]:
    """The axes called `names`, one name or several with commas between them → {name: Axis}, in that order."""
    return {name: get_axis(name, path) for name in (part.strip() for part in names.split(","))}


def axis_of(attribute: str, path: str | Path | None = None) -> Axis:
    """The first axis that has `attribute`; TKPOError that lists the attributes there are."""
    axes = load_axes(path)
    for axis in axes.values():
        if attribute in axis.flip:
            return axis
    known = dict.fromkeys(a for axis in axes.values() for a in axis.flip)
    raise TKPOError(f"no attribute {attribute!r}; there are: {', '.join(known)}")


def detect_language(text: str) -> str:
    """ "zh" if at least a fifth of the letters of `text` are Chinese characters, else "en"."""
    letters = [c for c in text if c.isalpha()]
    chinese = sum("\u4e00" <= c <= "\u9fff" or "\u3400" <= c <= "\u4dbf" for c in letters)
    return "zh" if letters and chinese >= 0.2 * len(letters) else "en"
