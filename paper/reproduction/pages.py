"""The results that the Markdown pages quote, written between marks: <!-- name --> … <!-- /name -->."""

from __future__ import annotations

import json
import re
from pathlib import Path

from paper.reproduction.experiments import Experiments
from paper.reproduction.grid import Run
from paper.reproduction.intervals import interval_texts
from paper.reproduction.names import LANGUAGES, METHODS, SCORES
from paper.reproduction.scores import OUTLINE
from paper.reproduction.tables import findings

ROOT = Path(__file__).parents[2]
COMPARED = ("base", "sft", "dpo", "tkpo")
# TKPO's step over another's: column → (ratio in a benchmark's JSON, aim).
AIMS = {
    "DPO (TRL)": ("ratios", "tkpo/dpo", 0.50),
    "DPO, reference precomputed": ("ratios", "tkpo/dpo_precomputed", 0.70),
    "SFT (TRL)": ("ratios", "tkpo/trl_sft", 1.33),
    "SFT (LLaMA-Factory)": ("ratios", "tkpo/llamafactory_sft", None),
    "SFT (ours)": ("ratios", "tkpo/sft", None),
    "passes share nothing": ("ratios", "tkpo/tkpo_unshared", None),
    "plain TKPO": ("ratios", "tkpo/tkpo_plain", 0.60),
    "memory: DPO (TRL)": ("memory_ratios", "tkpo/dpo", 0.60),
    "memory: plain TKPO": ("memory_ratios", "tkpo/tkpo_plain", None),
}
# The same where a step is an article in its four styles; an aim for short articles and one for long ones.
ARTICLE_AIMS = {
    "TKPO, a row per style": ("ratios", "tkpo/tkpo_rows", 0.45, 0.33),
    "SFT, read once too": ("ratios", "tkpo/sft", 1.35, 1.20),
    "DPO (TRL)": ("ratios", "tkpo/dpo", 0.22, 0.15),
    "prompt contrast over DPO (TRL)": ("ratios", "contrast/dpo", 0.35, 0.35),
    "plain TKPO over DPO (TRL)": ("ratios", "tkpo_plain/dpo", None, None),
    "memory: TKPO, a row per style": ("memory_ratios", "tkpo/tkpo_rows", 1.0, 1.0),
}
HEAD_AIMS = {"time": 0.50, "memory": 0.25}
OWN_TOPICS = (0, 6, 10)  # of results/own_topics.json, those whose outlines by TKPO are shown


def write(experiments: Experiments, root: Path = ROOT) -> None:
    """Update the pages of `root` that quote results; a section whose runs are missing is left as it is."""
    fill(root / "README.md", {"scores": scores(experiments), "topics": topics(experiments)})
    fill(root / "docs" / "results.md", {"outlines": outlines(experiments)})
    fill(root / "paper" / "README.md", {"findings": findings(experiments)})
    measured = experiments.store.folder.parent / "benchmark"
    sections = {"steps": steps(measured), "articles": articles(measured), "head": head(measured)}
    fill(root / "paper" / "speed.md", sections)


def fill(path: Path, sections: dict[str, str | None]) -> None:
    """Replace what stands between the marks of each section; None leaves it as it is."""
    text = fresh = path.read_text(encoding="utf-8")
    for name, section in sections.items():
        if section is not None:
            pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
            fresh = re.sub(pattern, lambda marks, new=section: marks[1] + new + marks[2], fresh, flags=re.DOTALL)
    if fresh != text:
        path.write_text(fresh, encoding="utf-8", newline="\n")


def _first_runs(experiments: Experiments, dataset: str) -> dict[str, Run]:
    """Method → its stored run of the first seed with the preset's settings, of those that are compared."""
    runs = {method: Run(dataset, method, 0) for method in COMPARED}
    return {method: run for method, run in runs.items() if experiments.store.get(run)}


def scores(experiments: Experiments) -> str | None:
    """Every method's scores by its first seed, those of the shipped adapters: one table per data set."""
    lines, every = [], experiments.outlines("table 2")
    for dataset in experiments.stored_datasets("table 2"):
        runs = _first_runs(experiments, dataset)
        if len(runs) < len(COMPARED):
            return None
        first = every[every["run"].isin(list(runs.values()))].drop_duplicates(["run", *OUTLINE])
        cells = interval_texts(first, ["language", "method"], list(SCORES))
        counts = first.groupby(["language", "method"]).size()
        count = experiments.store.get(runs["sft"])["training"]["samples"]
        lines += [
            f"**{experiments.title(dataset).capitalize()}** ({count} training samples, both languages together)",
            "",
        ]
        lines += ["| | | n | " + " | ".join(SCORES.values()) + " |"]
        lines += ["| --- | --- |" + " ---: |" * (len(SCORES) + 1)]
        for lang, language in LANGUAGES.items():
            for method in runs:
                row = [language, METHODS[method], str(counts[lang, method]), *cells.loc[(lang, method)]]
                lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def outlines(experiments: Experiments) -> str | None:
    """What SFT, DPO and TKPO wrote for the first article of the test split in each language."""
    runs = {method: experiments.store.get(run) for method, run in _first_runs(experiments, "language_style").items()}
    runs.pop("base", None)
    if len(runs) < len(COMPARED) - 1:
        return None
    lines = []
    for lang in LANGUAGES:
        rows = runs["sft"]["predictions"]
        index = next(i for i, row in enumerate(rows) if (row["lang"], row["form"]) == (lang, "article"))
        lines += [f"Asked for: *{rows[index]['attribute']}*, article `{rows[index]['id']}` given.", ""]
        for method, record in runs.items():
            lines += [f"{METHODS[method]}:", "", "```", record["predictions"][index]["prediction"], "```", ""]
        lines += ["Reference:", "", "```", rows[index]["reference"], "```", ""]
    return "\n".join(lines)


