"""What can be said about a finished outline: style, level of detail, repetition, length."""

from __future__ import annotations

import logging
import math
import re
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from tkpo.attributes import LANGUAGES, Axis
from tkpo.data import load_records
from tkpo.errors import TKPOError
from tkpo.outline import length, obeys_detail, parse

logger = logging.getLogger(__name__)

HEADING = re.compile(r"\s*\d+(?:\.\d+)*[.、)]?\s*(\S.*)")
UNIT = {"en": re.compile(r"[^\W_]+(?:['’-][^\W_]+)*"), "zh": re.compile(r"[^\W_]")}  # words; characters
RUN = {"en": 4, "zh": 6}  # units that must come again in a row to count as a repetition
REPEATED_SHARE = 0.2  # of an outline's units: from here on it is called a loop


@dataclass(frozen=True)
class Verdict:
    """reads_as: the likeliest style, probability: its own; None without a classifier for this axis and language.

    log_odds: ln of p(style asked for) to p(any other). headings, sub_headings: counts. well_formed: whether
    `tkpo.outline.parse` accepts the outline. level: whether it keeps the style's level of detail; None where it is not
    well-formed. repeats: it says something again and again. words: of English, characters of Chinese.
    """

    headings: int
    sub_headings: int
    words: int
    well_formed: bool
    level: bool | None
    repeats: bool
    reads_as: str | None = None
    probability: float | None = None
    log_odds: float | None = None


class Judge:
    """Gives verdicts; the style classifiers are fitted by a thread of its own as soon as `start` is called.

    axes: style → its axis. data: folder of the data sets whose training split the classifiers learn from.
    """

    def __init__(self, axes: dict[str, Axis], data: Path):
        self._axes = axes
        self._data = data
        self._classifiers: dict[tuple[str, str], object] = {}
        self.ready = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self.fit, name="classifiers", daemon=True).start()

    def fit(self) -> None:
        """As in the evaluation; an axis without a data set gets no style verdict."""
        from tkpo.metrics import StyleClassifier

        for axis in dict.fromkeys(axis.name for axis in self._axes.values()):
            try:
                for lang in LANGUAGES:
                    records = load_records(axis, "train", lang, folder=self._data)
                    outlines = [r["output"] for r in records], [r["attribute"] for r in records]
                    self._classifiers[axis, lang] = StyleClassifier(lang).fit(*outlines)
            except TKPOError as error:
                logger.warning("no style verdicts for %s: %s", axis, error)
        self.ready.set()

    def judge(self, text: str, style: str, lang: str) -> Verdict:
        """The verdict on an outline that was asked for in `style`."""
        self.ready.wait(30)  # only the first visitor after a start may have to
        reads_as = probability = log_odds = None
        classifier = self._classifiers.get((self._axes[style].name, lang))
        if classifier and text:
            shares = classifier.predict_proba(text)
            reads_as, probability = max(shares.items(), key=lambda item: item[1])
            asked = min(max(shares.get(style, 0.0), 1e-9), 1 - 1e-9)
            log_odds = math.log(asked / (1 - asked))
        lines = [match for line in text.split("\n") if (match := HEADING.fullmatch(line))]
        subs = sum("." in match[0].split()[0].rstrip(".") for match in lines)
        try:
            outline = parse(text)
        except ValueError:
            level, well_formed = None, False
        else:
            level, well_formed = obeys_detail(outline, style, lang), True
        return Verdict(
            len(lines) - subs, subs, length(text, lang), well_formed, level, repeats(text, lang), reads_as,
            probability, log_odds,
        )  # fmt: skip


def repeats(text: str, lang: str) -> bool:
    """Whether an outline repeats itself: the same heading twice, or a fifth of it in runs that came before.

    Headings are compared without numbers, case and punctuation. A run is 4 words of English, 6 characters of Chinese.
    """
    unit, size = UNIT[lang], RUN[lang]
    lines = [match[1] if (match := HEADING.fullmatch(line)) else line for line in text.split("\n")]
    headings = Counter(tuple(unit.findall(line.lower())) for line in lines)
    del headings[()]
    if any(count > 1 for count in headings.values()):
        return True
    units = [word for heading in headings.elements() for word in (*heading, None)]  # None: the end of a line
    seen, covered = set(), set()
    for start in range(len(units) - size + 1):
        run = tuple(units[start : start + size])
        if None in run:
            continue
        if run in seen:
            covered.update(range(start, start + size))
        seen.add(run)
    words = sum(word is not None for word in units)
    return bool(words) and len(covered) / words >= REPEATED_SHARE
