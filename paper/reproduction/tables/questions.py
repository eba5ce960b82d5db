"""Table 7: the questions of experiments/questions.yaml and what the results answer."""

from __future__ import annotations

import pandas as pd

from paper.reproduction.experiments import Experiments
from paper.reproduction.intervals import Difference, difference, holm, verdict
from paper.reproduction.names import SCORES, row_name
from paper.reproduction.rendering import Block, Table


def answers(experiments: Experiments) -> pd.DataFrame:
    """A row per training, language and question that has outlines for both sides.

    Columns: training, language, question, ours, theirs, score, found (a `Difference`), p (Holm's, over all questions
    and languages of the training), verdict.
    """
    outlines, rows = experiments.outlines("table 7", content_free=True), []
    for training in experiments.stored_datasets("table 7"):
        for lang in experiments.languages:
            own = outlines[(outlines["training"] == training) & (outlines["language"] == lang)]
            for question in experiments.questions:
                pair = [own[(own["method"] == m) & (own["label"] == n)] for m, n in (question.ours, question.theirs)]
                found = difference(*pair, question.score) if all(map(len, pair)) else None
                if found:
                    row = {"training": training, "language": lang, "question": question.name, "score": question.score}
                    names = {"ours": row_name(*question.ours), "theirs": row_name(*question.theirs)}
                    rows.append(row | names | {"found": found})
    columns = ["training", "language", "question", "score", "ours", "theirs", "found", "p", "verdict"]
    frame = pd.DataFrame(rows, columns=columns).astype({"verdict": object})
    for _, own in frame.groupby("training"):
        adjusted = holm([found.p for found in own["found"]])
        frame.loc[own.index, "p"] = adjusted
        frame.loc[own.index, "verdict"] = [verdict(f, p) for f, p in zip(own["found"], adjusted, strict=True)]
    return frame


def table7(experiments: Experiments) -> Table:
    """The questions asked before the runs, and their answers."""
    answered = answers(experiments)
    rows = [
        {
            "data set": experiments.title(row.training),
            "language": experiments.languages[row.language],
            "comparison": f"{row.ours} − {row.theirs}",
            "score": SCORES[row.score],
            "difference": str(row.found),
            "gain, %": _gain(row.found),
            "p": f"{row.p:.3f}",
            "": row.verdict,
        }
        for row in answered.itertuples()
    ]
    asked = set(answered["question"])
    waiting = [question.name for question in experiments.questions if question.name not in asked]
    notes = [
        "Differences seed by seed on the same outlines, with 95 % intervals by bootstrap over articles and seeds "
        "(10,000 draws); gain: relative to the other method, for scores above 0. p: two-sided, adjusted by Holm over "
        "all rows of a data set; wins or loses where it is below 0.05.",
        "One primary score per question, fixed in `experiments/questions.yaml` before the runs on all styles. For the "
        "pilot the questions came after its runs.",
        "Published: TKPO over DPO, up to +19.28 % (which score is meant is not stated).",
    ]
    if waiting:
        notes.append(f"Waiting for runs: {', '.join(waiting)}.")
    columns = ["data set", "language", "comparison", "score", "difference", "gain, %", "p", ""]
    return Table(7, "Questions and answers", [Block(pd.DataFrame(rows, columns=columns), 4, group=2)], notes)


def _gain(found: Difference) -> str:
    return "–" if found.gain is None else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*found.gain)


def findings(experiments: Experiments) -> str:
    """The answers as a Markdown table, for the paper's page."""
    table = table7(experiments)
    return table.blocks[0].cells.to_markdown(index=False, disable_numparse=True) + "\n"
