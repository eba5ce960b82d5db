"""What the loop guard does to outlines by a shipped adapter → results/loop_guard.json.

    python paper/loop_guard.py

Test prompts of level of detail, both languages, all styles and forms, greedily with and without the guard. A numbering
fault is a line that is neither a heading nor a sub-heading of the outline format, or that has another number than due.
"""

import json
from collections import Counter
from pathlib import Path

from tkpo.attributes import get_axis
from tkpo.data import annotate, load_records, sample_order
from tkpo.environment import environment
from tkpo.generation import OutlineGenerator
from tkpo.loop_guard import LoopGuard
from tkpo.outline import headings_of, loops, parse, words

HERE = Path(__file__).parent
DATASET, METHOD, MODEL = "level_of_detail", "tkpo", "qwen2.5-coder-0.5b"
PER_CELL = 2  # prompts per language, style and form
OPTIONS = {"max_new_tokens": 224, "batch_size": 8}


def main() -> None:
    records = prompts()
    generator = OutlineGenerator(MODEL, {METHOD: HERE / "checkpoints" / DATASET / METHOD})
    texts = {guard: generator.generate(records, METHOD, guard=guard, **OPTIONS) for guard in ("none", "structure")}
    rows = [
        {key: record[key] for key in ("id", "lang", "attribute", "form")}
        | {guard: {"outline": by[i], "fault": fault(by[i]), "loops": is_loop(by[i])} for guard, by in texts.items()}
        for i, record in enumerate(records)
    ]
    counts = {
        "prompts": len(rows),
        "changed": sum(row["none"]["outline"] != row["structure"]["outline"] for row in rows),
        "faults": {guard: sum(bool(row[guard]["fault"]) for row in rows) for guard in texts},
        "faults_with_the_guard_alone": sum(
            bool(row["structure"]["fault"]) > bool(row["none"]["fault"]) for row in rows
        ),
        "loops": {guard: sum(row[guard]["loops"] for row in rows) for guard in texts},
    }
    settings = {
        "model": MODEL,
        "adapter": f"{DATASET}/{METHOD}",
        "guard": LoopGuard.name,
        "decoding": "greedy",
        **OPTIONS,
    }
    result = {"settings": settings, "environment": environment(), "counts": counts, "outlines": rows}
    path = HERE / "results" / "loop_guard.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(json.dumps(counts))


def prompts() -> list[dict]:
    """`PER_CELL` test records of each language, style and form, picked by hash."""
    taken: Counter = Counter()
    chosen = []
    for record in sorted(annotate(load_records(DATASET, "test"), get_axis(DATASET)), key=sample_order):
        cell = record["lang"], record["attribute"], record["form"]
        taken[cell] += 1
        if taken[cell] <= PER_CELL:
            chosen.append(record)
    return chosen


def fault(text: str) -> str | None:
    """The first fault of an outline, or None."""
    try:
        parse(text)
    except ValueError as error:
        return str(error)
    return None


def is_loop(text: str) -> bool:
    return loops([words(heading) for heading in headings_of(text)])


if __name__ == "__main__":
    main()
