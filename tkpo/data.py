"""Data sets: build them from a corpus, load them, check them.

A record is an Alpaca dict: `instruction`, `input`, `output`; the built files add `id`, `lang`, `axis`,
`attribute` and `form` ("article": topic and article given, "topic": the topic alone). A pair is the same with
`chosen` and `rejected` in place of `output`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tkpo.attributes import LANGUAGES, Axis, detect_language, load_axes
from tkpo.errors import TKPOError
from tkpo.outline import obeys_detail, parse

SPLITS = ("train", "validation", "test")
CORPUS_FIELDS = ("id", "lang", "domain", "topic", "document", "outlines")


# ---- prompts -------------------------------------------------------------------------------------------


def make_input(axis: Axis, topic: str, document: str | None, lang: str) -> str:
    """The `input` field: topic line and article in English, the article alone in Chinese (as published)."""
    if document and lang == "zh":
        return document
    topic_line = axis.topics[lang].replace("{topic}", topic)
    return f"{topic_line}\n\n{document}" if document else topic_line


def user_message(record: dict) -> str:
    """Instruction and input as one message, joined as LLaMA-Factory joins them."""
    return "\n".join(part for part in (record["instruction"], record.get("input")) if part)


def make_record(axis: Axis, attribute: str, topic: str, document: str | None = None, lang: str | None = None):
    """A record without output, ready for generation. `lang` None: found from topic and document."""
    lang = lang or detect_language(f"{topic} {document or ''}")
    return {
        "instruction": axis.instruction(attribute, lang),
        "input": make_input(axis, topic, document, lang),
        "lang": lang,
        "axis": axis.name,
        "attribute": attribute,
        "form": "article" if document else "topic",
    }


def attribute_last(record: dict) -> dict:
    """The record with its instruction after its input, where TKPO's two passes share the article."""
    return {**record, "instruction": record["input"], "input": record["instruction"]}


