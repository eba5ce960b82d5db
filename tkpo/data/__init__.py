"""Data sets: build them from a corpus, read them, choose subsets, check files.

A record is an Alpaca dict: `instruction`, `input`, `output`; the built files add `id`, `lang`, `axis`, `attribute`,
`form` ("article": topic and article given, "topic": the topic alone) and `length` (of the article: "short" or
"long"). A pair has `chosen` and `rejected` in place of `output`.
"""

from tkpo.data.build import build, is_topic_only, split_of
from tkpo.data.check import check, check_file
from tkpo.data.prompts import PROMPT_ORDERS, arrange, make_input, make_record, user_message
from tkpo.data.records import (
    annotate,
    data_dir,
    entry_name,
    load_records,
    read_info,
    read_rows,
    record_key,
    sample_order,
)
from tkpo.data.subsets import article_length, balanced_subset

__all__ = [
    "PROMPT_ORDERS",
    "annotate",
    "arrange",
    "article_length",
    "balanced_subset",
    "build",
    "check",
    "check_file",
    "data_dir",
    "entry_name",
    "is_topic_only",
    "load_records",
    "make_input",
    "make_record",
    "read_info",
    "read_rows",
    "record_key",
    "sample_order",
    "split_of",
    "user_message",
]
