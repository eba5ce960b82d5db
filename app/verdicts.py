"""What can be said about a finished outline: style, level of detail, repetition, length."""

from __future__ import annotations

import logging
import re
import threading
from dataclasses import dataclass
from pathlib import Path

from tkpo.attributes import LANGUAGES, Axis
from tkpo.data import load_records
from tkpo.data.subsets import article_length
from tkpo.errors import TKPOError
from tkpo.outline import headings_of, length, loops, obeys_detail, parse, words

logger = logging.getLogger(__name__)

HEADING = re.compile(r"\s*(\d+(?:\.\d+)*)[.、)]?\s*\S.*")
RUN = {"en": 4, "zh": 6}  # words or characters that must come again in a row to count as a repetition
REPEATED_SHARE = 0.2  # of an outline: from here on it is called a loop


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

    def judge(self, text: str, style: str, lang: str, article: str = "") -> Verdict:
        """The verdict on an outline that was asked for in `style`. article: what it is of; none: a topic alone.

        Before `ready` is set it has nothing about the style.
        """
        reads_as = probability = log_odds = None
        classifier = self._classifiers.get((self._axes[style].name, lang))
        if classifier and text:
            reads_as, probability = max(classifier.predict_proba(text).items(), key=lambda item: item[1])
            log_odds = classifier.log_odds([text], [style])[0]
        lines = [match for line in text.split("\n") if (match := HEADING.fullmatch(line))]
        subs = sum("." in match[1] for match in lines)
        try:
            kind = article_length({"input": article, "lang": lang}) if article else None
            level, well_formed = obeys_detail(parse(text), style, lang, kind), True
        except ValueError:
            level, well_formed = None, False
        return Verdict(
            headings=len(lines) - subs,
            sub_headings=subs,
            words=length(text, lang),
            well_formed=well_formed,
            level=level,
            repeats=repeats(text, lang),
            reads_as=reads_as,
            probability=probability,
            log_odds=log_odds,
        )


def repeats(text: str, lang: str) -> bool:
    """Whether an outline repeats itself: its headings go round in circles, or a fifth of it are runs that came before.

    A run is 4 words of English or 6 characters of Chinese within a heading.
    """
    headings, size = [words(heading) for heading in headings_of(text)], RUN[lang]
    if loops(headings):
        return True
    seen, repeated, total = set(), 0, 0
    for heading in headings:
        covered = set()
        for start in range(len(heading) - size + 1):
            run = heading[start : start + size]
            if run in seen:
                covered.update(range(start, start + size))
            seen.add(run)
        repeated += len(covered)
        total += len(heading)
    return bool(total) and repeated / total >= REPEATED_SHARE