# ---- reading -------------------------------------------------------------------------------------------


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a JSON array or JSON Lines file; TKPOError names the file and the record that is broken."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise TKPOError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TKPOError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise TKPOError(f"{path} is not valid JSON: {error}") from error
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):  # splitlines() would cut at U+2028 inside a text
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise TKPOError(f"{path}, line {number}: not valid JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise TKPOError(f"{path}, record {number}: expected an object, found {type(row).__name__}")
    return rows


def data_dir(path: str | Path | None = None) -> Path:
    """The folder of the built data sets: `path`, ./data, or data/ beside the package."""
    candidates = [Path(path)] if path else [Path("data"), Path(__file__).parent.parent / "data"]
    for candidate in candidates:
        if (candidate / "dataset_info.json").is_file():
            return candidate
    raise TKPOError(
        f"no dataset_info.json in {' or '.join(str(c) for c in candidates)}: "
        "give --data-dir, or build the data sets with `tkpo data build --corpus DIR --out DIR`"
    )


def load_records(
    dataset: str, split: str = "train", lang: str | None = None, pairs: bool = False, folder=None
) -> list[dict]:
    """Records of a data set.

    dataset: a name in `dataset_info.json` (language_style, level_of_detail), or a JSON / JSON Lines file.
    split: train, validation or test; lang: en, zh or None for both; pairs: the pairwise file for DPO.
    Raises TKPOError with file, record and fault if a record cannot be used.
    """
    path = Path(dataset)
    if path.suffix in (".json", ".jsonl"):
        paths = [path]
    else:
        root = data_dir(folder)
        info = read_info(root / "dataset_info.json")
        names = [entry_name(dataset, language, split, pairs) for language in ([lang] if lang else list(LANGUAGES))]
        names = [name for name in names if name in info]
        for name in names:
            if not isinstance(info[name], dict) or not isinstance(info[name].get("file_name"), str):
                raise TKPOError(f"{root / 'dataset_info.json'}, entry {name!r}: no file_name")
        paths = [root / info[name]["file_name"] for name in names]
        if not paths:
            raise TKPOError(
                f"no data set {dataset!r} ({split}{', pairs' if pairs else ''}) in {root / 'dataset_info.json'}; "
                f"there are: {', '.join(info)}. A file is given by its path, with .json or .jsonl at its end."
            )
    records = []
    for path in paths:
        rows = read_rows(path)
        for number, row in enumerate(rows, 1):
            fault = next(iter(_record_faults(row, pairs)), None)
            if fault:
                raise TKPOError(f"{path}, record {number}: {fault} (`tkpo data check {path}` lists every fault)")
        records += rows
    if lang:
        records = [r for r in records if r.get("lang", lang) == lang]
    if not records:
        raise TKPOError(f"no records in {', '.join(map(str, paths))}" + (f" in language {lang}" if lang else ""))
    return records


def annotate(records: list[dict], axis: Axis) -> list[dict]:
    """Records with `attribute`, `lang`, `form` and `id` filled in from the text where a file does not say them."""
    done = []
    for number, record in enumerate(records, 1):
        found = (record.get("attribute"), record.get("lang"))
        if not all(found):
            found = axis.find(record["instruction"]) or axis.find(user_message(record))
            if not found:
                raise TKPOError(
                    f"record {number}: no attribute phrase of axis {axis.name} in its instruction "
                    f"{record['instruction'][:120]!r}"
                )
        extra = {"attribute": found[0], "lang": found[1], "form": "article", "id": str(number), "axis": axis.name}
        done.append({**extra, **record})
    return done


def record_key(record: dict) -> str:
    """What tells an annotated record from the others of its data set; the same for a sample and its pair."""
    return f"{record['id']}/{record['attribute']}/{record['form']}"


def sample_order(record: dict) -> bytes:
    """A fixed shuffle, the same for a data set and its pairs, so that every method sees the same samples."""
    return hashlib.sha256(record_key(record).encode()).digest()


def entry_name(dataset: str, lang: str, split: str, pairs: bool = False) -> str:
    return f"{dataset}_{lang}_{split}" + ("_pairs" if pairs else "")


def read_info(path: Path) -> dict:
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TKPOError(f"cannot read {path}: {error}") from error
    if not isinstance(info, dict):
        raise TKPOError(f"{path}: expected an object of data sets, found {type(info).__name__}")
    return info


# ---- building ------------------------------------------------------------------------------------------


def split_of(document: str) -> str:
    """The split of an article, from a hash of its text alone: 80 % train, 10 % validation, 10 % test.

    The same article is in the same split in every data set, language file and corpus order, and new
    articles move none of the old ones.
    """
    part = _hash(" ".join(document.split())) % 10
    return "train" if part < 8 else "validation" if part == 8 else "test"


def is_topic_only(article_id: str, attribute: str) -> bool:
    """Whether a training or validation sample carries the topic alone: a fixed third, by hash."""
    return _hash(f"{article_id}/{attribute}") % 3 == 0


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def build(
    corpus: str | Path, out: str | Path, axes_file: str | Path | None = None, last: bool = False
) -> dict[str, int]:
    """Write every axis's data set from the corpus files `corpus/*.jsonl` into `out`, with dataset_info.json.

    last: prompts by `attribute_last`; without it the order is the published one, instruction first.
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
                records = [r for a in chosen for r in _records(a, axis, split, last)]
                pairs = [_pair(r, a, axis) for a in chosen for r in _records(a, axis, split, last)]
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


def _records(article: dict, axis: Axis, split: str, last: bool) -> Iterator[dict]:
    for attribute in axis.attributes:
        if attribute not in article["outlines"]:
            raise TKPOError(f"{article['id']}: no outline for attribute {attribute!r} of axis {axis.name}")
        topic_only = is_topic_only(article["id"], attribute)
        for form in ("article", "topic") if split == "test" else ("topic",) if topic_only else ("article",):
            document = article["document"] if form == "article" else None
            record = make_record(axis, attribute, article["topic"], document, article["lang"])
            record = attribute_last(record) if last else record
            yield {
                "instruction": record["instruction"],
                "input": record["input"],
                "output": article["outlines"][attribute],
                "id": article["id"],
                **{key: record[key] for key in ("lang", "axis", "attribute", "form")},
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


# ---- checking ------------------------------------------------------------------------------------------


def check(paths: list[str | Path]) -> tuple[int, list[str]]:
    """Check files or folders (their .json and .jsonl files). Returns (records read, faults)."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix in (".json", ".jsonl"))
            if not found:
                raise TKPOError(f"no .json or .jsonl files in folder {path}")
            files += found
        else:
            files.append(path)
    total, faults, seen = 0, [], {}
    for path in files:
        faults += check_file(path, seen)
        if path.name != "dataset_info.json":
            try:
                total += len(read_rows(path))
            except TKPOError:
                continue  # check_file has said so already
    return total, faults


def check_file(path: str | Path, seen: dict | None = None) -> list[str]:
    """Faults of one file as "file, record N: what", for corpus, Alpaca, pairwise and dataset_info files.

    seen: topics and ids of files checked before, to find an article that stands twice.
    """
    path = Path(path)
    if path.name == "dataset_info.json":
        return _info_faults(path)
    try:
        rows = read_rows(path)
    except TKPOError as error:
        return [str(error)]
    if not rows:
        return [f"{path}: no records"]
    seen = {} if seen is None else seen
    kinds = Counter(_kind(row) for row in rows)
    faults = []
    for number, row in enumerate(rows, 1):
        kind = _kind(row) or kinds.most_common(1)[0][0] or "alpaca"
        found = list(_corpus_faults(row) if kind == "corpus" else _record_faults(row, kind == "pairs"))
        if kind == "corpus":
            for key in ("id", "topic"):
                value = str(row.get(key)).lower()
                where = seen.setdefault((key, value), f"{path}, record {number}")
                if where != f"{path}, record {number}":
                    found.append(f"{key} {row.get(key)!r} stands already at {where}")
        faults += [f"{path}, record {number}: {fault}" for fault in found]
    return faults


def _kind(row: dict) -> str | None:
    if "outlines" in row or "document" in row:
        return "corpus"
    if "chosen" in row or "rejected" in row:
        return "pairs"
    return "alpaca" if "instruction" in row else None


def _record_faults(row: dict, pairs: bool) -> Iterator[str]:
    outputs = ("chosen", "rejected") if pairs else ("output",)
    for key in ("instruction", *outputs):
        if key not in row:
            yield f"no field {key!r}"
        elif not isinstance(row[key], str):
            yield f"field {key!r} is {type(row[key]).__name__}, not text"
        elif not row[key].strip():
            yield f"field {key!r} is empty"
    if not isinstance(row.get("input", ""), str):
        yield f"field 'input' is {type(row['input']).__name__}, not text"
    if pairs and row.get("chosen") is not None and row.get("chosen") == row.get("rejected"):
        yield "chosen and rejected are the same text"
    if row.get("lang", "en") not in LANGUAGES:
        yield f"field 'lang' is {row['lang']!r}, not one of {', '.join(LANGUAGES)}"


def _corpus_faults(row: dict) -> Iterator[str]:
    missing = [key for key in CORPUS_FIELDS if key not in row]
    if missing:
        yield f"no field {', '.join(missing)}"
        return
    for key in ("id", "topic", "document"):
        if not isinstance(row[key], str) or not row[key].strip():
            yield f"field {key!r} is empty or not text"
            return
    if row["lang"] not in LANGUAGES:
        yield f"field 'lang' is {row['lang']!r}, not one of {', '.join(LANGUAGES)}"
        return
    if not isinstance(row["outlines"], dict) or not row["outlines"]:
        yield "field 'outlines' is not an object of attribute: outline"
        return
    for attribute, text in row["outlines"].items():
        try:
            outline = parse(text)
        except (ValueError, TypeError, AttributeError) as error:
            yield f"{attribute}: {error}"
            continue
        if not obeys_detail(outline, attribute, row["lang"]):
            yield f"{attribute}: the outline breaks that attribute's rules on headings and sub-headings"


def _info_faults(path: Path) -> list[str]:
    try:
        info = read_info(path)
    except TKPOError as error:
        return [str(error)]
    faults = []
    for name, entry in info.items():
        file_name = entry.get("file_name") if isinstance(entry, dict) else None
        if not file_name or not isinstance(file_name, str):
            faults.append(f"{path}, entry {name!r}: no file_name")
        elif not (path.parent / file_name).is_file():
            faults.append(f"{path}, entry {name!r}: file {file_name} does not exist")
    return faults
