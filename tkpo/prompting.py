"""Prompts as token ids, for generation: in an adapter's order, flipped, with an article that is too long cut."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tkpo.attributes import Axis, axis_of, load_axes
from tkpo.data import PROMPT_ORDERS, arrange
from tkpo.data.fit import article_span, encode_text, prompt_text
from tkpo.data.prompts import find_attribute, flip_record
from tkpo.errors import TKPOError

logger = logging.getLogger(__name__)

INSTRUCTION_FIRST, ARTICLE_FIRST = PROMPT_ORDERS
MAX_ARTICLE_TOKENS = 4000  # of an article that are read


@dataclass(frozen=True)
class Prompt:
    """ids: token ids, up to where the outline begins. cut: tokens of the article's tail that were left out."""

    ids: list[int]
    cut: int = 0


class PromptWriter:
    """Makes prompts of records.

    tokenizer: with a chat template.
    axes_file: the axes table of one's own attributes; None: the one that the package ships.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, axes_file: str | None = None):
        self.tokenizer = tokenizer
        self.axes_file = axes_file

    def axis(self, record: dict) -> Axis:
        """The axis of a record: the one that it names, else the first with its attribute or a phrase in its text."""
        axes = load_axes(self.axes_file)
        if record.get("axis") in axes:
            return axes[record["axis"]]
        if record.get("attribute"):
            return axis_of(record["attribute"], self.axes_file)
        for axis in axes.values():
            if find_attribute(record, axis):
                return axis
        raise TKPOError(f"no attribute phrase of any axis in the instruction {record['instruction'][:120]!r}")

    def arranged(self, record: dict, prompt_order: str) -> dict:
        """The record with its prompt in that order; see `tkpo.data.arrange`."""
        if prompt_order == INSTRUCTION_FIRST:
            return record
        axis = self.axis(record)
        if not (record.get("attribute") and record.get("lang")) and (found := find_attribute(record, axis)):
            record = {**record, "attribute": found.attribute, "lang": found.lang}
        return arrange(record, axis, prompt_order)

    def flipped(self, record: dict) -> dict:
        """The record whose prompt asks for the attribute that its own flips to; TKPOError where it asks for none."""
        axis = self.axis(record)
        flipped = flip_record(record, axis)
        return {**flipped, "attribute": axis.flip[find_attribute(record, axis).attribute]}

    def prompt(self, record: dict) -> Prompt:
        """The record's prompt as it stands; of its article at most MAX_ARTICLE_TOKENS are kept, the tail is cut."""
        field, start, end = article_span(record, load_axes(self.axes_file).values())
        text, spans = record[field], []
        if len(text[start:end].encode()) > MAX_ARTICLE_TOKENS:  # a token has a byte at the least
            article = self.tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
            spans = article["offset_mapping"]
        cut = max(0, len(spans) - MAX_ARTICLE_TOKENS)
        if cut:
            kept = text[: start + spans[MAX_ARTICLE_TOKENS - 1][1]].rstrip()
            record = {**record, field: kept + text[end:]}
            logger.warning("the article has %d tokens: its last %d were cut", len(spans), cut)
        return Prompt(encode_text(prompt_text(record, self.tokenizer), self.tokenizer), cut)
