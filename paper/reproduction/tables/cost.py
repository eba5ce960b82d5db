"""Table 3: what training costs."""

from __future__ import annotations

import pandas as pd

from paper.reproduction.costs import COUNTED, benchmarks, machine_name, pipeline_seconds, stage_seconds, timed
from paper.reproduction.experiments import Experiments
from paper.reproduction.names import METHODS, PUBLISHED_TIME, row_name
from paper.reproduction.rendering import Block, Table


def table3(experiments: Experiments) -> Table:
    """Cost."""
    blocks = [_benchmark(bench) for bench in benchmarks(experiments)]
    blocks += _training_costs(experiments)
    notes = [
        "The first part is measured side by side, alone on the machine (`paper/benchmark.py`); *memory* is the growth "
        "over the loaded model. The step of a pair is compared with the step of its preferred sample. *TKPO (whole "
        "sequences, full softmax)* is the method without our implementation: what it gains on DPO is the method's.",
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
            "s/step": f"{method['median']:.2f}",
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
        by_sample = not bench.get("articles")  # what a method costs, not what reading an article once saves
        row["× DPO counted"] = f"{COUNTED[key] / COUNTED['dpo']:.2f}" if by_sample and key in COUNTED else ""
        row["× DPO published"] = f"{PUBLISHED_TIME:.4f}" if by_sample and key == "tkpo" else ""
        rows.append(row)
    machine, tokens = bench["machine"], bench.get("tokens", {})
    what = (
        f"{bench['model']}, {bench['finetuning']}, {bench['dtype']}, batch {bench['batch_size']}, "
        f"{tokens.get('mean', 0):.0f} tokens per sample"
    )
    if bench.get("articles"):
        what += f", a step is one {bench['articles']} article in its four styles; SFT (ours), TKPO and prompt contrast "
        what += "read it once"
    elif bench.get("attribute_last"):
        what += ", instruction after the article"
    if "load_before" in machine:
        what += (
            f"; ratios are medians of {bench['steps']} steps taken in turn, load before {machine['load_before']:.1f}"
        )
    where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
    return Block(pd.DataFrame(rows).fillna("").astype(str), 1, f"One run on one machine: {what}; {where}")


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
                "data set": experiments.title(row.training),
                "order": list(METHODS).index(row.method),
                "label": row.label,
                "method": row_name(row.method, row.label),
                "samples seen": training["samples"] * record["config"]["epochs"],
                "s/step": stage_seconds(record) / training["steps"],
                "s to train": stage_seconds(record),
                "s whole pipeline": pipeline_seconds(experiments, row.run),
                "peak memory, MiB": training["peak_memory_mib"],
            }
        )
    blocks = []
    for machine, own in pd.DataFrame(rows).groupby("machine") if rows else []:
        groups = own.groupby(["data set", "order", "label", "method"])
        means = groups[list(own.columns[5:])].mean()
        cells = means.map("{:.0f}".format).where(means.notna(), "–")
        cells["s/step"] = means["s/step"].map("{:.3g}".format)
        cells.insert(0, "runs", groups.size().astype(str))
        cells = cells.reset_index().drop(columns=["order", "label"])
        blocks.append(Block(cells, 2, f"Whole training runs on {machine}"))
    return blocks
