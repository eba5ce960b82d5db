"""Outlines by SFT, DPO and TKPO for twenty topics that are not in the corpus → results/own_topics.json.

    python -m paper.own_topics

Each is judged as `tkpo evaluate` judges a test sample: does it parse, does it keep to the asked style's headings, and
which style does the classifier read it as.
"""

import json
from pathlib import Path

from tkpo.attributes import get_axis
from tkpo.data import load_records, make_record
from tkpo.environment import environment
from tkpo.generation import OutlineGenerator
from tkpo.metrics import StyleClassifier
from tkpo.outline import is_valid, obeys_detail, parse

HERE = Path(__file__).parent
METHODS = ("sft", "dpo", "tkpo")
MAX_NEW_TOKENS = 224
TOPICS = {
    ("language_style", "literary"): (
        "The night trains of Eastern Europe",
        "Why old maps show sea monsters",
        "A grandmother's button box",
        "How glaciers carve a valley",
        "城市屋顶上的菜园",
    ),
    ("language_style", "objective"): (
        "How a mechanical typewriter prints a letter",
        "The return of wolves to farming country",
        "Why traffic jams appear out of nowhere",
        "How a museum decides what to display",
        "高铁如何改变小县城",
    ),
    ("level_of_detail", "comprehensive"): (
        "How a city keeps its drinking water safe",
        "What happens when a language dies",
        "The life cycle of a smartphone battery",
        "How volunteers map a disaster zone",
        "方言保护面临的难题",
    ),
    ("level_of_detail", "concise"): (
        "How vaccines train the immune system",
        "Why bread rises",
        "Choosing a first telescope",
        "Preparing a house for an earthquake",
        "手机摄影的构图方法",
    ),
}


def main() -> None:
    rows = []
    for axis_name in ("language_style", "level_of_detail"):
        axis = get_axis(axis_name)
        asked = [(style, topic) for (name, style), topics in TOPICS.items() if name == axis_name for topic in topics]
        records = [make_record(axis, style, topic) for style, topic in asked]
        folders = {method: HERE / "checkpoints" / axis_name / method for method in METHODS}
        generator = OutlineGenerator("qwen2.5-coder-0.5b", folders)
        batch = [record for record in records for _ in METHODS]
        texts = iter(generator.generate(batch, list(METHODS) * len(records), max_new_tokens=MAX_NEW_TOKENS))
        classifiers = {lang: _classifier(axis_name, lang) for lang in ("en", "zh")}
        for record, (style, topic) in zip(records, asked, strict=True):
            lang = record["lang"]
            outlines = {method: _judge(next(texts), style, lang, classifiers[lang]) for method in METHODS}
            rows.append({"axis": axis_name, "style": style, "lang": lang, "topic": topic, "outlines": outlines})
        del generator  # one base model in memory at a time
    result = {"environment": environment(), "max_new_tokens": MAX_NEW_TOKENS, "decoding": "greedy", "topics": rows}
    path = HERE / "results" / "own_topics.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for method in METHODS:
        good = sum(
            row["outlines"][method]["valid"] and row["outlines"][method]["read_as"] == row["style"] for row in rows
        )
        print(f"{method}: {good} of {len(rows)} parse and read as the asked style")


def _classifier(axis: str, lang: str) -> StyleClassifier:
    train = load_records(axis, "train", lang)
    return StyleClassifier(lang).fit([r["output"] for r in train], [r["attribute"] for r in train])


def _judge(text: str, style: str, lang: str, classifier: StyleClassifier) -> dict:
    valid = is_valid(text)
    return {
        "outline": text,
        "valid": valid,
        "obeys_detail": valid and obeys_detail(parse(text), style, lang),
        "read_as": classifier.predict([text])[0] if text.strip() else None,
    }


if __name__ == "__main__":
    main()
