"""Tables 1 to 5, from the data sets and the stored results."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from reproduction.grid import PRESET, Grid, Run, run_config
from reproduction.store import Store, mean
from tkpo.data import load_records
from tkpo.metrics import paired_bootstrap
from tkpo.outline import length, parse

LANGUAGES = {"en": "English", "zh": "Chinese"}
DATASETS = {"language_style": "language style", "level_of_detail": "level of detail"}
METHODS = {"base": "zero-shot", "sft": "SFT", "simpo": "SimPO", "orpo": "ORPO", "dpo": "DPO", "tkpo": "TKPO"}
SCORES = {
    "rouge-1": "R-1",
    "rouge-2": "R-2",
    "rouge-l": "R-L",
    "bleu-4": "BLEU-4",
    "control_accuracy": "control",
    "structure_valid": "valid",
    "obeys_detail": "level",
}
MISSING = "†"
# Forward passes a sample, a backward pass counting as two (the reference model's passes included).
COUNTED = {"sft": 3, "dpo": 8, "dpo_precomputed": 6, "tkpo": 4}
PUBLISHED_TIME = 0.5625  # TKPO's training time over DPO's, from the paper's abstract
# Read off the bars of the paper's framework figure, ± 0.3; memory in GiB over eight GPUs.
PUBLISHED_BARS = {
    "dpo": {"rouge-1": 37.5, "bleu-4": 24.9, "memory": 229.5},
    "tkpo": {"rouge-1": 43.4, "bleu-4": 30.3, "memory": 171.0},
}
VERDICTS = (("tkpo", "dpo"), ("tkpo", "sft"))


@dataclass
class Block:
    """Rows under one header. `text` columns (the first so many) are left-aligned, the others right."""

    header: list[str]
    rows: list[list[str]]
    text: int
    caption: str = ""


@dataclass
class Table:
    """A numbered table of one or more blocks with notes beneath."""

    number: int
    title: str
    blocks: list[Block]
    notes: list[str] = field(default_factory=list)


@dataclass
class Results:
    """What tables and figures are made from."""

    store: Store
    grids: dict[str, Grid]
    seeds: list[int] | None = None

    @property
    def languages(self) -> dict[str, str]:
        """Language code → name, of those that the preset's runs are in."""
        only = self.store.preset.train.get("lang")
        return {lang: name for lang, name in LANGUAGES.items() if only in (None, lang)}

    def serving(self, what: str) -> list[tuple[Grid, list[Run]]]:
        """(grid, its runs) of each grid that serves a table or figure; no runs while they wait for tuning."""
        found = []
        tuners = {grid.tuned_by["grid"] for grid in self.grids.values() if grid.tuned_by}
        for grid in self.grids.values():
            if what in grid.serves:
                if grid.tuned_by:
                    runs = self.store.tuned(grid, self.grids, self.seeds) or []
                else:  # tries are made with their own seeds, whatever seeds are asked for
                    runs = grid.runs(self.store.preset, None if grid.name in tuners else self.seeds)
                found.append((grid, runs))
        return found

    def cells(self, what: str) -> dict[tuple, list[Run]]:
        """(data set, method, label) → its runs over all seeds, of the grids on the test split that serve `what`."""
        cells: dict[tuple, list[Run]] = {}
        for grid, runs in self.serving(what):
            if grid.split != "test":
                continue
            for dataset in grid.datasets:
                for method in grid.methods:
                    own = [run for run in runs if (run.dataset, run.method) == (dataset, method)]
                    cells.setdefault((dataset, method, grid.label), []).extend(own)
        return {key: list(dict.fromkeys(runs)) for key, runs in cells.items()}

    def command(self, what: str) -> str:
        preset = self.store.preset.name
        extra = "" if preset == PRESET else f" --preset {preset}"
        return f"python paper/reproduce.py --run --{what}{extra}"

    def notes(self, what: str) -> list[str]:
        """The note that says how to make the runs that a table still lacks; none where it lacks none."""
        if all(runs and all(map(self.store.get, runs)) for _, runs in self.serving(what)):
            return []
        return [f"Some runs are not made yet ({MISSING} where a cell has none): `{self.command(what)}` makes them."]


