"""From records to token ids and batches: what the loss is trained on."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tkpo.attributes import Axis
from tkpo.data import annotate, as_records, flip_record
from tkpo.data.fit import Fitted, encode_text, fit_prompt, prompt_text, response_text
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper, pad_rows
from tkpo.loss import IGNORE_INDEX

logger = logging.getLogger(__name__)


def encode_record(record: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], int]:
    """(token ids of prompt and response, length of the prompt) of a record, in the chat template.

    The response ends as the template ends an assistant's turn. Where both have more than `max_length` tokens, the tail
    of the article is cut (`fit_prompt`); TKPOError says what length would do if that is not enough.
    """
    fitted, response = _fit(record, tokenizer, max_length)
    return fitted.ids + response, len(fitted.ids)


def _fit(record: dict, tokenizer, max_length: int, axes: list[Axis] | None = None) -> tuple[Fitted, list[int]]:
    response = encode_text(response_text(record, tokenizer), tokenizer)
    try:
        return fit_prompt(record, tokenizer, max_length - len(response), axes), response
    except TKPOError as error:
        whole = len(encode_text(prompt_text(record, tokenizer), tokenizer)) + len(response)
        raise TKPOError(
            f"does not fit in max_length {max_length}: its response has {len(response)} tokens and {error}. "
            f"A max_length of {whole} takes it whole"
        ) from error


def encode_dataset(
    records: list[dict] | Dataset, tokenizer: PreTrainedTokenizerBase, flipper: PromptFlipper | None, max_length: int
) -> Dataset:
    """Records → `input_ids`, `labels` and, with a flipper, `flipped_input_ids`, `flipped_labels`.

    Articles are cut where a sample would be longer than `max_length`; one line of the log says how many and by how
    much. The flipped prompt is the text of the true one, cut as it is, with the attribute flipped.

    records: of any shape that `as_records` takes.
    tokenizer: with a chat template.
    flipper: with the axes of the records; None: no flipped prompts.
    max_length: tokens of prompt and response.

    Raises:
        TKPOError: names a record that cannot be used, that has no attribute phrase, or that does not fit even with no
            article left.
    """
    records = as_records(records)
    names = [f"record {i}" + (f" ({r['id']})" if r.get("id") else "") for i, r in enumerate(records, 1)]
    axes = list(flipper.axes.values()) if flipper else None
    if flipper:
        records = annotate(records, flipper.axes, names)
    rows, cuts = [], []
    for name, record in zip(names, records, strict=True):
        try:
            fitted, response = _fit(record, tokenizer, max_length, axes)
        except TKPOError as error:
            raise TKPOError(f"{name}: {error}") from error
        cuts += [fitted.cut] if fitted.cut else []
        row = {"input_ids": fitted.ids + response, "labels": [IGNORE_INDEX] * len(fitted.ids) + response}
        if flipper:
            flipped = encode_text(
                prompt_text(flip_record(fitted.record, flipper.axes[record["axis"]]), tokenizer), tokenizer
            )
            row["flipped_input_ids"] = flipped + response
            row["flipped_labels"] = [IGNORE_INDEX] * len(flipped) + response
        rows.append(row)
    if cuts:
        logger.warning(
            "%d of %d records are longer than max_length %d: their articles were cut by %d to %d tokens (median %d)",
            *(len(cuts), len(rows), max_length, min(cuts), max(cuts), statistics.median(cuts)),
        )
    if not rows:
        raise TKPOError("no records to encode")
    return Dataset.from_list(rows)


@dataclass
class TKPOCollator:
    """Pads encoded rows on the right: input_ids, attention_mask, labels and their flipped_ counterparts, (B, T)."""

    pad_id: int

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {}
        for prefix in ("", "flipped_"):
            if f"{prefix}input_ids" in rows[0]:
                pairs = [(row[f"{prefix}input_ids"], row[f"{prefix}labels"]) for row in rows]
                names = (f"{prefix}{name}" for name in ("input_ids", "attention_mask", "labels"))
                batch.update(zip(names, pad_rows(pairs, self.pad_id), strict=True))
        return batch
