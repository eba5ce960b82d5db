"""The flip: find the attribute phrase in a prompt and put the flipped one in its place.

The response keeps its tokens; phrases may have any number of tokens, so the flipped sequence may be longer or
shorter, and its labels move along.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tkpo.attributes import Axis, Found
from tkpo.errors import TKPOError
from tkpo.loss import IGNORE_INDEX

CONTEXT = 4  # tokens before the phrase that are read again with its replacement, where the whole cannot be


class PromptFlipper:
    """Flips the attribute of prompts, along one axis or along each prompt's own.

    A record is flipped in its text (`flip_record`). Token ids are read as text too: the phrase is found as
    `Axis.locate` finds it, and its flip's put in its place in the case it is written in.

    tokenizer: whose tokens the prompts are.
    axes: one axis, or several by name (`get_axes`).
    """

    def __init__(self, tokenizer, axes: Axis | dict[str, Axis]):
        self.axes = {axes.name: axes} if isinstance(axes, Axis) else dict(axes)
        self.tokenizer = tokenizer

    def flip_ids(self, ids: list[int], prompt_length: int, where: str = "sample", axis: str | None = None) -> list[int]:
        """Token ids with the attribute flipped in the prompt.

        ids: prompt and response.
        prompt_length: how many of them are the prompt.
        where: names the sample in errors.
        axis: the axis to flip on; None: the first that has an attribute phrase in the prompt.
        """
        return self._flip([(0, prompt_length)], list(ids), where, axis)[0]

    def _flip(
        self, segments: list[tuple[int, int]], ids: list[int], where: str, axis: str | None = None
    ) -> tuple[list[int], int, int]:
        """(flipped ids, position of the change, tokens added) with the phrase looked for in `segments` of `ids`."""
        axes = [self.axes[axis]] if axis in self.axes else list(self.axes.values())
        for start, end in reversed(segments):
            text = self._decode(ids[start:end])
            for own in axes:
                if found := own.locate(text):
                    flipped = self._flip_segment(ids[start:end], text, own, found)
                    return ids[:start] + flipped + ids[end:], start, len(flipped) - (end - start)
        known = ", ".join(dict.fromkeys(p for x in axes for a in x.flip for p in x.phrases[a].values()))
        prompt = self._decode([token for start, end in segments for token in ids[start:end][-60:]])
        raise TKPOError(
            f"{where}: no attribute phrase of axis {', '.join(x.name for x in axes)} ({known}) in the prompt, which "
            f"ends in {prompt[-160:]!r}. Choose the axis of this data set, or describe its attributes in an axes table"
        )

    def _flip_segment(self, ids: list[int], text: str, axis: Axis, found: Found) -> list[int]:
        """The token ids of `text` with the phrase replaced; all other tokens stay where the tokenizer allows it."""
        flipped = axis.replace(text, found)
        if self._encode(text) == ids:
            return self._encode(flipped)
        # Not the tokenizer's own tokens of this text: replace those that the phrase stands in.
        first, last = self._token_at(ids, found.start, after=True), self._token_at(ids, found.end, after=False)
        left, right = len(self._decode(ids[:first])), len(self._decode(ids[:last]))
        piece = axis.replace(text[left:right], found._replace(start=found.start - left, end=found.end - left))
        context = ids[max(0, first - CONTEXT) : first]
        again = self._encode(self._decode(context) + piece)
        kept = again[: len(context)] == context
        return ids[:first] + (again[len(context) :] if kept else self._encode(piece)) + ids[last:]

    def _token_at(self, ids: list[int], place: int, after: bool) -> int:
        """How many tokens it takes to reach the character `place`: at most (`after`), or at least."""
        low, high = 0, len(ids)
        while low < high:
            middle = (low + high + after) // 2
            length = len(self._decode(ids[:middle]))
            if after:
                low, high = (middle, high) if length <= place else (low, middle - 1)
            else:
                low, high = (low, middle) if length >= place else (middle + 1, high)
        return low

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def flip_batch(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Flipped input_ids, attention_mask and labels, (B, T'), padded on the right.

        input_ids, labels, attention_mask: (B, T), padded on either side; labels -100 outside the response.
        In a row of several turns the phrase is looked for in all that has no label before a response, the last turn
        first. TKPOError names the row in which no phrase is found. A row without response is passed through.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = []
        for row in range(len(input_ids)):
            real = mask[row].bool()
            ids, own_labels = input_ids[row][real].tolist(), labels[row][real].tolist()
            rows.append(self.flip_row(ids, own_labels, f"row {row} of the batch"))
        return pad_rows(rows, self.pad_id, input_ids.device)

    def flip_row(
        self, ids: list[int], labels: list[int], where: str = "sample", axis: str | None = None
    ) -> tuple[list[int], list[int]]:
        """(ids, labels) with the attribute flipped in the prompt, or in the user's last turn that has it.

        ids: prompt and response; with several turns, every stretch without labels before a response is searched.
        labels: of the same length, -100 outside the responses. A row without response tokens is returned as it is.
        where: names the sample in errors.
        axis: as in `flip_ids`.
        """
        segments = _unlabelled(labels)
        if not segments:
            return ids, labels
        flipped, place, added = self._flip(segments, ids, where, axis)
        end = next(end for start, end in segments if start == place)
        return flipped, labels[:place] + [IGNORE_INDEX] * (end - place + added) + labels[end:]

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


def _unlabelled(labels: list[int]) -> list[tuple[int, int]]:
    """(start, end) of each run of labels -100 that a label comes after."""
    runs, start = [], None
    for i, label in enumerate(labels):
        if label == IGNORE_INDEX:
            start = i if start is None else start
        elif start is not None:
            runs.append((start, i))
            start = None
    return runs
