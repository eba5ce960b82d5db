"""Outlines and token preferences that were computed beforehand, for the first screen and the example buttons.

`python app/make_examples.py` writes them from the shipped adapters. They are shown only beside the adapters they were
written by, which the file names by their hashes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from app.jobs import Column, Update
from app.queries import Query
from app.verdicts import Verdict
from tkpo.attributes import Axis

logger = logging.getLogger(__name__)

FILE = Path(__file__).parent / "examples" / "examples.json"


@dataclass(frozen=True)
class Example:
    """A query and its outlines, one per method. preferences: of the outline of `inspected`, if computed."""

    topic: str
    article: str
    style: str
    lang: str
    tokens: int
    columns: list[Column]
    inspected: str | None = None
    preferences: dict | None = None

    def update(self, axes: dict[str, Axis], methods: list[str] | None = None) -> Update:
        """As the page shows it; methods: whose columns, default all."""
        query = Query(self.topic, self.article, self.style, axes, self.lang, 0.0, 0, self.tokens)
        columns = [c for c in self.columns if methods is None or c.method in methods]
        return Update("done", columns=columns, query=query, stored=True)

    @property
    def outline(self) -> str:
        """What `preferences` are of."""
        return next((c.text for c in self.columns if c.method == self.inspected), "")


class Examples:
    """Stored examples, the first of each language being the one that the page opens with."""

    def __init__(self, examples: list[Example]):
        self.all = examples

    def first(self, lang: str) -> Example | None:
        """The example to open a page in `lang` with."""
        own = [e for e in self.all if e.lang == lang]
        return next((e for e in own if e.preferences), (own or self.all or [None])[0])

    @classmethod
    def load(cls, file: Path, model: str, adapters: dict[str, str | Path], axes: dict[str, Axis]) -> Examples:
        """The examples in `file` if this model and these adapters wrote them; else none, and the log says why."""
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            made_with, here = stored["made_with"], fingerprint(model, adapters)
            examples = [_example(entry) for entry in stored["examples"]]
        except FileNotFoundError:
            return cls([])
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s): run python app/make_examples.py", file, error)
            return cls([])
        if made_with != here:
            logger.info("the examples in %s were written by other adapters and are not shown", file)
            return cls([])
        return cls([example for example in examples if example.style in axes])

    def save(self, file: Path, model: str, adapters: dict[str, str | Path]) -> None:
        stored = {"made_with": fingerprint(model, adapters), "examples": [asdict(example) for example in self.all]}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_rounded(stored), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def fingerprint(model: str, adapters: dict[str, str | Path]) -> dict:
    """Model and adapters, name → SHA-256 of its weights."""
    hashes = {}
    for name, folder in sorted(adapters.items()):
        weights = Path(folder) / "adapter_model.safetensors"
        hashes[name] = hashlib.sha256(weights.read_bytes()).hexdigest()
    return {"model": str(model), "adapters": hashes}


def _example(entry: dict) -> Example:
    columns = [
        Column(**{**column, "verdict": Verdict(**column["verdict"]) if column["verdict"] else None})
        for column in entry["columns"]
    ]
    return Example(**{**entry, "columns": columns})


def _rounded(value):
    """Floats of a nested value to four significant digits: more would only make the file longer."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value
