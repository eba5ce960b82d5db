"""A guard against loops: the tokens with which an outline would begin to repeat itself."""

from __future__ import annotations

import functools
import re

from transformers import PreTrainedTokenizerBase

RUN = 6  # no run of so many tokens stands twice in an outline
NUMBERING = re.compile(r"[\d.\s]*")


class LoopGuard:
    """Knows, after each token of an outline, which tokens may not come next."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, run: int = RUN):
        self.run = run
        self._piece = functools.cache(lambda token: tokenizer.decode([token]))

    def banned(self, ids: list[int]) -> set[int]:
        """The tokens that would repeat a run of `run` tokens of `ids`, or end a heading that it already has.

        ids: what was generated so far, without the prompt, so that an outline may quote its article. Headings are
        lines, compared without their numbers: after `1. Salt` neither `2. Salt` nor a heading that begins with
        exactly those tokens is written.
        """
        return self._runs(ids) | self._headings(ids)

    def _runs(self, ids: list[int]) -> set[int]:
        size = self.run - 1
        last = ids[len(ids) - size :]
        return {ids[i + size] for i in range(len(ids) - size) if ids[i : i + size] == last}

    def _headings(self, ids: list[int]) -> set[int]:
        *earlier, current = self._lines(ids)
        return {line[-1] for line in earlier if line and line[:-1] == current}

    def _lines(self, ids: list[int]) -> list[list[int]]:
        """The tokens of each line after its number; the last line is the one being written."""
        lines: list[list[int]] = [[]]
        for token in ids:
            piece = self._piece(token)
            if "\n" in piece:
                lines.append([])
            elif lines[-1] or not NUMBERING.fullmatch(piece):
                lines[-1].append(token)
        return lines
