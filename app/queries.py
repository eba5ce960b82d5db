"""What a visitor may ask for: limits, checks, and the reasons of a refusal."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from app.texts import REFUSALS
from app.words import Words
from tkpo.attributes import LANGUAGES, Axis, detect_language, load_axes
from tkpo.data import make_record
from tkpo.errors import TKPOError

SPECIAL = re.compile(r"<\|([^|<>]{0,40})\|>")  # would be read as control tokens of the chat
NOT_TEXT = {"Cc", "Cs", "Cn", "Co"}  # Unicode categories: control, lone surrogate, unassigned, private
BIDI = set("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # could reorder the page's own words
# Letters and symbols by category, but shown as nothing: Hangul fillers, Khmer inherent vowels, blank Braille.
BLANK = set("\u115f\u1160\u3164\uffa0\u17b4\u17b5\u2800")
REASONS = Words([REFUSALS])


@dataclass(frozen=True)
class Limits:
    """What visitors may ask for. Characters, tokens, seconds; 0 is no limit for jobs_per_visitor and per_minute."""

    topic_chars: int = 200
    article_chars: int = 20_000
    article_tokens: int = 4_000
    outline_chars: int = 6_000
    outline_tokens: int = 384
    strength: float = 2.0
    waiting: int = 20
    patience: float = 20.0  # a job whose reader was silent for so long is stopped
    jobs_per_visitor: int = 2  # at the same time, of one session and of one address
    per_minute: int = 20  # requests of one address


class Refused(TKPOError):
    """A request that cannot be served; `key` and `values` name the message in `app.texts.REFUSALS`."""

    def __init__(self, key: str, **values):
        self.key, self.values = key, values
        super().__init__(self.message("en"))

    def message(self, ui: str) -> str:
        """The reason in page language `ui`."""
        return REASONS.say(ui)(f"refused_{self.key}", **self.values)


def reason(error: TKPOError, ui: str) -> str:
    """What to tell a visitor of `error`."""
    return error.message(ui) if isinstance(error, Refused) else str(error)


@dataclass(frozen=True)
class Query:
    """A checked request. axes: style → its axis; strength: γ of flip-guided decoding; cut: what was left out."""

    topic: str
    article: str
    style: str
    axes: dict[str, Axis]
    lang: str
    temperature: float
    seed: int
    tokens: int
    cut: dict | None = None
    strength: float = 0.0

    def record(self, style: str | None = None) -> dict:
        style = style or self.style
        return make_record(self.axes[style], style, self.topic, self.article or None, self.lang)


def check_query(
    limits: Limits,
    axes: dict[str, Axis],
    topic: object = "",
    article: object = "",
    style: object = None,
    language: object = "auto",
    temperature: object = 0.0,
    seed: object = 0,
    length: object = 160,
    strength: object = 0.0,
) -> Query:
    """A Query from whatever a page or a client sent.

    Args:
        limits: what may be asked for.
        axes: style → its axis, the styles that are offered.
        topic, article: text, one of the two at least.
        style: one of `axes`; None is the first.
        language: "en", "zh" or "auto", the language of the topic.
        temperature: 0 to 2; 0 is greedy.
        seed: of the sampling.
        length: of an outline, in tokens.
        strength: γ of flip-guided decoding; 0 is off.

    Raises:
        Refused: which field is wrong, and how.
    """
    style = next(iter(axes)) if style is None else style
    topic = " ".join(clean(topic, "topic", limits).split())
    article = clean(article, "article", limits).strip()
    if len(topic) > limits.topic_chars:
        raise Refused("topic_long", found=len(topic), limit=limits.topic_chars)
    if len(article) > limits.article_chars:
        raise Refused("article_long", found=len(article), limit=limits.article_chars)
    topic, article = (words if is_visible(words) else "" for words in (topic, article))
    if not topic and not article:
        raise Refused("empty")
    if not topic:
        topic = " ".join(article.split("\n", 1)[0].split())[:80]
    check_known("style", style, axes)
    check_known("language", language, ("auto", *LANGUAGES))
    lang = detect_language(f"{topic} {article}") if language == "auto" else language
    check_known("language", lang, axes[style].phrases[style])
    temperature = check_number("temperature", temperature, 0, 2)
    seed = int(check_number("seed", seed, 0, 2**31 - 1, whole=True))
    tokens = int(check_number("length", length, 8, limits.outline_tokens, whole=True))
    strength = float(check_number("style_strength", strength, 0, limits.strength))
    return Query(topic, article, style, axes, lang, temperature, seed, tokens, strength=strength)


def clean(value: object, field: str, limits: Limits) -> str:
    """Text without control characters and chat tokens; Refused unless `value` is text."""
    if value is None:
        return ""
    check_text(field, value)
    if len(value) > 50 * limits.article_chars:  # not worth looking at
        raise Refused("article_long", found=len(value), limit=limits.article_chars)
    value = unicodedata.normalize("NFC", value.replace("\r\n", "\n").replace("\r", "\n"))
    value = "".join(c for c in value if c in "\n\t" or (unicodedata.category(c) not in NOT_TEXT and c not in BIDI))
    return SPECIAL.sub(lambda match: f"‹{match[1]}›", value)


def is_visible(words: str) -> bool:
    """Whether a reader would see anything: more than spaces, format characters, bare combining marks and fillers."""
    return any(unicodedata.category(c)[0] in "LNPS" and c not in BLANK for c in words)


def check_text(field: str, value: object) -> str:
    if not isinstance(value, str):
        raise Refused("not_text", field=field, kind=type(value).__name__)
    return value


def check_known(field: str, value: object, known: Iterable[str]) -> None:
    if check_text(field, value) not in known:
        raise Refused(field, **{field: value[:60]}, known=", ".join(known))


def check_number(field: str, value: object, low: float, high: float, whole: bool = False) -> float:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    ok = ok and not (isinstance(value, float) and math.isnan(value)) and low <= value <= high
    if not ok or (whole and value != int(value)):
        raise Refused("number", field=field, found=_shown(value), low=low, high=high)
    return value


def _shown(value: object) -> str:
    """A value as an error message repeats it; Python itself refuses to print integers of thousands of digits."""
    if isinstance(value, int) and not -(10**40) < value < 10**40:
        return "a number of more than 40 digits"
    return str(value)[:40]


def style_axes(axes_file: str | Path | None = None) -> dict[str, Axis]:
    """Style → its axis, in the table's order; a style that two axes have belongs to the first."""
    found: dict[str, Axis] = {}
    for axis in load_axes(axes_file).values():
        for style in axis.attributes:
            found.setdefault(style, axis)
    return found


