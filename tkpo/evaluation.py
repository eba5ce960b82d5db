"""Predictions on a test file and their scores, as one JSON."""

from __future__ import annotations

import contextlib
import json
import logging
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from tkpo.attributes import Axis, get_axes
from tkpo.data import has_dataset, load_records, records_digest, sample_order, user_message
from tkpo.environment import environment
from tkpo.errors import TKPOError
from tkpo.generation import OutlineGenerator
from tkpo.sampling import Decoding
from tkpo.scores import score_outlines, summary

logger = logging.getLogger(__name__)


def test_records(
    dataset: str,
    axis: str | None = None,
    split: str = "test",
    lang: str | None = None,
    limit: int | None = None,
    data_dir: str | None = None,
    axes_file: str | None = None,
    style_data: str | None = None,
) -> tuple[list[dict], list[dict] | None]:
    """(records to predict, training records that the style classifiers are fitted on or None).

    Args:
        dataset: a name in dataset_info.json or a JSON file, or several with commas between them.
        axis: the axes' names, likewise; default the data sets' names.
        split: train, validation or test.
        lang: en, zh or None for both.
        limit: at most so many records per language, picked by hash: the same ones whatever the model.
        data_dir: folder with dataset_info.json.
        axes_file: table of one's own attributes and axes.
        style_data: file or data set whose training outlines the style classifiers are fitted on; default the axes'
            own data sets. Where these are missing there are no such records, which a warning says.

    Raises:
        TKPOError: for a file that cannot be read, or style data that lacks a style the records ask for.
    """
    names = [dataset] if Path(dataset).is_file() else [name.strip() for name in dataset.split(",")]
    axes = get_axes(axis or ",".join(Path(name).stem for name in names), axes_file)
    records = load_records(dataset, split, lang, folder=data_dir, axes=axes)
    if limit:
        languages = sorted({r["lang"] for r in records})
        groups = [sorted((r for r in records if r["lang"] == tongue), key=sample_order) for tongue in languages]
        records = [r for group in groups for r in group[:limit]]
    return records, _style_records(records, axes, style_data, lang, data_dir)


def _style_records(
    records: list[dict], axes: dict[str, Axis], style_data: str | None, lang: str | None, data_dir: str | None
) -> list[dict] | None:
    """Training records of every style that `records` ask for, or None where there is no data for their axes."""
    used = sorted({record["axis"] for record in records})
    if style_data:
        train = load_records(style_data, "train", lang, folder=data_dir, axes=axes)
    elif missing := [name for name in used if not has_dataset(name, "train", data_dir)]:
        logger.warning(
            "no training outlines for the style classifier of axis %s: the scores come without control; "
            "--style-data FILE gives them",
            ", ".join(missing),
        )
        return None
    else:
        train = [r for name in used for r in load_records(name, "train", lang, folder=data_dir, axes=axes[name])]
    known = {(r["lang"], r["axis"], r["attribute"]) for r in train}
    for number, record in enumerate(records, 1):
        if (record["lang"], record["axis"], record["attribute"]) not in known:
            raise TKPOError(
                f"record {number} asks for {record['attribute']!r} (axis {record['axis']}, language {record['lang']}), "
                f"of which {style_data or 'the training split'} has no outline for the style classifier"
            )
    return train


test_records.__test__ = False  # a name pytest would collect


def predict(
    generator: OutlineGenerator,
    records: list[dict],
    adapter: str,
    *,
    batch_size: int = 8,
    part: Path | None = None,
    progress: bool = True,
    decoding: Decoding | None = None,
) -> list[str]:
    """Outlines of one adapter for all records, in their order; default greedy with the loop guard.

    Args:
        generator: the model with its adapters.
        records: annotated records. Each has a prediction of its own, whatever their ids.
        adapter: its name in `generator`, or "base".
        batch_size: outlines written at a time.
        part: a JSON Lines file that keeps what is done, so that an interrupted prediction is resumed. What other
            records, weights or settings left there is dropped.
        progress: show a bar.
        decoding: settings.
    """
    decoding = decoding or Decoding()
    done: dict[int, str] = {}
    if part:
        made_by = {"records_sha256": records_digest(records), **generator.identity(adapter), **decoding.record()}
        rows = _read_part(part)
        kept = rows[1:] if rows and rows[0] == made_by else []
        done = {row["position"]: row["prediction"] for row in kept}
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in (made_by, *kept))  # without half a last line
        part.write_text("".join(lines), encoding="utf-8")
    missing = [position for position in range(len(records)) if position not in done]
    missing.sort(key=lambda i: len(user_message(records[i])))  # rows that are written together of like length
    options = {"batch_size": batch_size, "numbers": missing, **asdict(decoding)}
    outlines = generator.each([records[i] for i in missing], adapter, **options)
    with (
        tqdm(total=len(records), initial=len(done), desc=f"outlines by {adapter}", disable=not progress) as bar,
        part.open("a", encoding="utf-8") if part else contextlib.nullcontext() as file,
    ):
        for number, text in outlines:
            done[missing[number]] = text
            if file:
                file.write(json.dumps({"position": missing[number], "prediction": text}, ensure_ascii=False) + "\n")
                file.flush()
            bar.update()
    return [done[position] for position in range(len(records))]


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
    style_data: str | None = None,
    batch_size: int = 8,
    adapter_source: str | None = None,
    **decoding,
) -> dict:
    """Predict, score, write `output`: settings, environment, predictions beside their references, scores.

    Args:
        generator, adapter: what predicts.
        output: JSON file to write.
        dataset, axis, split, lang, limit, data_dir, axes_file, style_data: as `test_records` takes them.
        batch_size: outlines written at a time.
        adapter_source: what the record of the settings calls the adapter; default its name.
        decoding: `tkpo.sampling.Decoding`'s settings.

    Returns what is written. TKPOError if `output` cannot be written, or a data set cannot be read.
    """
    settings = Decoding(**decoding)
    output = Path(output)
    part = output.with_name(output.name + ".part.jsonl")
    _check_writable(output, part)
    records, train = test_records(dataset, axis, split, lang, limit, data_dir, axes_file, style_data)
    predictions = predict(generator, records, adapter, batch_size=batch_size, part=part, decoding=settings)
    rows = score_outlines(records, predictions, train)
    result = {
        "settings": {
            **generator.identity(adapter),
            "adapter": adapter_source or adapter,
            "dataset": dataset,
            "split": split,
            "lang": lang,
            "limit": limit,
            "style_data": style_data,
            "records_sha256": records_digest(records),
            **settings.record(),
        },
        "environment": environment(),
        "scores": summary(rows),
        "samples": [
            {**row, "reference": record["output"], "prediction": prediction}
            for row, record, prediction in zip(rows, records, predictions, strict=True)
        ],
    }
    output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.unlink()
    return result


def _check_writable(output: Path, part: Path) -> None:
    if output.is_dir():
        raise TKPOError(f"cannot write {output}: it is a folder; give a file, e.g. {output / 'scores.json'}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with part.open("a"):
            pass
    except OSError as error:
        raise TKPOError(f"cannot write {output}: {error.strerror or error}") from error