def samples_by_seed(results: Results, runs: list[Run], keep: Callable[[dict], bool]) -> list[list[dict]]:
    """The scored samples of each stored run, those that `keep` wants; runs that are left with none are dropped."""
    found = [[s for s in results.store.samples(run) if keep(s)] for run in runs if results.store.get(run)]
    return [samples for samples in found if samples]


def spread(values: list[float]) -> str:
    """Mean, and ± the standard deviation over seeds where there are several."""
    text = f"{mean(values):.1f}"
    return f"{text} ± {statistics.stdev(values):.1f}" if len(values) > 1 else text


def score_cells(seeds: list[list[dict]], scores) -> list[str]:
    return [spread([mean(s[score] for s in samples) for samples in seeds]) for score in scores]


def averaged(seeds: list[list[dict]]) -> dict[tuple, dict]:
    """Test sample → its scores averaged over seeds; only samples that every seed has."""
    keyed = [{(s["lang"], s["id"], s["attribute"], s["form"]): s for s in samples} for samples in seeds]
    common = sorted(set.intersection(*map(set, keyed))) if keyed else []
    return {key: {score: mean(one[key][score] for one in keyed) for score in SCORES} for key in common}


def gain(ours: list[list[dict]], theirs: list[list[dict]], score: str) -> dict | None:
    """Relative gain of ours over theirs in per cent, by paired bootstrap over the test samples both have."""
    a, b = averaged(ours), averaged(theirs)
    common = sorted(a.keys() & b.keys())
    if not common:
        return None
    return paired_bootstrap([a[key][score] for key in common], [b[key][score] for key in common])


def gain_text(found: dict | None) -> str:
    if found is None:
        return MISSING
    if found["gain"] is None:
        return "–"  # theirs is 0 everywhere
    low, high = (f"{found[end]:+.1f}" if found[end] is not None else "–" for end in ("low", "high"))
    return f"{found['gain']:+.1f} [{low}, {high}]"


def verdict(found: dict | None) -> str:
    """wins or loses where the interval of a gain leaves out 0; ties too where the other method scores mostly 0."""
    if found is None or found["low"] is None or found["undefined_draws"] > 0.05 * found["draws"]:
        return "ties"
    return "wins" if found["low"] > 0 else "loses" if found["high"] < 0 else "ties"


# ---- the tables ----------------------------------------------------------------------------------------


def table1(results: Results) -> Table:
    """Data statistics."""
    rows = []
    for dataset, title in DATASETS.items():
        for lang, language in LANGUAGES.items():
            for split in ("train", "validation", "test"):
                records = load_records(dataset, split, lang)
                for attribute in dict.fromkeys(r["attribute"] for r in records):
                    own = [r for r in records if r["attribute"] == attribute]
                    articles = [length(r["input"], lang) for r in own if r["form"] == "article"]
                    outlines = [parse(r["output"]) for r in own]
                    texts = [
                        " ".join(h for top, sub in zip(o.headings, o.sub_headings, strict=True) for h in (top, *sub))
                        for o in outlines
                    ]
                    row = [title, language, split, attribute, str(len(own)), str(len(own) - len(articles))]
                    row += [f"{mean(articles):.0f}", f"{mean(length(t, lang) for t in texts):.1f}"]
                    row += [f"{mean(o.n_headings for o in outlines):.1f}"]
                    row += [f"{mean(o.n_sub_headings for o in outlines):.1f}", f"{mean(o.depth for o in outlines):.1f}"]
                    rows.append(row)
    header = ["data set", "language", "split", "attribute", "samples", "topic only", "article", "outline"]
    header += ["headings", "sub-headings", "depth"]
    notes = [
        "Article (of the samples that have one, with its topic line) and outline lengths are means in words (English) "
        "or characters (Chinese); outlines without their numbers.",
        "A sample is an article (or its topic alone) with one attribute; a third of the training and validation "
        "samples have the topic alone, and every test article is there in both forms.",
    ]
    return Table(1, "Data statistics", [Block(header, rows, 4)], notes)


def _label(method: str, label: str) -> str:
    return METHODS[method] + (f", {label}" if label else "")