def read_article(data: bytes, name: str) -> str:
    """The text of a dropped .txt or .md file in UTF-8, UTF-16 or GB 18030; Refused if it is none of these."""
    name = Path(name).name[:80]
    if not name.lower().endswith((".txt", ".md")):
        raise Refused("file_type", name=name)
    if len(data) > 200_000:
        raise Refused("file_large", name=name, found=len(data) // 1000)
    encodings = ["utf-16"] if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "gb18030"]
    for encoding in encodings:
        try:
            found = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        strange = sum(unicodedata.category(c) in NOT_TEXT and c not in "\r\n\t\f" for c in found)
        if not strange:
            if not is_visible(found):
                raise Refused("file_empty", name=name)
            return found.replace("\r\n", "\n").strip()
    raise Refused("file_binary", name=name)


def cut_article(query: Query, tokenizer, limit: int) -> Query:
    """The query with the first `limit` tokens of its article, and what was cut."""
    if not query.article:
        return query
    spans = tokenizer(query.article, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    if len(spans) <= limit:
        return query
    kept = query.article[: spans[limit - 1][1]]
    rest = query.article[len(kept) :].split()
    cut = {"tokens": len(spans), "limit": limit, "chars": len(kept), "rest": " ".join(rest)[:60]}
    return replace(query, article=kept, cut=cut)