def topics(experiments: Experiments) -> str | None:
    """How many of the topics that are not in the corpus came out in style, and some outlines."""
    path = experiments.store.folder.parent / "own_topics.json"
    if not path.exists():
        return None
    rows = _read(path)["topics"]
    counts = []
    for method in COMPARED[1:]:
        judged = [(row["outlines"][method], row["style"]) for row in rows]
        counts.append(f"{METHODS[method]} {sum(o['valid'] and o['read_as'] == style for o, style in judged)}")
    lines = [
        f"Of {len(rows)} outlines each, so many parse and read as the asked style: {', '.join(counts)}. By TKPO:",
        "",
    ]
    for index in OWN_TOPICS:
        row = rows[index]
        lines += [f"*{row['style']}*, “{row['topic']}”:", "", "```", row["outlines"]["tkpo"]["outline"], "```", ""]
    return "\n".join(lines)


def steps(folder: Path) -> str:
    """The ratios of every stored benchmark of training steps beneath their aims; an aim that is reached is bold."""
    lines = ["| TKPO's step over that of | " + " | ".join(AIMS) + " |", "| --- |" + " ---: |" * len(AIMS)]
    lines.append("| *aim* | " + " | ".join(f"≤ {aim:.2f}" if aim else "" for *_, aim in AIMS.values()) + " |")
    for bench in (_read(path) for path in sorted(folder.glob("*.json"))):
        if "finetuning" in bench and not bench.get("articles"):
            what = f"`{bench['model']}`, {bench['finetuning']}, {bench['dtype']}, batch {bench['batch_size']}"
            what += ", attribute last" if bench["attribute_last"] else ""
            cells = [_reached(bench[kind].get(key), aim) for kind, key, aim in AIMS.values()]
            where = bench["machine"].get("gpu") or bench["machine"]["processor"]
            lines.append("| " + " | ".join([f"{what} ({where})", *cells]) + " |")
    return "\n".join(lines) + "\n"


def articles(folder: Path) -> str:
    """The same of benchmarks whose steps are articles, each row with its aims."""
    lines = ["| TKPO's step over that of | " + " | ".join(ARTICLE_AIMS) + " |"]
    lines.append("| --- |" + " ---: |" * len(ARTICLE_AIMS))
    for place, length in enumerate(("short", "long")):
        aims = [spec[2 + place] for spec in ARTICLE_AIMS.values()]
        lines.append(f"| *aim, {length}* | " + " | ".join(f"≤ {aim:.2f}" if aim else "" for aim in aims) + " |")
        for bench in (_read(path) for path in sorted(folder.glob("*.json"))):
            if bench.get("articles") == length and "ratios" in bench:
                specs = zip(ARTICLE_AIMS.values(), aims, strict=True)
                cells = [_reached(bench[spec[0]].get(spec[1]), aim) for spec, aim in specs]
                where = bench["machine"].get("gpu") or bench["machine"]["processor"]
                what = f"`{bench['model']}`, {bench['finetuning']}, {bench['dtype']}, {length} articles ({where})"
                lines.append("| " + " | ".join([what, *cells]) + " |")
    return "\n".join(lines) + "\n"


def head(folder: Path) -> str | None:
    """The loss head's time and memory against the plain form."""
    path = folder / "loss-head.json"
    if not path.exists():
        return None
    bench = _read(path)
    lines = ["| fused / plain | aim | head frozen | head trained |", "| --- | ---: | ---: | ---: |"]
    for name, aim in HEAD_AIMS.items():
        cells = [_reached(bench["ratios"][weight][name], aim) for weight in ("frozen", "trained")]
        lines.append("| " + " | ".join([name, f"≤ {aim:.2f}", *cells]) + " |")
    return "\n".join(lines) + "\n"


def _reached(value: float | None, aim: float | None) -> str:
    if value is None:
        return "–"
    text = f"{value:.2f}"
    return f"**{text}**" if aim and float(text) <= aim else text


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
