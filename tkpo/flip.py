"""The flip on token ids: find the attribute phrase in a tokenized prompt and put the flipped one in its place.

The response keeps its tokens; phrases may have any number of tokens, so the flipped sequence may be longer or
shorter, and its labels move along.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tkpo.attributes import Axis
from tkpo.errors import TKPOError
from tkpo.loss import IGNORE_INDEX

RESPONSE = -1  # stands for the tokens of a response where prompts are searched
ANCHOR = 2  # tokens of the instruction before the phrase that must stand there too, on the first try


@dataclass(frozen=True)
class _Pattern:
    """before + phrase + after is searched for; phrase is replaced."""

    attribute: str
    before: tuple[int, ...]
    phrase: tuple[int, ...]
    after: tuple[int, ...]
    replacement: tuple[int, ...]


class PromptFlipper:
    """Flips the attribute of tokenized prompts, along one axis or along each prompt's own.

    tokenizer: whose tokens the prompts are.
    axes: one axis, or several by name (`get_axes`).

    The phrase is looked for where the axis's instruction has it, after the article (the whole instruction's tokens)
    or before it, then anywhere in the prompt; the first place wins. TKPOError at construction if the tokenizer merges
    a phrase with its neighbours, so that it cannot be replaced token by token.
    """

    def __init__(self, tokenizer, axes: Axis | dict[str, Axis]):
        self.axes = {axes.name: axes} if isinstance(axes, Axis) else dict(axes)
        self.tokenizer = tokenizer
        self._passes = {name: self._patterns(axis) for name, axis in self.axes.items()}

    def _patterns(self, axis: Axis) -> tuple[list[_Pattern], ...]:
        """Patterns of an axis, those of one pass after another."""
        following, anchored, loose = [], [], []
        for attribute, other in axis.flip.items():
            for lang in axis.phrases[attribute]:
                if lang in axis.instructions_after:
                    following.append(self._anchored(axis, attribute, other, lang, after=True))
                if lang in axis.instructions:
                    anchored.append(self._anchored(axis, attribute, other, lang, after=False))
                loose += self._loose(axis, attribute, other, lang)
        bare_end = [_Pattern(p.attribute, p.before, p.phrase, (), p.replacement) for p in anchored]
        return following, anchored, bare_end, loose

    def _anchored(self, axis: Axis, attribute: str, other: str, lang: str, after: bool) -> _Pattern:
        before, phrase, end = self._split(axis, attribute, lang, after)
        _, replacement, _ = self._split(axis, other, lang, after)
        before = before if after else before[-ANCHOR:]
        return _Pattern(attribute, before, phrase, end[:1], replacement)

    def _split(self, axis: Axis, attribute: str, lang: str, after: bool) -> tuple[tuple[int, ...], ...]:
        """Token ids of the instruction before, of and after the phrase."""
        phrase = axis.phrases[attribute][lang]
        text = axis.instruction(attribute, lang, after)
        start = (axis.instructions_after if after else axis.instructions)[lang].index("{attribute}")
        end = start + len(phrase)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, spans = encoded["input_ids"], encoded["offset_mapping"]
        inside = [i for i, (a, b) in enumerate(spans) if a < end and b > start]
        covered = text[spans[inside[0]][0] : spans[inside[-1]][1]]
        if covered.strip() != phrase:
            raise TKPOError(
                f"this tokenizer merges the phrase {phrase!r} of attribute {attribute!r} ({lang}) with its "
                f"neighbours into {covered!r}: change the instruction or the phrase in the axes table"
            )
        first, last = inside[0], inside[-1] + 1
        return tuple(ids[:first]), tuple(ids[first:last]), tuple(ids[last:])

    def _loose(self, axis: Axis, attribute: str, other: str, lang: str) -> list[_Pattern]:
        phrases = axis.phrases[attribute][lang], axis.phrases[other][lang]
        forms = [str, lambda s: " " + s, str.capitalize] if phrases[0].isascii() else [str]
        encoded = [[tuple(self.tokenizer(f(p), add_special_tokens=False)["input_ids"]) for p in phrases] for f in forms]
        return [_Pattern(attribute, (), *(a, (), b)) for a, b in dict.fromkeys(map(tuple, encoded))]

    def find(self, ids: list[int], axis: str | None = None) -> tuple[str, int, int, tuple[int, ...]] | None:
        """(attribute, start, end, replacement) of the phrase in prompt `ids`, or None.

        axis: whose phrases are looked for; None: those of each axis in turn.
        """
        names = [axis] if axis in self.axes else self.axes
        for patterns in (p for passes in zip(*(self._passes[n] for n in names), strict=True) for p in passes):
            hits = []
            for p in patterns:
                start = _index(ids, p.before + p.phrase + p.after)
                if start is not None:
                    start += len(p.before)
                    hits.append((start, -len(p.phrase), p))
            if hits:
                start, _, p = min(hits, key=lambda hit: hit[:2])
                return p.attribute, start, start + len(p.phrase), p.replacement
        return None

    def flip_ids(self, ids: list[int], prompt_length: int, where: str = "sample", axis: str | None = None) -> list[int]:
        """Token ids with the attribute flipped in the prompt.

        ids: prompt and response.
        prompt_length: how many of them are the prompt.
        where: names the sample in errors.
        axis: the axis to flip on; None: the first that has an attribute phrase in the prompt.
        """
        _, start, end, replacement = self._require(list(ids[:prompt_length]), where, axis)
        return [*ids[:start], *replacement, *ids[end:]]

    def _require(self, prompt: list[int], where: str, axis: str | None) -> tuple[str, int, int, tuple[int, ...]]:
        """What `find` finds; TKPOError if it is nothing."""
        found = self.find(prompt, axis)
        if found:
            return found
        axes = [self.axes[axis]] if axis in self.axes else self.axes.values()
        names = ", ".join(x.name for x in axes)
        known = ", ".join(dict.fromkeys(p for x in axes for a in x.flip for p in x.phrases[a].values()))
        start = self.tokenizer.decode([i for i in prompt if i != RESPONSE][:60])
        raise TKPOError(
            f"{where}: no attribute phrase of axis {names} ({known}) in the prompt {start!r}. "
            "Choose the axis of this data set, or describe its attributes in an axes table"
        )

    def flip_row(
        self, ids: list[int], labels: list[int], where: str = "sample", axis: str | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, labels) with the attribute flipped in the prompt, or in the user turn that has it.

        ids: prompt and response; with several turns, every stretch without labels before the last response is searched.
        labels: of the same length, -100 outside the responses. A row without response tokens is returned as it is.
        where: names the sample in errors.
        axis: as in `flip_ids`.
        """
        trained = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        if not trained:
            return ids, labels
        prompts = [RESPONSE if label != IGNORE_INDEX else i for i, label in zip(ids, labels, strict=True)]
        _, start, end, replacement = self._require(prompts[: trained[-1]], where, axis)
        return (
            [*ids[:start], *replacement, *ids[end:]],
            [*labels[:start], *[IGNORE_INDEX] * len(replacement), *labels[end:]],
        )

    def flip_batch(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Flipped input_ids, attention_mask and labels, (B, T'), padded on the right.

        input_ids, labels, attention_mask: (B, T), padded on either side; labels -100 outside the response.
        TKPOError names the row in which no phrase is found. A row without response tokens is passed through.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for row in range(len(input_ids)):
            real = mask[row].bool()
            ids, own_labels = input_ids[row][real].tolist(), labels[row][real].tolist()
            rows.append(self.flip_row(ids, own_labels, f"row {row} of the batch"))
        return pad_rows(rows, self.pad_id, input_ids.device)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else 0


def pad_rows(rows: list[tuple[list[int], list[int]]], pad_id: int, device=None) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, labels) lists → input_ids, attention_mask, labels tensors (B, T), padded on the right."""
    length = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), length), pad_id, dtype=torch.long)
    labels = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.long)
    mask = torch.zeros((len(rows), length), dtype=torch.long)
    for row, (ids, own_labels) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        labels[row, : len(ids)] = torch.tensor(own_labels)
        mask[row, : len(ids)] = 1
    return input_ids.to(device), mask.to(device), labels.to(device)


def _index(ids: list[int], pattern: tuple[int, ...]) -> int | None:
    if not pattern:
        return None
    first, size = pattern[0], len(pattern)
    for i in range(len(ids) - size + 1):
        if ids[i] == first and tuple(ids[i : i + size]) == pattern:
            return i
    return None
