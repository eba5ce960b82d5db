"""Tables 1 to 5, from the data sets and the stored results."""

from __future__ import annotations

from functools import cache

import pandas as pd

from paper.reproduction.costs import COUNTED, benchmarks, machine_name, pipeline_seconds, stage_seconds, timed
from paper.reproduction.experiments import ROW, Experiments
from paper.reproduction.grid import run_config
from paper.reproduction.intervals import gain, gain_text, spread, verdict
from paper.reproduction.names import (
    LANGUAGES,
    METHODS,
    MISSING,
    PUBLISHED_BARS,
    PUBLISHED_TIME,
    SCORES,
    SYMBOLS,
    dataset_title,
    row_name,
)
from paper.reproduction.rendering import Block, Table
from tkpo.data import load_records
from tkpo.outline import length, parse

VERDICTS = (("tkpo", "dpo"), ("tkpo", "sft"))
# (method, label) against (method, label), of the gains of table 2.
COMPARED = (
    (("tkpo", ""), ("dpo", "")),
    (("tkpo", "samples as DPO"), ("dpo", "")),
    (("tkpo", "tuned"), ("dpo", "tuned")),
    (("tkpo", ""), ("sft", "")),
)


def _filled(rows: list[dict]) -> pd.DataFrame:
    return pd.DataFrame(rows).fillna("").astype(str)


# ---- table 1: data -------------------------------------------------------------------------------------


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
    for dataset in experiments.datasets:
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
    return Table(1, "Data statistics", [Block(cells.astype(str), 4)], notes)


# ---- table 2: main comparison --------------------------------------------------------------------------


def table2(experiments: Experiments) -> Table:
    """Main comparison, with TKPO's gains."""
    outlines, planned = experiments.outlines("table 2"), experiments.planned("table 2")
    rows, gains = [], []
    for dataset in experiments.datasets:
        for lang, language in experiments.languages.items():
            where = {"data set": dataset_title(dataset), "language": language}
            own = outlines[(outlines["dataset"] == dataset) & (outlines["language"] == lang)]
            rows += [where | row for row in _method_rows(experiments, dataset, own, planned)]
            gains += [where | row for row in _gain_rows(experiments.rows("table 2"), dataset, own)]
    for method in ("dpo", "tkpo"):
        published = {SCORES[s]: f"{PUBLISHED_BARS[method][s]:.1f}" for s in SCORES if s in PUBLISHED_BARS[method]}
        rows.append({"data set": "published", "method": f"{METHODS[method]}, Qwen2.5-3B", **published})
    gains.append({"data set": "published", "gain, %": "TKPO over DPO, Qwen2.5-3B", "R-1": "up to +19.28"})
    blocks = [Block(_filled(rows), 3), Block(_filled(gains), 3, "Relative gain in per cent")]
    return Table(2, "Main comparison", blocks, [*_table2_notes(experiments), *experiments.notes("table 2")])


def _method_rows(experiments: Experiments, dataset: str, own: pd.DataFrame, planned: pd.DataFrame) -> list[dict]:
    """The rows of one data set and language: one per method, then the references."""
    rows, cells = [], spread(own, ["method", "label"], list(SCORES))
    for _, method, label in (key for key in experiments.rows("table 2") if key[0] == dataset):
        runs = planned[(planned[ROW] == [dataset, method, label]).all(axis=1)]
        here = own[(own["method"] == method) & (own["label"] == label)]
        row = {"method": row_name(method, label), "seeds": f"{here['seed'].nunique()} of {len(runs) or 1}"}
        if here.empty:
            rows.append(row | {"n": ""} | dict.fromkeys(SCORES.values(), MISSING))
            continue
        counts = sorted(set(here.groupby("seed").size()))
        rows.append(row | {"n": "/".join(map(str, counts))} | cells.loc[method, label].rename(SCORES).to_dict())
    if len(own):
        first = own[own["seed"] == own.groupby(["method", "label"])["seed"].transform("min")]
        accuracy = first["classifier_reference_accuracy"].mean()
        rows.append({"method": "references", SCORES["control_accuracy"]: f"{accuracy:.1f}"})
    return rows


def _gain_rows(promised: list[tuple], dataset: str, own: pd.DataFrame) -> list[dict]:
    rows = []
    for ours, theirs in COMPARED:
        if (dataset, *ours) in promised:
            pair = [own[(own["method"] == method) & (own["label"] == label)] for method, label in (ours, theirs)]
            texts = {name: gain_text(gain(*pair, score)) for score, name in SCORES.items()}
            rows.append({"gain, %": f"{row_name(*ours)} over {row_name(*theirs)}", **texts})
    return rows


