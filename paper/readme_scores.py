"""Write the README's scores and sample outlines from the stored results, or check that they are up to date.

python paper/readme_scores.py [--check]
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
METHODS = {"base": "zero-shot", "sft": "SFT", "dpo": "DPO", "tkpo": "TKPO"}
AXES = {"language_style": "language style", "level_of_detail": "level of detail"}
COLUMNS = {
    "rouge-1": "R-1",
    "rouge-2": "R-2",
    "rouge-l": "R-L",
    "bleu-4": "BLEU-4",
    "control_accuracy": "control",
    "structure_valid": "valid",
    "obeys_detail": "level",
}
LANGUAGES = {"en": "English", "zh": "Chinese"}
OWN_TOPICS = (0, 6, 10)  # of results/own_topics.json, those whose outlines by TKPO are shown
SHOWN = ("en", "zh")  # an outline by each method for the first article of these test languages


def score_section() -> str:
    lines = []
    for axis, title in AXES.items():
        missing = [m for m in METHODS if not (HERE / "results" / "scores" / axis / f"{m}.json").exists()]
        if missing:
            lines += [f"**{title.capitalize()}**: not scored yet ({', '.join(METHODS[m] for m in missing)}).", ""]
            continue
        results = {m: _read(f"scores/{axis}/{m}.json") for m in METHODS}
        runs = {m: _read(f"runs/{axis}/{m}/metrics.json") for m in METHODS if m != "base"}
        samples = {run["samples"] for run in runs.values()}
        assert len(samples) == 1, f"{axis}: the methods were trained on different numbers of samples: {samples}"
        lines += [
            f"**{title.capitalize()}** ({samples.pop()} samples, the same for every method, both languages together)",
            "",
            "| | | n | " + " | ".join(COLUMNS.values()) + " |",
            "| --- | --- |" + " ---: |" * (len(COLUMNS) + 1),
        ]
        for lang, language in LANGUAGES.items():
            for method, name in METHODS.items():
                scores = results[method]["scores"][lang]
                cells = " | ".join(f"{scores[column]:.1f}" for column in COLUMNS)
                lines.append(f"| {language} | {name} | {scores['n']} | {cells} |")
        lines.append("")
    return "\n".join(lines)


def outline_section() -> str:
    results = {m: _read(f"scores/language_style/{m}.json")["samples"] for m in METHODS if m != "base"}
    lines = []
    for lang in SHOWN:
        index = next(i for i, r in enumerate(results["sft"]) if (r["lang"], r["form"]) == (lang, "article"))
        samples = {method: rows[index] for method, rows in results.items()}
        first = samples["sft"]
        lines += [f"Asked for: *{first['attribute']}*, article `{first['id']}` given.", ""]
        for method, sample in samples.items():
            lines += [f"{METHODS[method]}:", "", "```", sample["prediction"], "```", ""]
        lines += ["Reference:", "", "```", first["reference"], "```", ""]
    return "\n".join(lines)


def topic_section() -> str:
    """How many of the topics that are not in the corpus came out in style, and some outlines."""
    rows = _read("own_topics.json")["topics"]
    counts = []
    for method, name in METHODS.items():
        if method != "base":
            outlines = [(row["outlines"][method], row["style"]) for row in rows]
            counts.append(f"{name} {sum(o['valid'] and o['read_as'] == style for o, style in outlines)}")
    lines = [
        f"Of {len(rows)} outlines each, so many parse and read as the asked style: {', '.join(counts)}. By TKPO:",
        "",
    ]
    for index in OWN_TOPICS:
        row = rows[index]
        lines += [f"*{row['style']}*, “{row['topic']}”:", "", "```", row["outlines"]["tkpo"]["outline"], "```", ""]
    return "\n".join(lines)


def _read(name: str) -> dict:
    return json.loads((HERE / "results" / name).read_text(encoding="utf-8"))


def updated(readme: str) -> str:
    for mark, section in (("scores", score_section()), ("topics", topic_section()), ("outlines", outline_section())):
        start, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
        head, rest = readme.split(start, 1)
        readme = head + start + section + end + rest.split(end, 1)[1]
    return readme


def main() -> int:
    now = README.read_text(encoding="utf-8")
    fresh = updated(now)
    if "--check" in sys.argv[1:]:
        print("up to date" if fresh == now else "README.md differs from the results: run paper/readme_scores.py")
        return int(fresh != now)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
