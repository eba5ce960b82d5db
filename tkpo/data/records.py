"""Records: whatever enters, a file or rows in memory, read by the same rules and checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tkpo.attributes import LANGUAGES, Axis
from tkpo.data.files import data_dir, entry_name, read_info, read_rows
from tkpo.data.prompts import find_attribute
from tkpo.data.shapes import record_faults, to_alpaca
from tkpo.errors import TKPOError

PROMPT_FIELDS = ("system", "history", "instruction", "input", "prompt_order")


def as_records(rows: Iterable[dict], pairs: bool = False, where: str = "", needs_output: bool = True) -> list[dict]:
    """Rows of any shape (`tkpo.data.shapes`) as records: Alpaca's fields, `input` always text, no nulls.

    rows: a list of dicts or a datasets.Dataset, in which a null means that the row lacks the field.
    pairs: whether the rows have `chosen` and `rejected` in place of `output`.
    where: stands before the record's number in errors, e.g. "file.json, ".
    needs_output: False for prompts alone.

    Raises:
        TKPOError: names the first record that cannot be used and its fault.
    """
    rows_of_table = not isinstance(rows, (list, tuple))
    records = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise TKPOError(f"{where}record {number}: expected an object, found {type(row).__name__}")
        if rows_of_table:
            row = {key: value for key, value in row.items() if value is not None}
        if fault := next(record_faults(row, pairs, needs_output), None):
            raise TKPOError(f"{where}record {number}: {fault}")
        row = to_alpaca(row, needs_output)
        optional = ("id", "system", "history")
        kept = {key: value for key, value in row.items() if key not in optional or value not in (None, "", [])}
        records.append({**kept, "input": row.get("input") or ""})
    return records


def load_records(
    dataset: str,
    split: str = "train",
    lang: str | None = None,
    pairs: bool = False,
    folder=None,
    axes: Axis | dict[str, Axis] | None = None,
    needs_output: bool = True,
) -> list[dict]:
    """Records of a data set, or of several together.

    dataset: a name in `dataset_info.json` (language_style, level_of_detail), or a JSON / JSON Lines file; several
        with commas between them. What stands in more than one of them (the same prompt and outline) is taken from
        the first only, and keeps that one's `axis`.
    split: train, validation or test.
    lang: en, zh or None for both.
    pairs: the pairwise file for DPO.
    folder: where dataset_info.json is; default `data_dir()`.
    axes: annotate the records on these axes (see `annotate`), with the file's name in errors.
    needs_output: False for a file of prompts alone.

    Raises:
        TKPOError: with file, record and fault if a record cannot be used.
    """
    sets = [dataset] if Path(dataset).is_file() else [part.strip() for part in dataset.split(",")]
    files = [(path, name) for name in sets for path in _files(name, split, lang, pairs, folder)]
    records, names, seen = [], [], {}
    for path, name in files:
        try:
            rows = as_records(read_rows(path), pairs, f"{path}, ", needs_output)
        except TKPOError as error:
            hint = f" (`tkpo data check {path}` lists every fault)" if ", record " in str(error) else ""
            raise TKPOError(f"{error}{hint}") from error
        for number, row in enumerate(rows, 1):
            key = tuple(map(repr, (row.get(part) for part in (*PROMPT_FIELDS, "chosen" if pairs else "output"))))
            if seen.setdefault(key, name) == name:
                records.append(row)
                names.append(f"{path}, record {number}")
    if lang:
        kept = [i for i, row in enumerate(records) if row.get("lang", lang) == lang]
        records, names = [records[i] for i in kept], [names[i] for i in kept]
    if not records:
        where = ", ".join(str(path) for path, _ in files)
        raise TKPOError(f"no records in {where}" + (f" in language {lang}" if lang else ""))
    return records if axes is None else annotate(records, axes, names)


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


def annotate(records: list[dict], axes: Axis | dict[str, Axis], names: list[str] | None = None) -> list[dict]:
    """Records with `attribute`, `lang`, `form`, `id` and `axis` filled in where a file does not say them.

    records: as `load_records` or `as_records` returns them.
    axes: the axis of all records, or several by name (`get_axes`): a record then says its own in `axis`, or gets the
        first one that has an attribute phrase in its text.
    names: what errors call each record; default "record N".

    Raises:
        TKPOError: names a record without an attribute phrase, or whose `attribute` or `axis` is not what its prompt
            asks for: the flip and the scores would be about different things.
    """
    axes = {axes.name: axes} if isinstance(axes, Axis) else axes
    done = []
    for number, record in enumerate(records, 1):
        try:
            axis, attribute, lang = asked_attribute(record, axes)
        except ValueError as error:
            raise TKPOError(f"{names[number - 1] if names else f'record {number}'}: {error}") from error
        extra = {"attribute": attribute, "lang": lang, "form": "article", "id": str(number), "axis": axis.name}
        done.append({**extra, **{key: value for key, value in record.items() if value is not None}})
    return done


def asked_attribute(record: dict, axes: dict[str, Axis]) -> tuple[Axis, str, str]:
    """(axis, attribute, language) of a record; ValueError if it has none, or says another than its prompt does."""
    said = record.get("attribute")
    if record.get("axis") is not None and record["axis"] not in axes:
        raise ValueError(f"field 'axis' is {record['axis']!r}, not {' or '.join(axes)}: choose the axis of this data")
    own = [axes[record["axis"]]] if record.get("axis") else list(axes.values())
    own = [axis for axis in own if said is None or said in axis.flip]
    if not own:
        known = "; ".join(f"{axis.name} has {', '.join(axis.flip)}" for axis in axes.values())
        raise ValueError(f"field 'attribute' is {said!r}; axis {known}")
    for axis in own:
        if found := find_attribute(record, axis):
            break
    else:
        known = ", ".join(dict.fromkeys(p for axis in own for words in axis.phrases.values() for p in words.values()))
        raise ValueError(
            f"no attribute phrase of axis {', '.join(axis.name for axis in own)} ({known}) in its prompt; the "
            f"instruction is {record['instruction'][:120]!r}"
        )
    if said is not None and said != found.attribute:
        raise ValueError(
            f"field 'attribute' is {said!r}, but its prompt asks for {found.attribute!r}: correct or remove the field"
        )
    return axis, found.attribute, record.get("lang") or found.lang


def record_key(record: dict) -> str:
    """What tells an annotated record from the others of its data set; the same for a sample and its pair."""
    return f"{record['id']}/{record['attribute']}/{record['form']}"


def sample_order(record: dict) -> bytes:
    """A fixed shuffle, the same for a data set and its pairs, so that every method sees the same samples."""
    return hashlib.sha256(record_key(record).encode()).digest()


def records_digest(records: list[dict]) -> str:
    """SHA-256 (hexadecimal) of all that records say, in their order: two lists with one digest are the same."""
    digest = hashlib.sha256()
    for record in records:
        digest.update(json.dumps(record, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()