def _table2_notes(experiments: Experiments) -> list[str]:
    return [
        "ROUGE F1 and BLEU-4 × 100; control, valid and level in per cent: outlines that a classifier fitted on the "
        "training references takes for the asked style (row *references*: of the test references), that parse, and "
        "that keep the style's number of headings. Mean ± standard deviation over seeds; n outlines per seed.",
        "Gains: mean over the test outlines, both methods on the same ones, with a 95 % interval by paired bootstrap "
        "over outlines (10,000 draws); an interval around 0 is a tie. – where the other method scores 0.",
        "*samples as DPO*: one pass and a half, which is what DPO has seen with the SFT run that it continues.",
        f"*tuned*: settings chosen on validation outlines among four tries for each method ({_choices(experiments)}).",
        "Published: abstract (which score is meant is not said there) and bars of the framework figure (± 0.3; data "
        "set and language not said), Qwen2.5-3B-Instruct with full fine-tuning: not comparable in height.",
    ]


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


# ---- table 3: cost -------------------------------------------------------------------------------------


def table3(experiments: Experiments) -> Table:
    """Cost."""
    blocks = [_benchmark(bench) for bench in benchmarks(experiments)]
    blocks += _training_costs(experiments)
    notes = [
        "The first part is measured side by side, alone on the machine (`paper/benchmark.py`); *memory* is the growth "
        "over the loaded model. The step of a pair is compared with the step of its preferred sample.",
        "Counted: forward passes with a backward pass as two; TKPO 4, SFT 3, DPO 8, DPO with precomputed reference 6. "
        "Published: 56.25 % of DPO's training time.",
        "Whole runs are wall clock on a machine that did other work beside them: only the first part compares "
        "methods; the pipeline of DPO and SimPO has the SFT run they continue in it (–: that was not made alone on the "
        "same machine). Runs that were made several at a time (`--jobs`) are not here.",
    ]
    if not any(b.caption.startswith("One run") for b in blocks):
        notes.append("No benchmark is stored: `python paper/benchmark.py` measures it.")
    if not blocks:
        blocks.append(Block(pd.DataFrame(columns=["method"]), 1))
    return Table(3, "Cost", blocks, [*notes, *experiments.notes("table 3")])


def _benchmark(bench: dict) -> Block:
    """The steps of all methods on one machine, with their ratios to DPO's."""
    methods = {m["key"]: m for m in bench["methods"] if not m.get("error") and m.get("median")}
    rows = []
    for key, method in methods.items():
        row = {
            "method": method["label"],
            "s a step": f"{method['median']:.2f}",
            "quartiles": " – ".join(f"{q:.2f}" for q in method["quartiles"]),
            "tokens/s": f"{method['tokens_per_second']:.0f}",
            "memory, MiB": f"{method['peak_memory_mib']:.0f}",
            "process, MiB": f"{method['peak_process_mib']:.0f}",
        }
        for other, name in (("dpo", "× DPO"), ("dpo_precomputed", "× DPO precomputed")):
            ratio = bench.get("ratios", {}).get(f"{key}/{other}")
            if ratio is None and other in methods:
                ratio = method["median"] / methods[other]["median"]
            row[name] = f"{ratio:.2f}" if ratio else ""
        row["× DPO counted"] = f"{COUNTED[key] / COUNTED['dpo']:.2f}" if key in COUNTED else ""
        row["× DPO published"] = f"{PUBLISHED_TIME:.4f}" if key == "tkpo" else ""
        rows.append(row)
    machine, tokens = bench["machine"], bench.get("tokens", {})
    what = (
        f"{bench['model']}, {bench['finetuning']}, {bench['dtype']}, batch {bench['batch_size']}, "
        f"{tokens.get('mean', 0):.0f} tokens a sample"
    )
    what += ", instruction after the article" if bench.get("attribute_last") else ""
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return Block(_filled(rows), 1, f"One run on one machine: {what}; {where}")


def _training_costs(experiments: Experiments) -> list[Block]:
    """The wall clock of whole trainings, a block per machine."""
    rows = []
    for row in experiments.planned("table 3").itertuples():
        record = experiments.store.get(row.run)
        if not timed(record):
            continue
        training = record["training"]
        rows.append(
            {
                "machine": machine_name(record["environment"]),
                "dataset": row.dataset,
                "order": list(METHODS).index(row.method),
                "label": row.label,
                "method": METHODS[row.method],
                "samples seen": training["samples"] * record["config"]["epochs"],
                "s a step": stage_seconds(record) / training["steps"],
                "s to train": stage_seconds(record),
                "s whole pipeline": pipeline_seconds(experiments, row.run),
                "peak memory, MiB": training["peak_memory_mib"],
            }
        )
    blocks = []
    for machine, own in pd.DataFrame(rows).groupby("machine") if rows else []:
        groups = own.groupby(["dataset", "order", "label", "method"])
        means = groups[list(own.columns[5:])].mean()
        cells = means.map("{:.0f}".format).where(means.notna(), "–")
        cells["s a step"] = means["s a step"].map("{:.3g}".format)
        cells.insert(0, "runs", groups.size().astype(str))
        cells = cells.reset_index().drop(columns=["order", "label"])
        cells["dataset"] = cells["dataset"].map(dataset_title)
        cells = cells.rename(columns={"dataset": "data set"})
        blocks.append(Block(cells, 2, f"Whole training runs on {machine}"))
    return blocks