def table2(results: Results) -> Table:
    """Main comparison, with TKPO's gains."""
    cells = results.cells("table 2")
    order = sorted(cells, key=lambda key: (list(METHODS).index(key[1]), key[2]))
    results.store.score([run for runs in cells.values() for run in runs])
    rows, gains = [], []
    for dataset, title in DATASETS.items():
        for lang, language in results.languages.items():
            seeds = {}
            for key in (key for key in order if key[0] == dataset):
                runs = cells[key]
                found = seeds[key] = samples_by_seed(results, runs, lambda s, lang=lang: s["lang"] == lang)
                name = _label(*key[1:])
                if not found:
                    rows.append([title, language, name, f"0 of {len(runs) or 1}", "", *[MISSING] * len(SCORES)])
                    continue
                counts = "/".join(str(n) for n in sorted({len(samples) for samples in found}))
                rows.append(
                    [title, language, name, f"{len(found)} of {len(runs)}", counts, *score_cells(found, SCORES)]
                )
            reference = [
                s["classifier_reference_accuracy"] for f in seeds.values() for samples in f[:1] for s in samples
            ]
            if reference:
                blank = [""] * len(SCORES)
                blank[list(SCORES).index("control_accuracy")] = f"{mean(reference):.1f}"
                rows.append([title, language, "references", "", "", *blank])
            for ours, theirs in (
                (("tkpo", ""), ("dpo", "")),
                (("tkpo", "samples as DPO"), ("dpo", "")),
                (("tkpo", "tuned"), ("dpo", "tuned")),
                (("tkpo", ""), ("sft", "")),
            ):
                pair = [seeds.get((dataset, *which)) or [] for which in (ours, theirs)]
                if (dataset, *ours) in cells:
                    texts = [gain_text(gain(*pair, score)) for score in SCORES]
                    gains.append([title, language, f"{_label(*ours)} over {_label(*theirs)}", *texts])
    bars = PUBLISHED_BARS
    for method in ("dpo", "tkpo"):
        published = {name: f"{bars[method][name]:.1f}" for name in ("rouge-1", "bleu-4")}
        rows.append(
            ["published", "", f"{METHODS[method]}, Qwen2.5-3B", "", "", *(published.get(s, "") for s in SCORES)]
        )
    gains.append(["published", "", "TKPO over DPO, Qwen2.5-3B", "up to +19.28", *[""] * (len(SCORES) - 1)])
    head = ["data set", "language", "method"]
    blocks = [
        Block([*head, "seeds", "n", *SCORES.values()], rows, 3),
        Block(["data set", "language", "gain, %", *SCORES.values()], gains, 3, "Relative gain in per cent"),
    ]
    notes = [
        "ROUGE F1 and BLEU-4 × 100; control, valid and level in per cent: outlines that a classifier fitted on the "
        "training references takes for the asked style (row *references*: of the test references), that parse, and "
        "that keep the style's number of headings. Mean ± standard deviation over seeds; n outlines a seed.",
        "Gains: mean over the test outlines, both methods on the same ones, with a 95 % interval by paired bootstrap "
        "over outlines (10,000 draws); an interval around 0 is a tie. – where the other method scores 0.",
        "*samples as DPO*: one pass and a half, which is what DPO has seen with the SFT run that it continues.",
        f"*tuned*: settings chosen on validation outlines among four tries for each method ({_choices(results)}).",
        "Published: abstract (which score is meant is not said there) and bars of the framework figure (± 0.3; data "
        "set and language not said), Qwen2.5-3B-Instruct with full fine-tuning: not comparable in height.",
        *results.notes("table 2"),
    ]
    return Table(2, "Main comparison", blocks, notes)


def _choices(results: Results) -> str:
    chosen = []
    for grid in results.grids.values():
        if grid.tuned_by:
            tried = results.grids[grid.tuned_by["grid"]].variants
            for run in results.store.tuned(grid, results.grids, results.seeds) or []:
                config = run_config(run, results.store.preset)
                keys = dict.fromkeys(key for variant in tried[run.method] for key in variant)
                settings = ", ".join(f"{key} {getattr(config, key):g}" for key in keys)
                chosen.append(f"{METHODS[run.method]} on {DATASETS[run.dataset]}: {settings}")
    return "; ".join(dict.fromkeys(chosen)) or "not yet run"


