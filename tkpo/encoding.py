"""From records to token ids and batches: what the loss is trained on."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from tkpo.data import user_message
from tkpo.data.records import record_faults
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper, pad_rows
from tkpo.loss import IGNORE_INDEX

logger = logging.getLogger(__name__)


def encode_record(record: dict, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[list[int], int]:
    """(token ids of prompt and response, length of the prompt) of an Alpaca record, in the chat template.

    The response ends as the template ends an assistant's turn. Cut on the right to `max_length` tokens.
    """
    messages = [{"role": "user", "content": user_message(record)}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": record["output"]})
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    if not whole.startswith(prompt):
        raise TKPOError("this tokenizer's chat template does not put the response after the generation prompt")
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    response_ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    return (prompt_ids + response_ids)[:max_length], len(prompt_ids)


def encode_dataset(
    records: list[dict] | Dataset, tokenizer: PreTrainedTokenizerBase, flipper: PromptFlipper | None, max_length: int
) -> Dataset:
    """Records → `input_ids`, `labels` and, with a flipper, `flipped_input_ids`, `flipped_labels`.

    A record whose response is cut to nothing by `max_length` is left out with a warning; TKPOError names the
    record whose prompt has no attribute phrase, or says that no record is left.
    """
    rows, cut = [], []
    for number, record in enumerate(records, 1):
        name = f"record {number}" + (f" ({record['id']})" if record.get("id") else "")
        if fault := next(record_faults(record, pairs=False), None):
            raise TKPOError(f"{name}: {fault}")
        ids, prompt_length = encode_record(record, tokenizer, max_length)
        if len(ids) <= prompt_length:
            cut.append(name)
            continue
        response = ids[prompt_length:]
        row = {"input_ids": ids, "labels": [IGNORE_INDEX] * prompt_length + response}
        if flipper:
            flipped = flipper.flip_ids(ids, prompt_length, name, record.get("axis"))
            row["flipped_input_ids"] = flipped
            row["flipped_labels"] = [IGNORE_INDEX] * (len(flipped) - len(response)) + response
        rows.append(row)
    if cut:
        logger.warning(
            "%d of %d records have no response left within max_length %d and are skipped: %s",
            *(len(cut), len(cut) + len(rows), max_length, ", ".join(cut[:5]) + (", …" if len(cut) > 5 else "")),
        )
    if not rows:
        raise TKPOError(f"no record has a response token within max_length {max_length}: raise it")
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
