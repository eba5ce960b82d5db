"""Tables 2, 5 and 6: the scores of the test outlines, with 95 % intervals over articles and seeds."""

from __future__ import annotations

import pandas as pd

from paper.reproduction.experiments import Experiments
from paper.reproduction.grid import run_config
from paper.reproduction.intervals import interval_texts
from paper.reproduction.names import (
    CONTENT_FREE,
    METHODS,
    MISSING,
    PUBLISHED_BARS,
    SCORES,
    STRUCTURE,
    dataset_title,
    row_name,
)
from paper.reproduction.rendering import Block, Table

INTERVALS = (
    "Mean ± half of its 95 % interval, by bootstrap over articles (all outlines of an article together) and seeds; "
    "n: outlines per seed."
)
CONTENT = (
    "*Numbers only*, *random outline of the style* and *one constant outline* say nothing about the article: what "
    "they reach, a score gives for nothing."
)
PILOT = (
    "*Pilot*: minutes of training on a part of an earlier, smaller corpus, each data set by itself; a subset of the "
    "test split."
)


def table2(experiments: Experiments) -> Table:
    """Main comparison."""
    rows = _rows(experiments, "table 2", SCORES)
    for method in ("dpo", "tkpo"):
        published = {SCORES[s]: f"{PUBLISHED_BARS[method][s]:.1f}" for s in SCORES if s in PUBLISHED_BARS[method]}
        rows.append({"data set": "published", "language": "", "method": f"{METHODS[method]}, Qwen2.5-3B", **published})
    notes = [
        f"{INTERVALS} ROUGE F1 and BLEU-4 × 100 of the headings, with numbers and indentation taken off. Control: per "
        "cent that a classifier fitted on the training references takes for the asked style (row *references*: of the "
        "test references); log-odds: its log p/(1 − p) of that style, cut at ±10; a loop or an empty outline is in "
        "no style. Level: per cent with the headings and sub-headings that the style asks for; valid: that parse.",
        CONTENT,
        PILOT,
        "*samples as DPO*: one pass and a half, which is what DPO has seen with the SFT run that it continues. "
        f"*tuned*: settings chosen on validation outlines among four tries for each method ({_choices(experiments)}).",
        "Published: bars of the framework figure (± 0.3; data set and language not stated; numbering counted), "
        "Qwen2.5-3B-Instruct with full fine-tuning: not comparable in height.",
        *experiments.notes("table 2"),
    ]
    block = Block(pd.DataFrame(rows).fillna("").astype(str), 3, group=2)
    return Table(2, "Main comparison", [block], notes)


def table6(experiments: Experiments) -> Table:
    """Structure, repetition and invention, and the text scores of the published protocol."""
    rows = _rows(experiments, "table 6", STRUCTURE)
    notes = [
        f"{INTERVALS} Loops: per cent of outlines in which at least half of the headings share 60 % of their words "
        "with an earlier one. Distinct-2: per cent of different word pairs. New numbers: per cent of outlines with a "
        "number that the input lacks. Count error: headings more or fewer than the reference. Sub-headings: per cent "
        "of the *comprehensive* outlines with sub-headings under every heading. num.: numbers and indentation "
        "counted, as the published protocol does.",
        CONTENT,
        PILOT,
        *experiments.notes("table 6"),
    ]
    block = Block(pd.DataFrame(rows).fillna("").astype(str), 3, group=2)
    return Table(6, "Structure, and scores with numbering", [block], notes)


def _rows(experiments: Experiments, what: str, scores: dict[str, str]) -> list[dict]:
    """A row per training, language and method, content-free ones first; then what the classifier gives references."""
    outlines, planned = experiments.outlines(what, content_free=True), experiments.planned(what)
    rows = []
    for training in experiments.stored_datasets(what):
        for lang, language in experiments.languages.items():
            where = {"data set": experiments.title(training), "language": language}
            own = outlines[(outlines["training"] == training) & (outlines["language"] == lang)]
            keys = [(method, "") for method in CONTENT_FREE] if len(own) else []
            keys += [key[1:] for key in experiments.rows(what) if key[0] == training]
            cells = interval_texts(own, ["method", "label"], list(scores)) if len(own) else None
            for method, label in keys:
                here = own[(own["method"] == method) & (own["label"] == label)]
                seeds, n = _counts(
                    here, planned[(planned[["training", "method", "label"]] == [training, method, label]).all(axis=1)]
                )
                row = where | {"method": row_name(method, label), "seeds": seeds, "n": n}
                texts = cells.loc[(method, label)] if len(here) else dict.fromkeys(scores, MISSING)
                rows.append(row | {name: texts[score] for score, name in scores.items()})
            if len(own) and "control" in scores:
                accuracy = own.drop_duplicates(["dataset", "article", "style", "form"])["reference_control"].mean()
                rows.append(where | {"method": "references", scores["control"]: f"{accuracy:.1f}"})
    return rows


def _counts(here: pd.DataFrame, planned: pd.DataFrame) -> tuple[str, str]:
    """(seeds, outlines per seed) of a row."""
    seeds = here["seed"].nunique()
    wanted = len(planned) or seeds or 1
    sizes = here.groupby(["method", "label", "seed"]).size() if len(here) else []
    counts = sorted(set(sizes))
    return f"{seeds}" if seeds == wanted else f"{seeds} of {wanted}", "/".join(map(str, counts))


def _choices(experiments: Experiments) -> str:
    chosen = []
    for grid in experiments.grids.values():
        if grid.tuned_by:
            tried = experiments.grids[grid.tuned_by["grid"]].variants
            for run in experiments.tuned(grid) or []:
                config = run_config(run, experiments.store.preset)
                keys = dict.fromkeys(key for variant in tried[run.method] for key in variant)
                settings = ", ".join(f"{key} {getattr(config, key):g}" for key in keys)
                chosen.append(f"{METHODS[run.method]} on {dataset_title(run.dataset)}: {settings}")
    return "; ".join(dict.fromkeys(chosen)) or "not yet run"


def table5(experiments: Experiments) -> Table:
    """Parts of the test split: article given or topic only, and each style."""
    scores = {"rouge1": "R-1", "level": "level", "loop": "loops"}
    outlines = experiments.outlines("table 5")
    outlines, rows = outlines[outlines["label"] == ""], []
    methods = [method for method in METHODS if method in {key[1] for key in experiments.rows("table 5")}]
    for training in experiments.stored_datasets("table 5"):
        for lang, language in experiments.languages.items():
            own = outlines[(outlines["training"] == training) & (outlines["language"] == lang)]
            parts = [("form", "article", "article given"), ("form", "topic", "topic only")]
            parts += [("style", style, style) for style in sorted(own["style"].unique())]
            for key, value, name in parts:
                here = own[own[key] == value]
                cells = interval_texts(here, ["method"], list(scores)).to_dict() if len(here) else {}
                for score, title in scores.items():
                    row = {"data set": experiments.title(training), "language": language}
                    row |= {"outlines": name, "score": title, "n": _counts(here, here.iloc[:0])[1]}
                    texts = cells.get(score, {})
                    rows.append(row | {METHODS[method]: texts.get(method, MISSING) for method in methods})
    notes = [
        f"{INTERVALS} R-1: ROUGE-1 without numbering; level: per cent with the headings that the style asks for; "
        "loops: per cent of outlines.",
        PILOT,
        *experiments.notes("table 5"),
    ]
    block = Block(pd.DataFrame(rows).fillna("").astype(str), 4, group=2)
    return Table(5, "Article given or topic only, and each style", [block], notes)
