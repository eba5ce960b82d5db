"""Predictions on a test file and their scores, as one JSON."""

from __future__ import annotations

import json
from pathlib import Path

from tqdm import tqdm

from tkpo.attributes import get_axis
from tkpo.data import annotate, load_records, record_key, sample_order
from tkpo.environment import environment
from tkpo.errors import TKPOError
from tkpo.generation import OutlineGenerator
from tkpo.metrics import evaluate_predictions
from tkpo.sampling import MAX_NEW_TOKENS


def test_records(
    dataset: str,
    axis: str | None = None,
    split: str = "test",
    lang: str | None = None,
    limit: int | None = None,
    data_dir: str | None = None,
    axes_file: str | None = None,
) -> tuple[list[dict], list[dict]]:
    """(records to predict, training records that the style classifier is fitted on).

    limit: so many records a language, chosen by hash: the same ones whatever the model.
    """
    table = get_axis(axis or Path(dataset).stem, axes_file)
    records = annotate(load_records(dataset, split, lang, folder=data_dir), table)
    if limit:
        languages = sorted({r["lang"] for r in records})
        groups = [sorted((r for r in records if r["lang"] == tongue), key=sample_order) for tongue in languages]
        records = [r for group in groups for r in group[:limit]]
    train = annotate(load_records(table.name, "train", lang, folder=data_dir), table)
    return records, train


test_records.__test__ = False  # a name pytest would collect


def predict(
    generator: OutlineGenerator,
    records: list[dict],
    adapter: str,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    part: Path | None = None,
    progress: bool = True,
    adapter_source: str | None = None,
) -> list[str]:
    """Greedy outlines of one adapter for all records, in their order.

    part: a JSON Lines file that keeps what is done, so that an interrupted prediction goes on where it was; what
    another model or adapter left there is dropped. adapter_source: tells adapters of the same name apart there.
    """
    done: dict[str, str] = {}
    if part:
        made_by = {
            "model": generator.model_name,
            "adapter": adapter_source or adapter,
            "max_new_tokens": max_new_tokens,
        }
        rows = _read_part(part)
        if rows and rows[0] == made_by:
            done = {row["key"]: row["prediction"] for row in rows[1:]}
        else:
            part.write_text(json.dumps(made_by) + "\n", encoding="utf-8")
    missing = [r for r in records if record_key(r) not in done]
    missing.sort(key=lambda r: len(r["input"]))  # rows of one batch of like length
    with tqdm(total=len(records), initial=len(done), desc=f"outlines by {adapter}", disable=not progress) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            texts = generator.generate(batch, adapter, max_new_tokens=max_new_tokens)
            rows = [(record_key(record), text) for record, text in zip(batch, texts, strict=True)]
            done.update(rows)
            if part:
                with part.open("a", encoding="utf-8") as file:
                    for key, text in rows:
                        file.write(json.dumps({"key": key, "prediction": text}, ensure_ascii=False) + "\n")
            bar.update(len(batch))
    return [done[record_key(r)] for r in records]


def _read_part(part: Path) -> list[dict]:
    """Its rows; a last line that was not written to its end is left out."""
    rows = []
    for line in part.read_text(encoding="utf-8").splitlines() if part.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def evaluate(
    generator: OutlineGenerator,
    adapter: str,
    output: str | Path,
    dataset: str,
    *,
    axis: str | None = None,
    split: str = "test",
    lang: str | None = None,
    limit: int | None = None,
    data_dir: str | None = None,
    axes_file: str | None = None,
    batch_size: int = 8,
    max_new_tokens: int = MAX_NEW_TOKENS,
    adapter_source: str | None = None,
) -> dict:
    """Predict, score, write `output`: settings, environment, predictions beside their references, scores.

    adapter_source: what the record of the settings calls the adapter; default its name.
    Returns what is written. TKPOError if `output` cannot be written, or a data set cannot be read.
    """
    records, train = test_records(dataset, axis, split, lang, limit, data_dir, axes_file)
    output = Path(output)
    settings = {
        "model": generator.model_name,
        "adapter": adapter_source or adapter,
        "dataset": dataset,
        "split": split,
        "lang": lang,
        "limit": limit,
        "max_new_tokens": max_new_tokens,
        "decoding": "greedy",
    }
    part = output.with_name(output.name + ".part.jsonl")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a"):
            pass
    except OSError as error:
        raise TKPOError(f"cannot write {output}: {error.strerror or error}") from error
    predictions = predict(generator, records, adapter, batch_size, max_new_tokens, part, adapter_source=adapter_source)
    scores = evaluate_predictions(records, predictions, train)
    samples = scores.pop("samples")
    result = {
        "settings": settings,
        "environment": environment(),
        "scores": scores,
        "samples": [
            {**sample, "reference": record["output"], "prediction": prediction}
            for sample, record, prediction in zip(samples, records, predictions, strict=True)
        ],
    }
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.unlink()
    return result
