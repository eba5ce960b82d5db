"""Table 1: the data sets."""

from __future__ import annotations

from functools import cache

import pandas as pd

from paper.reproduction.experiments import Experiments
from paper.reproduction.names import LANGUAGES, dataset_title
from paper.reproduction.rendering import Block, Table
from tkpo.data import load_records
from tkpo.outline import length, parse


@cache
def samples(dataset: str) -> pd.DataFrame:
    """A row per sample of a data set, with the lengths and counts of its article and outline."""
    rows = []
    for lang in LANGUAGES:
        for split in ("train", "validation", "test"):
            for record in load_records(dataset, split, lang):
                outline = parse(record["output"])
                headings = (h for pair in zip(outline.headings, outline.sub_headings, strict=True) for h in pair)
                text = " ".join(h if isinstance(h, str) else " ".join(h) for h in headings)
                rows.append(
                    {
                        "language": LANGUAGES[lang],
                        "split": split,
                        "attribute": record["attribute"],
                        "topic only": record["form"] == "topic",
                        "article": length(record["input"], lang) if record["form"] == "article" else None,
                        "outline": length(text, lang),
                        "headings": outline.n_headings,
                        "sub-headings": outline.n_sub_headings,
                        "depth": outline.depth,
                    }
                )
    return pd.DataFrame(rows)


def table1(experiments: Experiments) -> Table:
    """Data statistics."""
    parts = []
    for dataset in [dataset for dataset in experiments.datasets if "," not in dataset]:
        groups = samples(dataset).groupby(["language", "split", "attribute"], sort=False)
        part = groups.agg({"topic only": "sum", "article": "mean", "outline": "mean"})
        part.insert(0, "samples", groups.size())
        part = part.join(groups[["headings", "sub-headings", "depth"]].mean()).reset_index()
        parts.append(part.assign(**{"data set": dataset_title(dataset)}))
    cells = pd.concat(parts, ignore_index=True)
    cells.insert(0, "data set", cells.pop("data set"))
    for name, digits in (("article", 0), ("outline", 1), ("headings", 1), ("sub-headings", 1), ("depth", 1)):
        cells[name] = cells[name].map(f"{{:.{digits}f}}".format)
    notes = [
        "Article (of the samples that have one, with its topic line) and outline lengths are means in words (English) "
        "or characters (Chinese); outlines without their numbers.",
        "A sample is an article (or its topic alone) with one attribute; a third of the training and validation "
        "samples have the topic alone, and every test article is there in both forms.",
    ]
    return Table(1, "Data statistics", [Block(cells.astype(str), 4, group=2)], notes)
