"""Read data sets and files into records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from tkpo.attributes import LANGUAGES, Axis
from tkpo.data.prompts import user_message
from tkpo.errors import TKPOError


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
    candidates = [Path(path)] if path else [Path("data"), Path(__file__).parents[2] / "data"]
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
    """Records of a data set, or of several together.

    dataset: a name in `dataset_info.json` (language_style, level_of_detail), or a JSON / JSON Lines file; several
        with commas between them. What stands in more than one of them (the same prompt and outline) is taken from
        the first only, and keeps that one's `axis`.
    split: train, validation or test.
    lang: en, zh or None for both.
    pairs: the pairwise file for DPO.
    folder: where dataset_info.json is; default `data_dir()`.

    Raises:
        TKPOError: with file, record and fault if a record cannot be used.
    """
    sets = [dataset] if Path(dataset).is_file() else [part.strip() for part in dataset.split(",")]
    files = [(path, name) for name in sets for path in _files(name, split, lang, pairs, folder)]
    records, seen = [], {}
    for path, name in files:
        rows = read_rows(path)
        for number, row in enumerate(rows, 1):
            fault = next(iter(record_faults(row, pairs)), None)
            if fault:
                raise TKPOError(f"{path}, record {number}: {fault} (`tkpo data check {path}` lists every fault)")
            output = row["chosen"] if pairs else row["output"]
            if seen.setdefault((user_message(row), output), name) == name:
                records.append(row)
    if lang:
        records = [r for r in records if r.get("lang", lang) == lang]
    if not records:
        where = ", ".join(str(path) for path, _ in files)
        raise TKPOError(f"no records in {where}" + (f" in language {lang}" if lang else ""))
    return records


def _files(dataset: str, split: str, lang: str | None, pairs: bool, folder) -> list[Path]:
    path = Path(dataset)
    if path.suffix in (".json", ".jsonl"):
        return [path]
    root = data_dir(folder)
    info = read_info(root / "dataset_info.json")
    names = [entry_name(dataset, language, split, pairs) for language in ([lang] if lang else list(LANGUAGES))]
    names = [name for name in names if name in info]
    for name in names:
        if not isinstance(info[name], dict) or not isinstance(info[name].get("file_name"), str):
            raise TKPOError(f"{root / 'dataset_info.json'}, entry {name!r}: no file_name")
    if not names:
        raise TKPOError(
            f"no data set {dataset!r} ({split}{', pairs' if pairs else ''}) in {root / 'dataset_info.json'}; "
            f"there are: {', '.join(info)}. A file is given by its path, with .json or .jsonl at its end."
        )
    return [root / info[name]["file_name"] for name in names]


def annotate(records: list[dict], axes: Axis | dict[str, Axis]) -> list[dict]:
    """Records with `attribute`, `lang`, `form`, `id` and `axis` filled in where a file does not say them.

    axes: the axis of all records, or several by name (`get_axes`): a record then says its own in `axis`, or gets the
        first one that has an attribute phrase in its text.
    """
    axes = {axes.name: axes} if isinstance(axes, Axis) else axes
    done = []
    for number, record in enumerate(records, 1):
        if len(axes) > 1 and record.get("axis", next(iter(axes))) not in axes:
            raise TKPOError(f"record {number}: field 'axis' is {record['axis']!r}, not one of {', '.join(axes)}")
        own = [axes[record["axis"]]] if record.get("axis") in axes else list(axes.values())
        found = [
            (a, record["attribute"], record["lang"]) for a in own if record.get("attribute") and record.get("lang")
        ]
        for text in (record["instruction"], user_message(record)):
            found = found or [(a, *hit) for a in own if (hit := a.find(text))]
        if not found:
            raise TKPOError(
                f"record {number}: no attribute phrase of axis {', '.join(a.name for a in own)} in its instruction "
                f"{record['instruction'][:120]!r}"
            )
        axis, attribute, lang = found[0]
        extra = {"attribute": attribute, "lang": lang, "form": "article", "id": str(number), "axis": axis.name}
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


def record_faults(row: dict, pairs: bool) -> Iterator[str]:
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
