"""Table 4: what each part of TKPO does."""

from __future__ import annotations

import pandas as pd

from paper.reproduction.costs import machine_name
from paper.reproduction.experiments import Experiments
from paper.reproduction.intervals import interval_texts
from paper.reproduction.names import MISSING, SCORES, SYMBOLS
from paper.reproduction.rendering import Block, Table


def table4(experiments: Experiments) -> Table:
    """Ablations."""
    scores = ["rouge1", "rougeL", "log_odds", "level"]
    outlines, planned = experiments.outlines("table 4"), experiments.planned("table 4")
    cells = interval_texts(outlines, ["training", "variant", "language"], scores)
    blocks = []
    for training in planned["training"].unique():
        rows = []
        for variant, runs in planned[planned["training"] == training].groupby("variant", sort=False):
            row = {
                "variant": ablation_name(dict(runs["run"].iloc[0].settings)),
                "seeds": f"{runs['stored'].sum()} of {len(runs)}",
            }
            for lang in experiments.languages:
                found = (training, variant, lang) in cells.index
                for score in scores:
                    row[f"{lang} {SCORES[score]}"] = cells.loc[(training, variant, lang), score] if found else MISSING
            rows.append(row)
        blocks.append(Block(pd.DataFrame(rows), 1, experiments.title(training).capitalize()))
    notes = [
        "Each differs from the first row in the one thing named; trained on a quarter of the main comparison's samples"
        f"{_machines(experiments, planned)}. *no flip*: rejects from the model's own prediction under the true prompt. "
        "*no preference term* is SFT.",
        *experiments.notes("table 4"),
    ]
    return Table(4, "Ablations of TKPO", blocks, notes)


def _machines(experiments: Experiments, planned: pd.DataFrame) -> str:
    """Where the runs were made, as the end of a sentence; nothing if all on one machine."""
    records = [experiments.store.get(run) for run in planned["run"]]
    names = sorted({machine_name(record["environment"]) for record in records if record})
    return f", on {' or '.join(names)} (other draws and rounding)" if len(names) > 1 else ""


def ablation_name(settings: dict) -> str:
    if not settings:
        return "TKPO (λ 0.5, τ 0.15, K 20, multinomial, log mean)"
    if settings == {"preference_weight": 0}:
        return "no preference term (λ 0)"
    if settings == {"sampler": "no_flip"}:
        return "no flip"
    names = [f"{SYMBOLS[k]} {v:g}" if k in SYMBOLS else f"{k} {str(v).replace('_', ' ')}" for k, v in settings.items()]
    return ", ".join(names)
