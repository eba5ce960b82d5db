"""Prompts as token ids, for generation: in an adapter's order, flipped, with an article that is too long cut."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from tkpo.attributes import Axis, axis_of, load_axes
from tkpo.data import PROMPT_ORDERS, arrange, user_message
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
            if axis.find(record["instruction"]) or axis.find(user_message(record)):
                return axis
        raise TKPOError(f"no attribute phrase of any axis in the instruction {record['instruction'][:120]!r}")

    def arranged(self, record: dict, prompt_order: str) -> dict:
        """The record with its prompt in that order; see `tkpo.data.arrange`."""
        if prompt_order == INSTRUCTION_FIRST:
            return record
        axis = self.axis(record)
        if not (record.get("attribute") and record.get("lang")) and (found := axis.find(record["instruction"])):
            record = {**record, "attribute": found[0], "lang": found[1]}
        return arrange(record, axis, prompt_order)

    def flipped(self, record: dict) -> dict:
        """The record that asks for the attribute which its own flips to; TKPOError where it asks for none."""
        axis = self.axis(record)
        attribute, lang, text = record.get("attribute"), record.get("lang"), record["instruction"]
        for after in (False, True):
            if (
                attribute in axis.flip
                and lang in axis.instructions
                and text == axis.instruction(attribute, lang, after)
            ):
                other = axis.flip[attribute]
                return {**record, "attribute": other, "instruction": axis.instruction(other, lang, after)}
        field = "instruction" if axis.find(text) or not record.get("input") else "input"
        text, _, other = axis.flip_text(record[field])
        return {**record, "attribute": other, field: text}

    def prompt(self, record: dict) -> Prompt:
        """The record's prompt as it stands; of its article at most MAX_ARTICLE_TOKENS are kept, the tail is cut."""
        message = user_message(record)
        start, end = self._article(record, message)
        spans = []
        article = message[start:end]
        if len(article.encode()) > MAX_ARTICLE_TOKENS:  # a token has a byte at the least
            spans = self.tokenizer(article, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        cut = max(0, len(spans) - MAX_ARTICLE_TOKENS)
        if cut:
            kept = message[start : start + spans[MAX_ARTICLE_TOKENS - 1][1]].rstrip()
            message = message[:start] + kept + message[end:]
            logger.warning("the article has %d tokens: its last %d were cut", len(spans), cut)
        return Prompt(self.ids(message), cut)

    def ids(self, message: str) -> list[int]:
        """Token ids of a user's message, up to where the answer begins."""
        chat = [{"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _article(self, record: dict, message: str) -> tuple[int, int]:
        """Where the article stands in the message: what is not the instruction, wherever that is."""
        instruction, article = record["instruction"], record.get("input") or ""
        if not article:
            return self._article_in(message)
        if record.get("prompt_order") == ARTICLE_FIRST:
            return 0, len(article)
        if len(instruction) > len(article):  # the article is in `instruction`, and `input` asks for the outline
            return 0, len(instruction)
        return len(message) - len(article), len(message)

    def _article_in(self, message: str) -> tuple[int, int]:
        """Of a message that is all in one: the longer side of the line that has the attribute's phrase."""
        for axis in load_axes(self.axes_file).values():
            if not (found := axis.find(message)):
                continue
            phrase = axis.phrases[found[0]][found[1]]
            at = message.casefold().index(phrase.casefold())
            line_start, line_end = message.rfind("\n", 0, at) + 1, message.find("\n", at)
            after = line_end if line_end >= 0 else at + len(phrase)
            return (0, line_start) if line_start > len(message) - after else (after, len(message))
        return 0, len(message)