# ---- table 4: ablations --------------------------------------------------------------------------------


def table4(experiments: Experiments) -> Table:
    """Ablations."""
    scores = ["rouge-1", "rouge-l", "bleu-4", "control_accuracy", "structure_valid"]
    outlines, planned = experiments.outlines("table 4"), experiments.planned("table 4")
    cells = spread(outlines, ["dataset", "variant", "language"], scores)
    blocks = []
    for dataset in planned["dataset"].unique():
        rows = []
        for variant, runs in planned[planned["dataset"] == dataset].groupby("variant", sort=False):
            row = {
                "variant": ablation_name(dict(runs["run"].iloc[0].settings)),
                "seeds": f"{runs['stored'].sum()} of {len(runs)}",
            }
            for lang in experiments.languages:
                found = (dataset, variant, lang) in cells.index
                for score in scores:
                    row[f"{lang} {SCORES[score]}"] = cells.loc[(dataset, variant, lang), score] if found else MISSING
            rows.append(row)
        blocks.append(Block(_filled(rows), 1, dataset_title(dataset).capitalize()))
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


# ---- table 5: parts of the test split ------------------------------------------------------------------


def table5(experiments: Experiments) -> Table:
    """Generalisation: with the article or from the topic alone, and each attribute."""
    scores = ["rouge-l", "control_accuracy"]
    outlines = experiments.outlines("table 5")
    outlines = outlines[outlines["label"] == ""]
    methods = list(dict.fromkeys(method for _, method, _ in experiments.rows("table 5")))
    methods.sort(key=list(METHODS).index)
    rows = []
    for dataset in experiments.datasets:
        styles = samples(dataset)["attribute"].unique()
        for lang, language in experiments.languages.items():
            parts = [("form", "article", "article given"), ("form", "topic", "topic only")]
            for key, value, name in [*parts, *(("style", style, style) for style in styles)]:
                own = outlines[outlines[["dataset", "language", key]].eq([dataset, lang, value]).all(axis=1)]
                cells, counts = spread(own, ["method"], scores), set(own.groupby(["method", "seed"]).size())
                row = {"data set": dataset_title(dataset), "language": language, "outlines": name}
                row["n"] = "/".join(map(str, sorted(counts)))
                texts = {m: " / ".join(cells.loc[m]) if m in cells.index else MISSING for m in methods}
                rows.append(row | {METHODS[m]: text for m, text in texts.items()})
    notes = [
        "ROUGE-L / control accuracy (%), mean over the seeds of Table 2; n outlines per seed.",
        *experiments.notes("table 5"),
    ]
    return Table(5, "Generalisation", [Block(_filled(rows), 3)], notes)


TABLES = {1: table1, 2: table2, 3: table3, 4: table4, 5: table5}


def findings(experiments: Experiments) -> str:
    """Where TKPO wins, ties or loses, as Markdown: one line per comparison."""
    outlines = experiments.outlines("table 2")
    outlines, lines = outlines[outlines["label"] == ""], []
    for dataset in experiments.datasets:
        for lang, language in experiments.languages.items():
            own = outlines[(outlines["dataset"] == dataset) & (outlines["language"] == lang)]
            for ours, theirs in VERDICTS:
                pair = [own[own["method"] == method] for method in (ours, theirs)]
                head = f"| {dataset_title(dataset)} | {language} | {METHODS[theirs]} |"
                if any(one.empty for one in pair):
                    lines.append(f"{head} not run yet | | |")
                    continue
                verdicts: dict[str, list[str]] = {"wins": [], "ties": [], "loses": []}
                for score, name in SCORES.items():
                    found = gain(*pair, score)
                    verdicts[verdict(found)].append(f"{name} {gain_text(found).split(' [')[0]}")
                texts = (", ".join(verdicts[v]) or "–" for v in ("wins", "ties", "loses"))
                lines.append(f"{head} {' | '.join(texts)} |")
    head = "| data set | language | TKPO against | wins | ties | loses |\n| --- | --- | --- | --- | --- | --- |\n"
    return head + "\n".join(lines) + "\n"
