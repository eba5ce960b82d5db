"""A guard against loops that reads an outline as headings: it looks at their words, and at nothing else.

It does three things:

- A heading whose words so far are an earlier heading's up to its last word does not get that last word too, if the
  model has another word to offer.
- A heading that says the same words over and over within its line is ended where its next word would begin.
- An outline most of whose headings repeat earlier ones is ended at the end of a line.

Numbers, line breaks, indentation and punctuation are never in its way: it bans no token that such a place may need, so
that an outline whose numbering would be right without the guard has the right numbering with it. A word or a character
is kept out or let through as a whole, and nothing that was written is ever taken back.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tkpo.chinese import cut
from tkpo.outline import CHINESE, NUMBERING, WORD, is_chinese, loops, words

PERIOD = 8  # longest phrase, in words, that is looked for as a loop within one line
ROUNDS = 3  # times in a row that such a phrase stands in a looping line
SPAN = 6  # words that the rounds of a looping line have together, at the least
MARGIN = 7.0  # nats by which the best other token may be less likely than a banned one: a thousandth
INCOMPLETE = "\ufffd"  # what a decoder shows for a character whose bytes are not all there yet
WITHIN_WORDS = "'’-"


class LoopGuard:
    """Makes a `GuardedOutline` for each outline that is written. `name` is what records of predictions say."""

    name = "structure-1"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.piece = functools.cache(lambda token: tokenizer.decode([token]))
        self.end_outline = tokenizer.eos_token_id
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        self.end_heading = newline[0] if len(newline) == 1 else self.end_outline

    def outline(self) -> GuardedOutline:
        """A guarded outline of which nothing is written yet."""
        return GuardedOutline(self)


@dataclass(frozen=True)
class _LastWord:
    """The token with which a finished heading's last word begins, after the words `before`."""

    before: tuple[str, ...]
    token: int
    joins: bool  # right after a letter it would go on with that letter's word instead


@dataclass
class GuardedOutline:
    """An outline under way: `mask` the logits of each token, give the chosen one to `settle`, `add` what it returns."""

    guard: LoopGuard
    _line: list[int] = field(default_factory=list)
    _headings: list[tuple[str, ...]] = field(default_factory=list)
    _last_words: list[_LastWord] = field(default_factory=list)
    _looping: bool = False

    def banned(self) -> set[int]:
        """The tokens with which the heading under way would repeat an earlier one; each begins a word."""
        if not self._last_words or (current := self._words()) is None:
            return set()
        within = self._text(self._line)[-1:].isalnum()
        return {last.token for last in self._last_words if last.before == current and not (within and last.joins)}

    def mask(self, logits: Tensor) -> None:
        """Set the `banned` tokens among the next token's logits (V,) to -inf; not where only nonsense would be left."""
        if banned := self.banned():
            tokens = torch.tensor(sorted(banned), device=logits.device)
            kept = logits[tokens]
            logits[tokens] = -torch.inf
            if logits.max() < kept.max() - MARGIN:
                logits[tokens] = kept

    def settle(self, token: int) -> int:
        """The token to write where the model chose `token`: mostly that one, else what ends the heading or outline."""
        if token == self.guard.end_outline:
            return token
        if not self._line:
            return self.guard.end_outline if self._looping else token
        if len(self._line) < SPAN or "\n" in (piece := self.guard.piece(token)):
            return token
        goes_on = (piece[:1].isalnum() and not is_chinese(piece[:1])) or piece[:1] in WITHIN_WORDS
        if goes_on or (current := self._words()) is None or not _goes_round(current):
            return token
        return self.guard.end_heading

    def add(self, token: int) -> None:
        """Take note of a token that was written."""
        piece = self.guard.piece(token)
        if "\n" not in piece:
            self._line.append(token)
            return
        self._finish(piece.split("\n", 1)[0])
        # What a token has after its line break belongs to the next line.
        self._line = [token] if piece.rsplit("\n", 1)[1] else []

    def _words(self) -> tuple[str, ...] | None:
        """The words so far of the heading under way; None before its number and within a character."""
        text = self._text(self._line)
        number = NUMBERING.match(text)
        return words(text[number.end() :]) if number and not text.endswith(INCOMPLETE) else None

    def _text(self, ids: list[int]) -> str:
        return self.guard.tokenizer.decode(ids).rsplit("\n", 1)[-1]

    def _finish(self, rest: str) -> None:
        """The line under way ends; `rest` is what its last token has before the line break."""
        text = self._text(self._line) + rest
        number = NUMBERING.match(text)
        if not number or not (heading := words(text[number.end() :])):
            return
        self._headings.append(heading)
        self._looping = self._looping or loops(self._headings)
        if last := self._last_word(text):
            self._last_words.append(last)

    def _last_word(self, text: str) -> _LastWord | None:
        """The token that begins a word and holds the line's last word's beginning; None without one, and for a number.

        A token of several Chinese words begins with the first of them.
        """
        starts = _starts(text)
        for place in range(len(self._line) - 1, 0, -1):
            before, piece = self._text(self._line[:place]), self.guard.piece(self._line[place])
            number = NUMBERING.match(before)
            if not number or not text.startswith(before) or not piece.strip():
                continue  # the number, within a character, or between words
            if INCOMPLETE in piece:
                return None  # too many characters begin so
            start = len(before) + len(text[len(before) :]) - len(text[len(before) :].lstrip())
            if start in starts and text[start].isalpha():
                joins = not piece[:1].isspace() and not is_chinese(text[start])
                return _LastWord(words(before[number.end() :]), self._line[place], joins)
            if start <= starts[-1]:
                return None
        return None


def _starts(line: str) -> list[int]:
    """Where the words of a line begin: a Chinese word's first character, any other word's first letter or digit."""
    starts, end = [], 0
    for match in WORD.finditer(line):
        if not is_chinese(match[0]):
            starts.append(match.start())
        elif match.start() >= end:
            run = re.match(f"[{CHINESE}]+", line[match.start() :])[0]
            starts += [match.start() + n for n in itertools.accumulate(map(len, cut(run)), initial=0)][:-1]
            end = match.start() + len(run)
    return starts


def _goes_round(heading: tuple[str, ...]) -> bool:
    """Whether a phrase stands so many times in a row at the heading's end that it will hardly stop."""
    for period in range(1, min(PERIOD, len(heading) // ROUNDS) + 1):
        pairs = zip(reversed(heading), reversed(heading[:-period]), strict=False)
        repeated = period + sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        if repeated >= max(SPAN, ROUNDS * period):
            return True
    return False
