"""Say what is wrong with corpus, record, pairwise and dataset_info files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tkpo.attributes import LANGUAGES, Axis, load_axes
from tkpo.data.files import read_info, read_rows
from tkpo.data.records import asked_attribute
from tkpo.data.shapes import record_faults, to_alpaca
from tkpo.data.subsets import corpus_length
from tkpo.errors import TKPOError
from tkpo.outline import obeys_detail, parse

CORPUS_FIELDS = ("id", "lang", "domain", "topic", "document", "outlines")


def check(paths: list[str | Path], axes: dict[str, Axis] | None = None) -> tuple[int, list[str]]:
    """Check files or folders (their .json and .jsonl files). Returns (records read, faults).

    axes: what records must ask for; None: only those that name a shipped axis are checked on theirs.
    """
    total, faults, seen = 0, [], {}
    for path in files_in(paths):
        faults += check_file(path, seen, axes)
        if path.name != "dataset_info.json":
            try:
                total += len(read_rows(path))
            except TKPOError:
                continue  # check_file has said so already
    return total, faults


def files_in(paths: list[str | Path]) -> list[Path]:
    """The files, and those of the folders that end in .json or .jsonl; TKPOError for a folder without any."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix in (".json", ".jsonl"))
            if not found:
                raise TKPOError(f"no .json or .jsonl files in folder {path}")
            files += found
        else:
            files.append(path)
    return files


def check_file(path: str | Path, seen: dict | None = None, axes: dict[str, Axis] | None = None) -> list[str]:
    """Faults of one file as "file, record N: what", for corpus, record, pairwise and dataset_info files.

    seen: topics and ids of files checked before, to find an article that stands twice.
    axes: as for `check`.
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
    kinds = Counter(kind_of(row) for row in rows)
    faults = []
    for number, row in enumerate(rows, 1):
        kind = kind_of(row) or kinds.most_common(1)[0][0] or "record"
        if kind != "corpus":
            found = list(record_faults(row, kind == "pairs")) or list(_attribute_faults(row, axes))
        else:
            found = list(_corpus_faults(row))
            for key in ("id", "topic"):
                value = str(row.get(key)).lower()
                where = seen.setdefault((key, value), f"{path}, record {number}")
                if where != f"{path}, record {number}":
                    found.append(f"{key} {row.get(key)!r} stands already at {where}")
        faults += [f"{path}, record {number}: {fault}" for fault in found]
    return faults


def kind_of(row: dict) -> str | None:
    """ "corpus", "pairs" or "record"; None for a row that is none of these."""
    if "outlines" in row or "document" in row:
        return "corpus"
    if "chosen" in row or "rejected" in row:
        return "pairs"
    return "record" if any(key in row for key in ("instruction", "conversations", "messages", "prompt")) else None


def _attribute_faults(row: dict, axes: dict[str, Axis] | None) -> Iterator[str]:
    if axes is None:
        axes = {name: axis for name, axis in load_axes().items() if name == row.get("axis")}
    if axes:
        try:
            asked_attribute(to_alpaca(row), axes)
        except ValueError as error:
            yield str(error)


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
    kind = corpus_length(row)
    for attribute, text in row["outlines"].items():
        try:
            outline = parse(text)
        except (ValueError, TypeError, AttributeError) as error:
            yield f"{attribute}: {error}"
            continue
        if not obeys_detail(outline, attribute, row["lang"], kind):
            yield f"{attribute}: the outline breaks that attribute's rules on headings ({kind} article)"


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
