"""What TKPOTrainer may be given as data set, turned into what it reads: encoded rows, in memory or as a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from tkpo.encoding import encode_dataset
from tkpo.errors import TKPOError
from tkpo.flip import PromptFlipper
from tkpo.shared_prefix import SharedPrefixDataset


class EncodedStream(torch.utils.data.IterableDataset):
    """Records of a stream, encoded one by one as they are read."""

    def __init__(self, records, encode: Callable[[list[dict]], datasets.Dataset]):
        self.records, self.encode = records, encode

    def __iter__(self) -> Iterator[dict]:
        for number, record in enumerate(self.records, 1):
            if "input_ids" in record:
                yield record
                continue
            try:
                yield self.encode([record])[0]
            except TKPOError as error:
                raise TKPOError(str(error).replace("record 1", f"record {number} of the stream", 1)) from error


class DataPreparer:
    """Turns what users give as data set into encoded rows.

    tokenizer, flipper, max_length: as `encode_dataset` takes them.
    share_prefix: make micro-batches of samples that share an article (`tkpo.shared_prefix`).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, flipper: PromptFlipper | None, max_length: int, share_prefix: bool
    ):
        self.share_prefix = share_prefix
        self._encode = lambda records: encode_dataset(records, tokenizer, flipper, max_length)

    def __call__(self, data, batch_size: int, name: str):
        """Encoded rows of `data`: None, records, encoded rows, a stream of either, or a dict of such by name.

        batch_size: samples per micro-batch. name: of the data set in errors.
        TKPOError for a data set that is empty, or that cannot be read so.
        """
        if data is None or isinstance(data, SharedPrefixDataset):
            return data
        if isinstance(data, dict):
            return {key: self(part, batch_size, f"{name}[{key!r}]") for key, part in data.items()}
        if isinstance(data, (datasets.IterableDataset, torch.utils.data.IterableDataset)):
            if self.share_prefix:
                raise TKPOError(f"share_prefix groups samples by article: {name} must not be a stream")
            return data if isinstance(data, EncodedStream) else EncodedStream(data, self._encode)
        if not hasattr(data, "__getitem__") or isinstance(data, str):
            raise TKPOError(f"{name} must be a list or Dataset of records, not {type(data).__name__}")
        if not len(data):
            raise TKPOError(f"{name} is empty: give at least one record, or None")
        if not isinstance(data[0], dict):
            raise TKPOError(f"{name}, record 1: expected an object, found {type(data[0]).__name__}")
        rows = data if "input_ids" in data[0] else self._encode(data)
        return SharedPrefixDataset(rows, batch_size) if self.share_prefix else rows