def table3(results: Results) -> Table:
    """Cost."""
    blocks = []
    for bench in benchmarks(results):
        methods = {m["key"]: m for m in bench["methods"] if not m.get("error") and m.get("median")}
        rows = []
        for key, method in methods.items():
            ratios = []
            for other in ("dpo", "dpo_precomputed"):
                ratio = bench.get("ratios", {}).get(f"{key}/{other}")
                if ratio is None and other in methods:
                    ratio = method["median"] / methods[other]["median"]
                ratios.append(f"{ratio:.2f}" if ratio else "")
            counted = f"{COUNTED[key] / COUNTED['dpo']:.2f}" if key in COUNTED else ""
            published = f"{PUBLISHED_TIME:.4f}" if key == "tkpo" else ""
            quartiles = " – ".join(f"{q:.2f}" for q in method["quartiles"])
            memory = f"{method['peak_memory_mib']:.0f}", f"{method['peak_process_mib']:.0f}"
            rows.append(
                [method["label"], f"{method['median']:.2f}", quartiles, f"{method['tokens_per_second']:.0f}", *memory]
            )
            rows[-1] += [*ratios, counted, published]
        header = [
            "method",
            "s a step",
            "quartiles",
            "tokens/s",
            "memory, MiB",
            "process, MiB",
            "× DPO",
            "× DPO precomputed",
        ]
        header += ["× DPO counted", "× DPO published"]
        machine, tokens = bench["machine"], bench.get("tokens", {})
        what = (
            f"{bench['model']}, {bench['finetuning']}, {bench['dtype']}, batch {bench['batch_size']}, "
            f"{tokens.get('mean', 0):.0f} tokens"
        )
        what += " a sample" + (", instruction after the article" if bench.get("attribute_last") else "")
        where = machine.get("gpu") or f"{machine['processor']}, {machine['threads']} threads"
        blocks.append(Block(header, rows, 1, f"One run on one machine: {what}; {where}"))
    for machine, rows in _training_costs(results).items():
        header = [
            "data set",
            "method",
            "runs",
            "samples seen",
            "s a step",
            "s to train",
            "s whole pipeline",
            "peak memory, MiB",
        ]
        blocks.append(Block(header, rows, 2, f"Whole training runs on {machine}"))
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
    if len(blocks) == 0:
        blocks.append(Block(["method"], [], 1))
    notes += results.notes("table 3")
    return Table(3, "Cost", blocks, notes)


def benchmarks(results: Results) -> list[dict]:
    """The stored benchmarks of the preset's model, by name; those of the loss head alone are left out."""
    folder = results.store.folder.parent / "benchmark"
    found = []
    for path in sorted(folder.glob("*.json")):
        bench = json.loads(path.read_text(encoding="utf-8"))
        if bench.get("finetuning") and bench.get("model") == results.store.preset.model:
            found.append(bench)
    return found


def machine_name(environment: dict) -> str:
    return ", ".join(environment.get("gpus") or [f"{environment['cpu']} ({environment['cores']} cores)"])


def timed(record: dict | None) -> bool:
    """Whether the seconds of a stored run tell something: it was trained, with no other run beside it."""
    return bool(record and record["config"] and record.get("jobs", 1) == 1)


def stage_seconds(record: dict) -> float:
    """Seconds of the whole training, also where the run was cut off and resumed, without those of validation."""
    validation = sum(line.get("eval_runtime", 0.0) for line in record["log"])
    return record["training"]["seconds_a_step"] * record["training"]["steps"] - validation


def pipeline_seconds(results: Results, run: Run) -> float | None:
    """Seconds to train the run and the SFT run it continues; None if that one is not timed, or on another machine."""
    record = results.store.get(run)
    if not run.sft:
        return stage_seconds(record)
    before = results.store.get(run.sft)
    if not timed(before) or machine_name(before["environment"]) != machine_name(record["environment"]):
        return None
    return stage_seconds(before) + stage_seconds(record)


