"""Outlines of many documents: a JSON Lines file in, one out, resumed where an earlier call was cut off."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from tkpo.attributes import LANGUAGES, Axis
from tkpo.data import make_record
from tkpo.errors import TKPOError
from tkpo.sampling import Decoding

CHUNK = 8  # batches of outlines that are given to the engine together


class Engine(Protocol):
    """What writes the outlines: `tkpo.generation.OutlineGenerator` or `tkpo.vllm_engine.VLLMEngine`."""

    engine: str

    def identity(self, adapter: str) -> dict:
        """Weights, dtype and prompt order, as far as they decide what is written."""
        ...

    def each(
        self, records: list[dict], adapters: list[str], *, batch_size: int, numbers: list[int], **decoding
    ) -> Iterator[tuple[int, str]]:
        """(place of the record, its outline) as they are finished."""
        ...


@dataclass(frozen=True)
class Column:
    """One outline of each document. adapter, label: the adapter as the engine and as the user call it."""

    style: str
    axis: Axis
    adapter: str
    label: str


@dataclass(frozen=True)
class _Task:
    """An outline to write. number: among all outlines of the file, which draws follow."""

    number: int
    row: dict
    record: dict
    column: Column


class Bulk:
    """Outlines of all documents of a file.

    Args:
        documents: JSON Lines; an object per line with `article` (or `document`), `topic` or both, and, if it likes,
            `id` and `lang`.
        output: JSON Lines to write: line, id, style, adapter, outline.
        columns: the outlines of each document.
        decoding: settings.
        batch_size: outlines written at a time.
    """

    def __init__(
        self,
        documents: Path,
        output: Path,
        columns: list[Column],
        decoding: Decoding | None = None,
        batch_size: int = 8,
    ):
        self.documents, self.output, self.columns = documents, output, columns
        self.decoding, self.batch_size = decoding or Decoding(), batch_size
        self.rejected = output.with_name(output.name + ".rejected.jsonl")
        self._settings = output.with_name(output.name + ".settings.json")

    def run(self, engine: Engine, restart: bool = False, progress: bool = True) -> dict[str, int]:
        """Write what is missing. Returns how many outlines are `written` and `kept`, and how many rows `rejected`.

        restart: begin anew, whatever `output` holds. TKPOError where it holds outlines of other documents or settings.
        """
        digest, lines = self._digest()
        done = self._resume({"documents_sha256": digest, **self._made_by(engine)}, restart)
        counts = {"written": 0, "kept": len(done), "rejected": 0}
        tasks = self._tasks(done, counts)
        total = lines * len(self.columns)
        with (
            self.output.open("a", encoding="utf-8", newline="\n") as file,
            tqdm(total=total, initial=len(done), desc="outlines", disable=not progress) as bar,
        ):
            while chunk := list(itertools.islice(tasks, CHUNK * self.batch_size)):
                options = {"batch_size": self.batch_size, "numbers": [task.number for task in chunk]}
                adapters = [task.column.adapter for task in chunk]
                for place, outline in engine.each(
                    [task.record for task in chunk], adapters, **options, **asdict(self.decoding)
                ):
                    column = chunk[place].column
                    made = {"style": column.style, "adapter": column.label, "outline": outline}
                    file.write(json.dumps({**chunk[place].row, **made}, ensure_ascii=False) + "\n")
                    file.flush()
                    counts["written"] += 1
                    bar.update()
        return counts

    # ---- what is there already

    def _made_by(self, engine: Engine) -> dict:
        columns = [
            {"style": c.style, "axis": c.axis.name, "adapter": c.label, **engine.identity(c.adapter)}
            for c in self.columns
        ]
        return {"columns": columns, "engine": engine.engine, **self.decoding.record()}

    def _digest(self) -> tuple[str, int]:
        """(SHA-256 of the documents' file, how many lines of it are not blank)."""
        digest, lines = hashlib.sha256(), 0
        try:
            with self.documents.open("rb") as file:
                for line in file:
                    digest.update(line)
                    lines += bool(line.strip())
        except OSError as error:
            raise TKPOError(f"cannot read {self.documents}: {error.strerror or error}") from error
        if not lines:
            raise TKPOError(f"{self.documents} has no documents")
        return digest.hexdigest(), lines

    def _resume(self, made_by: dict, restart: bool) -> set[tuple[int, str, str]]:
        """(line, style, adapter) of the outlines that are written; half a last line is taken off."""
        made_by = json.loads(json.dumps(made_by))
        try:
            self.output.parent.mkdir(parents=True, exist_ok=True)
            if restart or not self.output.exists():
                self.output.write_bytes(b"")
                self._settings.write_text(json.dumps(made_by, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            earlier = json.loads(self._settings.read_text(encoding="utf-8")) if self._settings.exists() else {}
        except (OSError, ValueError) as error:
            raise TKPOError(f"cannot write {self.output}: {getattr(error, 'strerror', None) or error}") from error
        if differing := [key for key, value in made_by.items() if earlier.get(key) != value]:
            raise TKPOError(
                f"{self.output} exists and was made with other {', '.join(differing)}: give another --output, or "
                "--restart to write it anew"
            )
        done, whole = set(), 0
        with self.output.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                done.add((row["line"], row["style"], row["adapter"]))
                whole += len(line)
        os.truncate(self.output, whole)
        return done

    # ---- the documents

    def _tasks(self, done: set[tuple[int, str, str]], counts: dict[str, int]) -> Iterator[_Task]:
        """The outlines that are missing, a document's together; rows that cannot be used go to `rejected`."""
        self.rejected.unlink(missing_ok=True)
        with self.documents.open("rb") as file:
            for line, raw in enumerate(file, 1):
                if not raw.strip():
                    continue
                try:
                    row, records = self._read(line, raw)
                except (TKPOError, ValueError) as error:
                    counts["rejected"] += 1
                    with self.rejected.open("a", encoding="utf-8", newline="\n") as out:
                        found = raw.decode("utf-8", errors="replace").rstrip("\r\n")
                        out.write(
                            json.dumps({"line": line, "error": str(error), "row": found}, ensure_ascii=False) + "\n"
                        )
                    continue
                for number, (column, record) in enumerate(zip(self.columns, records, strict=True)):
                    if (line, column.style, column.label) not in done:
                        yield _Task((line - 1) * len(self.columns) + number, row, record, column)

    def _read(self, line: int, raw: bytes) -> tuple[dict, list[dict]]:
        """(what the output says of the document, one record per column)."""
        try:
            row = json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise TKPOError(f"not UTF-8 text (byte {error.start})") from error
        except ValueError as error:
            raise TKPOError(f"not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise TKPOError(f"expected an object, found {type(row).__name__}")
        article, topic, lang = row.get("article", row.get("document")), row.get("topic"), row.get("lang")
        for name, value in (("article", article), ("topic", topic)):
            if value is not None and not isinstance(value, str):
                raise TKPOError(f"field {name!r} is {type(value).__name__}, not text")
            if value and any("\ud800" <= character <= "\udfff" for character in value):
                raise TKPOError(f"field {name!r} has half a surrogate pair")
        article, topic = (article or "").strip(), (topic or "").strip()
        if not article and not topic:
            raise TKPOError("neither an article nor a topic")
        if lang is not None and lang not in LANGUAGES:
            raise TKPOError(f"field 'lang' is {lang!r}, not one of {', '.join(LANGUAGES)}")
        topic = topic or topic_of(article)
        records = [make_record(column.axis, column.style, topic, article or None, lang) for column in self.columns]
        return {"line": line, **({"id": row["id"]} if "id" in row else {})}, records


def topic_of(article: str) -> str:
    """What stands for the topic of an article without one: the beginning of its first line."""
    return article.strip().splitlines()[0][:80]
