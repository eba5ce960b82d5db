"""Build the data sets of every axis from a corpus of articles with outlines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tkpo.attributes import LANGUAGES, Axis, load_axes
from tkpo.data.check import check_file
from tkpo.data.files import entry_name, read_rows
from tkpo.data.prompts import make_record
from tkpo.data.subsets import corpus_length
from tkpo.errors import TKPOError

SPLITS = ("train", "validation", "test")


def split_of(document: str) -> str:
    """The split of an article, from a hash of its text alone: 80 % train, 10 % validation, 10 % test.

    The same article is in the same split in every data set, language file and corpus order, and new
    articles move none of the old ones.
    """
    part = _hash(" ".join(document.split())) % 10
    return "train" if part < 8 else "validation" if part == 8 else "test"


def is_topic_only(article_id: str) -> bool:
    """Whether an article's training and validation samples carry the topic alone: a fixed third, by hash.

    All styles of an article have the same form, so that they stay together.
    """
    return _hash(article_id) % 3 == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def build(corpus: str | Path, out: str | Path, axes_file: str | Path | None = None) -> dict[str, int]:
    """Write every axis's data set from the corpus files `corpus/*.jsonl` into `out`, with dataset_info.json.

    Prompts are in the published order, instruction first; `arrange` puts a record in the other one.
    Returns {file: number of records}. The corpus is checked first; TKPOError lists its faults and nothing is
    written. An axis some of whose attributes the corpus has no outlines for is an error too.
    """
    paths = sorted(Path(corpus).glob("*.jsonl"))
    if not paths:
        raise TKPOError(f"no *.jsonl files in corpus folder {corpus}")
    seen = {}
    faults = [fault for path in paths for fault in check_file(path, seen)]
    if faults:
        shown = "\n".join(faults[:20]) + (f"\n… and {len(faults) - 20} more" if len(faults) > 20 else "")
        raise TKPOError(f"the corpus has {len(faults)} faults, nothing was written:\n{shown}")
    articles = [row for path in paths for row in read_rows(path)]
    out = Path(out)
    info, files = {}, {}
    for axis in load_axes(axes_file).values():
        for lang in LANGUAGES:
            rows = [a for a in articles if a["lang"] == lang]
            for split in SPLITS:
                chosen = [a for a in rows if split_of(a["document"]) == split]
                records = [r for a in chosen for r in _records(a, axis, split)]
                pairs = [_pair(r, a, axis) for a in chosen for r in _records(a, axis, split)]
                for items, is_pairs in ((records, False), (pairs, True)):
                    if not items:
                        continue
                    name = f"{axis.name}/{split}.{lang}{'.pairs' if is_pairs else ''}.json"
                    files[name] = items
                    info[entry_name(axis.name, lang, split, is_pairs)] = _info_entry(name, is_pairs)
    for name, items in files.items():  # only now, so that an error above leaves nothing half-built
        _write_array(out / name, items)
    _write_text(out / "dataset_info.json", json.dumps(info, indent=2, ensure_ascii=False) + "\n")
    return {name: len(items) for name, items in files.items()}


def _records(article: dict, axis: Axis, split: str) -> Iterator[dict]:
    for attribute in axis.attributes:
        if attribute not in article["outlines"]:
            raise TKPOError(f"{article['id']}: no outline for attribute {attribute!r} of axis {axis.name}")
        topic_only = is_topic_only(article["id"])
        for form in ("article", "topic") if split == "test" else ("topic",) if topic_only else ("article",):
            document = article["document"] if form == "article" else None
            record = make_record(axis, attribute, article["topic"], document, article["lang"])
            yield {
                "instruction": record["instruction"],
                "input": record["input"],
                "output": article["outlines"][attribute],
                "id": article["id"],
                **{key: record[key] for key in ("lang", "axis", "attribute", "form")},
                "length": corpus_length(article),
            }


def _pair(record: dict, article: dict, axis: Axis) -> dict:
    pair = dict(record)
    output = pair.pop("output")
    rejected = article["outlines"][axis.flip[record["attribute"]]]
    return {
        "instruction": pair.pop("instruction"),
        "input": pair.pop("input"),
        "chosen": output,
        "rejected": rejected,
        **pair,
    }


def _info_entry(name: str, is_pairs: bool) -> dict:
    columns = {"prompt": "instruction", "query": "input"}
    if is_pairs:
        return {"file_name": name, "ranking": True, "columns": {**columns, "chosen": "chosen", "rejected": "rejected"}}
    return {"file_name": name, "columns": {**columns, "response": "output"}}


def _write_array(path: Path, items: list[dict]) -> None:
    lines = ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    _write_text(path, f"[\n{lines}\n]\n")


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8", newline="\n")
    part.replace(path)
