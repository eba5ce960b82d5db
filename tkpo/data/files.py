"""Read files: JSON arrays, JSON Lines, the register of data sets."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

from tkpo.attributes import LANGUAGES
from tkpo.errors import TKPOError


def read_rows(path: str | Path) -> list[dict]:
    """Rows of a JSON array or JSON Lines file, as they stand there.

    Raises:
        TKPOError: names the file and the record that is broken, and how to mend it.
    """
    path = Path(path)
    text = _read_text(path)
    doubled: list[tuple[dict, str]] = []

    def parse(part: str, where: str):
        try:
            return json.loads(part, object_pairs_hook=lambda pairs: _object(pairs, doubled))
        except ValueError as error:
            raise TKPOError(f"{where}not valid JSON: {error}") from error
        except RecursionError as error:
            raise TKPOError(f"{where}not valid JSON: nested too deeply") from error

    if text.lstrip().startswith("["):
        rows = parse(text, f"{path} is ")
    elif _is_one_object(text):
        raise TKPOError(f"{path} {_describe(json.loads(text))}")
    else:
        lines = enumerate(text.split("\n"), 1)  # splitlines() would cut at U+2028 inside a text
        rows = [parse(line, f"{path}, line {number}: ") for number, line in lines if line.strip()]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise TKPOError(f"{path}, record {number}: expected an object, found {type(row).__name__}")
        for owner, key in doubled:
            if _holds(row, owner):
                raise TKPOError(f"{path}, record {number}: the key {key!r} stands twice in one object; keep one")
        _check_text(row, f"{path}, record {number}: ")
    return rows


def _read_text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TKPOError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = _encoding(content)
        remedy = f"convert it: iconv -f {guess} -t UTF-8 {path} > new-file" if guess else "convert it to UTF-8"
        kind = f"it looks like {guess}" if guess else f"{error.reason} at byte {error.start}"
        raise TKPOError(f"{path} is not UTF-8 text ({kind}): {remedy}") from error


def _encoding(content: bytes) -> str | None:
    """What a file that is not UTF-8 is probably written in, by the name that iconv has for it."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    try:
        text = content.decode("gb18030")
    except UnicodeDecodeError:
        return None
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in text)
    return "GB18030" if chinese and chinese >= 0.5 * sum(not c.isascii() for c in text) else None


def _object(pairs: list[tuple], doubled: list[tuple[dict, str]]) -> dict:
    """A JSON object; one in which a key stands twice is noted in `doubled`."""
    made: dict = {}
    for key, value in pairs:
        if key in made:
            doubled.append((made, key))
        made[key] = value
    return made


def _holds(value, owner: dict) -> bool:
    """Whether `owner` is `value` or stands anywhere in it."""
    if value is owner:
        return True
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(_holds(part, owner) for part in parts)


def _is_one_object(text: str) -> bool:
    """Whether a text of several lines is one JSON object, which no JSON Lines file is."""
    if "\n" not in text.strip():
        return False
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _describe(found: dict) -> str:
    lists = [key for key, value in found.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    what = f"is one object with the keys {', '.join(map(repr, list(found)[:8]))}"
    if lists:
        return f"{what}; the records seem to stand under {lists[0]!r}: save that array alone as the file"
    return f"{what}; expected an array of records, or one record on each line"


def _check_text(row: dict, where: str) -> None:
    """TKPOError if a text of the row holds half of a surrogate pair, which no tokenizer and no file takes."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        bad = error.object[error.start]
        raise TKPOError(
            f"{where}a text holds U+{ord(bad):04X}, half of a character (a lone surrogate): remove or replace it"
        ) from error


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


def entry_name(dataset: str, lang: str, split: str, pairs: bool = False) -> str:
    """The name of a file of a data set in dataset_info.json."""
    return f"{dataset}_{lang}_{split}" + ("_pairs" if pairs else "")


def read_info(path: Path) -> dict:
    """The register dataset_info.json: entry → its file; TKPOError if it cannot be read."""
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TKPOError(f"cannot read {path}: {error}") from error
    if not isinstance(info, dict):
        raise TKPOError(f"{path}: expected an object of data sets, found {type(info).__name__}")
    return info


def has_dataset(dataset: str, split: str, folder: str | Path | None = None) -> bool:
    """Whether dataset_info.json has a data set of that name with that split, in any language."""
    try:
        info = read_info(data_dir(folder) / "dataset_info.json")
    except TKPOError:
        return False
    return any(entry_name(dataset, lang, split) in info for lang in LANGUAGES)
