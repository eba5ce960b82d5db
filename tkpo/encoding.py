"""From records to token ids and batches: what the loss is trained on."""

from __future__ import annotations

import logging
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tkpo.attributes import Axis
from tkpo.data import annotate, as_records, flip_record, read_rows
from tkpo.data.check import files_in, kind_of
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
    return _fit_before(record, len(response), tokenizer, max_length, axes), response


def _fit_before(record: dict, response: int, tokenizer, max_length: int, axes: list[Axis] | None = None) -> Fitted:
    """The prompt before a response of so many tokens; TKPOError says what length would do."""
    try:
        return fit_prompt(record, tokenizer, max_length - response, axes)
    except TKPOError as error:
        whole = len(encode_text(prompt_text(record, tokenizer), tokenizer)) + response
        raise TKPOError(
            f"does not fit in max_length {max_length}: its response has {response} tokens and {error}. "
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
    _report(cuts, len(rows), max_length)
    if not rows:
        raise TKPOError("no records to encode")
    return Dataset.from_list(rows)


def encode_pairs(records: list[dict], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, str]]:
    """Pairs as TRL's trainers take them, in text: `prompt` in the chat template, `chosen`, `rejected`.

    Articles are cut as in `encode_dataset`, so that TRL has nothing to cut; each response has one token more for its
    end. TKPOError names a record that does not fit.
    """
    rows, cuts = [], []
    for number, record in enumerate(records, 1):
        answers = {name: record[name] for name in ("chosen", "rejected")}
        response = 1 + max(len(encode_text(answer, tokenizer)) for answer in answers.values())
        try:
            fitted = _fit_before(record, response, tokenizer, max_length)
        except TKPOError as error:
            raise TKPOError(f"record {number} ({record.get('id', number)}): {error}") from error
        cuts += [fitted.cut] if fitted.cut else []
        rows.append({"prompt": prompt_text(fitted.record, tokenizer), **answers})
    _report(cuts, len(rows), max_length)
    return rows


def measure(
    paths: list[str | Path], tokenizer: PreTrainedTokenizerBase, max_length: int, axes: dict[str, Axis] | None = None
) -> str:
    """One line per file of records: their lengths in tokens, how many articles would be cut, what would not fit.

    paths: files or folders without faults (`tkpo.data.check`); files of other kinds are passed over.
    tokenizer: whose tokens are counted.
    max_length: tokens of prompt and response, of a pair with its longer response.
    axes: of the records; None: the shipped ones.
    """
    lines, tables = [], None if axes is None else list(axes.values())
    for path in files_in(paths):
        rows = [] if path.name == "dataset_info.json" else read_rows(path)
        if not rows or (kind := kind_of(rows[0])) == "corpus":
            continue
        lengths, cuts, faults = [], [], []
        for number, record in enumerate(as_records(rows, pairs=kind == "pairs"), 1):
            answers = [record[name] for name in ("output", "chosen", "rejected") if name in record]
            response = max(
                len(encode_text(response_text({**record, "output": answer}, tokenizer), tokenizer))
                for answer in answers
            )
            lengths.append(len(encode_text(prompt_text(record, tokenizer), tokenizer)) + response)
            try:
                cut = _fit_before(record, response, tokenizer, max_length, tables).cut
                cuts += [cut] if cut else []
            except TKPOError as error:
                faults.append(f"{path}, record {number}: {error}")
        spread = f"{min(lengths)} to {max(lengths)} tokens (median {statistics.median(lengths):.0f})"
        cut = f"; {len(cuts)} would be cut by {min(cuts)} to {max(cuts)} tokens" if cuts else ""
        lines += [f"{path}: {len(lengths)} records of {spread}; max_length {max_length}{cut}", *faults]
    return "\n".join(lines)


def _report(cuts: list[int], count: int, max_length: int) -> None:
    """One line on how many of `count` records lost how many tokens."""
    if cuts:
        logger.warning(
            "%d of %d records are longer than max_length %d: their articles were cut by %d to %d tokens (median %d)",
            *(len(cuts), count, max_length, min(cuts), max(cuts), statistics.median(cuts)),
        )


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