def _training_costs(results: Results) -> dict[str, list[list[str]]]:
    machines: dict[str, list[list[str]]] = {}
    cells = results.cells("table 3")
    stored = [run for runs in cells.values() for run in runs if timed(results.store.get(run))]
    for machine in sorted({machine_name(results.store.get(run)["environment"]) for run in stored}):
        for (dataset, method, _), runs in sorted(cells.items(), key=lambda c: (c[0][0], list(METHODS).index(c[0][1]))):
            here = [r for r in runs if r in stored and machine_name(results.store.get(r)["environment"]) == machine]
            if not here:
                continue
            records = [results.store.get(run) for run in here]
            training = [record["training"] for record in records]
            whole = [seconds for run in here if (seconds := pipeline_seconds(results, run)) is not None]
            row = [DATASETS[dataset], METHODS[method], str(len(here))]
            row.append(f"{mean(r['training']['samples'] * r['config']['epochs'] for r in records):.0f}")
            row.append(f"{mean(stage_seconds(r) / r['training']['steps'] for r in records):.3g}")
            row.append(f"{mean(map(stage_seconds, records)):.0f}")
            row.append(f"{mean(whole):.0f}" if whole else "–")
            row.append(f"{mean(t['peak_memory_mib'] for t in training):.0f}")
            machines.setdefault(machine, []).append(row)
    return machines


def table4(results: Results) -> Table:
    """Ablations."""
    scores = ("rouge-1", "rouge-l", "bleu-4", "control_accuracy", "structure_valid")
    variants: dict[tuple, list[Run]] = {}
    for _, runs in results.serving("table 4"):
        for run in runs:
            variants.setdefault((run.dataset, run.settings), []).append(run)
    results.store.score([run for runs in variants.values() for run in runs])
    blocks = []
    for dataset in dict.fromkeys(dataset for dataset, _ in variants):
        rows = []
        for (other, settings), runs in variants.items():
            if other != dataset:
                continue
            row = [ablation_name(dict(settings))]
            stored = [run for run in runs if results.store.get(run)]
            row.append(f"{len(stored)} of {len(runs)}")
            for lang in results.languages:
                found = samples_by_seed(results, runs, lambda s, lang=lang: s["lang"] == lang)
                row += score_cells(found, scores) if found else [MISSING] * len(scores)
            rows.append(row)
        columns = [f"{lang} {SCORES[score]}" for lang in results.languages for score in scores]
        blocks.append(Block(["variant", "seeds", *columns], rows, 1, DATASETS[dataset].capitalize()))
    notes = [
        "Each differs from the first row in the one thing named; trained on a quarter of the main comparison's samples"
        f"{_machines(results, variants)}. *no flip*: rejects from the model's own prediction under the true prompt. "
        "*no preference term* is SFT.",
        *results.notes("table 4"),
    ]
    return Table(4, "Ablations of TKPO", blocks, notes)


def _machines(results: Results, cells: dict[tuple, list[Run]]) -> str:
    """Where the runs were made, as the end of a sentence; nothing if all on one machine."""
    records = [results.store.get(run) for runs in cells.values() for run in runs]
    names = sorted({machine_name(record["environment"]) for record in records if record})
    return f", on {' or '.join(names)} (other draws and rounding)" if len(names) > 1 else ""


SYMBOLS = {"preference_weight": "λ", "tau": "τ", "num_rejects": "K"}


def ablation_name(settings: dict) -> str:
    if not settings:
        return "TKPO (λ 0.5, τ 0.15, K 20, multinomial, log mean)"
    if settings == {"preference_weight": 0}:
        return "no preference term (λ 0)"
    if settings == {"sampler": "no_flip"}:
        return "no flip"
    names = [f"{SYMBOLS[k]} {v:g}" if k in SYMBOLS else f"{k} {str(v).replace('_', ' ')}" for k, v in settings.items()]
    return ", ".join(names)


def table5(results: Results) -> Table:
    """Generalisation: with the article or from the topic alone, and each attribute."""
    cells = results.cells("table 5")
    results.store.score([run for runs in cells.values() for run in runs])
    methods = [m for m in METHODS if any(key[1] == m for key in cells)]
    rows = []
    for dataset, title in DATASETS.items():
        attributes = dict.fromkeys(r["attribute"] for r in load_records(dataset, "test", "en"))
        for lang, language in results.languages.items():
            parts = [("form", "article", "article given"), ("form", "topic", "topic only")]
            parts += [("attribute", a, a) for a in attributes]
            for key, value, name in parts:
                row, counts = [title, language, name], set()
                for method in methods:
                    runs = cells.get((dataset, method, ""), [])
                    found = samples_by_seed(
                        results, runs, lambda s, k=key, v=value, g=lang: s["lang"] == g and s[k] == v
                    )
                    counts |= {len(samples) for samples in found}
                    row.append(" / ".join(score_cells(found, ("rouge-l", "control_accuracy"))) if found else MISSING)
                row.insert(3, "/".join(map(str, sorted(counts))))
                rows.append(row)
    header = ["data set", "language", "outlines", "n", *(METHODS[m] for m in methods)]
    notes = [
        "ROUGE-L / control accuracy (%), mean over the seeds of Table 2; n outlines a seed.",
        *results.notes("table 5"),
    ]
    return Table(5, "Generalisation", [Block(header, rows, 3)], notes)


