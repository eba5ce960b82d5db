"""Data sets: build them from a corpus, read them, choose subsets, check files.

A record is an Alpaca dict: `instruction`, `input`, `output`, and where a conversation has them `system` and `history`
(pairs of turns); the built files add `id`, `lang`, `axis`, `attribute`, `form` ("article": topic and article given,
"topic": the topic alone) and `length` (of the article: "short" or "long"). A pair has `chosen` and `rejected` in
place of `output`. Other shapes become records in `as_records`.
"""

from tkpo.data.build import build, is_topic_only, split_of
from tkpo.data.check import check, check_file
from tkpo.data.files import data_dir, entry_name, has_dataset, read_info, read_rows
from tkpo.data.fit import Fitted, fit_prompt, prompt_text, response_text
from tkpo.data.prompts import (
    PROMPT_ORDERS,
    arrange,
    chat_messages,
    find_attribute,
    flip_record,
    make_input,
    make_record,
    user_message,
)
from tkpo.data.records import annotate, as_records, load_records, record_key, records_digest, sample_order
from tkpo.data.subsets import article_length, balanced_subset

__all__ = [
    "PROMPT_ORDERS",
    "Fitted",
    "annotate",
    "arrange",
    "article_length",
    "as_records",
    "balanced_subset",
    "build",
    "chat_messages",
    "check",
    "check_file",
    "data_dir",
    "entry_name",
    "find_attribute",
    "fit_prompt",
    "flip_record",
    "has_dataset",
    "is_topic_only",
    "load_records",
    "make_input",
    "make_record",
    "prompt_text",
    "read_info",
    "read_rows",
    "record_key",
    "records_digest",
    "response_text",
    "sample_order",
    "split_of",
    "user_message",
]