TABLES = {1: table1, 2: table2, 3: table3, 4: table4, 5: table5}


def findings(results: Results) -> str:
    """Where TKPO wins, ties or loses, as Markdown: one line a comparison."""
    cells = results.cells("table 2")
    lines = []
    for dataset, title in DATASETS.items():
        for lang, language in results.languages.items():
            for ours, theirs in VERDICTS:
                seeds = [
                    samples_by_seed(results, cells.get((dataset, m, ""), []), lambda s, lang=lang: s["lang"] == lang)
                    for m in (ours, theirs)
                ]
                if not all(seeds):
                    lines.append(f"| {title} | {language} | {METHODS[theirs]} | not run yet | | |")
                    continue
                verdicts: dict[str, list[str]] = {"wins": [], "ties": [], "loses": []}
                for score, name in SCORES.items():
                    found = gain(*seeds, score)
                    verdicts[verdict(found)].append(f"{name} {gain_text(found).split(' [')[0]}")
                texts = (", ".join(verdicts[v]) or "–" for v in ("wins", "ties", "loses"))
                lines.append(f"| {title} | {language} | {METHODS[theirs]} | {' | '.join(texts)} |")
    head = "| data set | language | TKPO against | wins | ties | loses |\n| --- | --- | --- | --- | --- | --- |\n"
    return head + "\n".join(lines) + "\n"


# ---- writing -------------------------------------------------------------------------------------------


def markdown(table: Table) -> str:
    parts = [f"**Table {table.number}. {table.title}**"]
    for block in table.blocks:
        align = ["---"] * block.text + ["---:"] * (len(block.header) - block.text)
        rows = [block.header, align, *block.rows]
        if block.caption:
            parts.append(f"{block.caption}:")
        parts.append("\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows))
    parts += table.notes
    return "\n\n".join(parts) + "\n"


def csv_text(table: Table) -> str:
    """Every block with its header; a blank line between two."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    for number, block in enumerate(table.blocks):
        if number:
            file.write("\n")
        writer.writerows([block.header, *block.rows])
    return file.getvalue()


LATEX = {"\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$", "{": r"\{", "}": r"\}"}
LATEX |= {
    "±": r"$\pm$",
    "×": r"$\times$",
    "†": r"$\dagger$",
    "–": "--",
    "λ": r"$\lambda$",
    "τ": r"$\tau$",
    "…": r"\dots{}",
}
LATEX |= {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def latex(table: Table) -> str:
    """booktabs tables, one a block, for \\input."""

    def clean(text: str) -> str:
        return "".join(LATEX.get(c, c) for c in text)

    parts = []
    for block in table.blocks:
        columns = "l" * block.text + "r" * (len(block.header) - block.text)
        rows = [" & ".join(map(clean, row)) + r" \\" for row in [block.header, *block.rows]]
        title = clean(f"{table.title}. {block.caption}".rstrip(". ") + ".")
        lines = [r"\begin{table*}", r"\centering\small", rf"\caption{{{title}}}", rf"\begin{{tabular}}{{{columns}}}"]
        lines += [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}", r"\end{table*}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n" + "".join(f"% {note}\n" for note in table.notes)


def show(table: Table) -> None:
    """Print a table for a terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    console = Console(width=None if Console().is_terminal else 200)
    console.print(Text(f"Table {table.number}. {table.title}", style="bold"))
    for block in table.blocks:
        shown = RichTable(title=block.caption or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(block.header):
            shown.add_column(Text(name), justify="left" if number < block.text else "right")
        for row in block.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
    for note in table.notes:
        console.print(Text(note, style="dim"))
    console.print()


FORMATS = {"md": markdown, "csv": csv_text, "tex": latex}


def write(table: Table, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for ending, render in FORMATS.items():
        (folder / f"table{table.number}.{ending}").write_text(render(table), encoding="utf-8", newline="\n")
