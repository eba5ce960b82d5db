"""Write the stored examples of the page: `python app/make_examples.py`, again after every change of an adapter.

Takes articles and topics that no method was trained on (the data sets' test split), has every method outline them, and
keeps those on which the methods differ most and the trained ones do well: one for each style and language first, at
least half of them with an article. The first example of each language also gets its token preferences.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from app.examples import FILE, Example, Examples  # noqa: E402
from app.jobs import Column  # noqa: E402
from app.main import adapter_folders  # noqa: E402
from app.preferences import token_preferences  # noqa: E402
from app.queries import Query  # noqa: E402
from app.service import DATA, OutlineService  # noqa: E402
from tkpo.attributes import LANGUAGES  # noqa: E402
from tkpo.data import load_records  # noqa: E402

CHIPS = 6  # examples to keep
TOKENS = 160  # of an outline
TOPIC = {"en": "Topic: ", "zh": "主题："}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="qwen2.5-coder-0.5b")
    parser.add_argument("--adapters", nargs="+", metavar="[AXIS/]METHOD=FOLDER", help="default: the shipped ones")
    parser.add_argument("--per-style", type=int, default=2, metavar="N", help="articles tried per style and language")
    parser.add_argument("--output", type=Path, default=FILE)
    args = parser.parse_args()
    service = OutlineService(args.model, adapter_folders(args.adapters))
    service.judge.fit()
    service._load()
    tried = []
    for query in candidates(service, args.per_style):
        example = write(service, query)
        tried.append(example)
        print(f"{worth(example):+6.1f}  {example.lang} {example.style:14} {example.topic[:60]}", flush=True)
    kept = choose(tried, CHIPS)
    firsts = {next(i for i, e in enumerate(kept) if e.lang == lang) for lang in {e.lang for e in kept}}
    kept = [with_preferences(service, e) if i in firsts else e for i, e in enumerate(kept)]
    Examples(kept).save(args.output, args.model, service.adapters)
    print(f"{args.output}: {len(kept)} examples, {args.output.stat().st_size / 1000:.0f} kB")
    return 0


def candidates(service: OutlineService, per_style: int) -> list[Query]:
    """Articles of the test split, `per_style` per style and language, no article twice; every third without its text.

    A topic alone is what a hurried visitor types; the article is the method's own task.
    """
    found, used, count = [], set(), itertools.count()
    for lang, (style, axis) in itertools.product(LANGUAGES, service.axes.items()):
        records = load_records(axis.name, "test", lang, folder=DATA)
        articles = {r["id"]: r["input"] for r in records if r["form"] == "article"}
        topics = {r["id"]: r["input"].removeprefix(TOPIC[lang]).strip() for r in records if r["form"] == "topic"}
        own = [i for i in topics if i in articles and i not in used]
        own = sorted(own, key=lambda i: hashlib.sha256(i.encode()).digest())[:per_style]
        used.update(own)
        for i in own:
            article = articles[i].split("\n\n", 1)[1] if lang == "en" else articles[i]
            if next(count) % 3 == 2:
                article = ""
            found.append(service.check(topics[i], article, style, lang, length=TOKENS))
    return found


def write(service: OutlineService, query: Query) -> Example:
    """The example of a query: every method's outline, greedily, and the verdict on it."""
    methods = service.columns(query.style)
    adapters = [service.adapter(method, query.style) for method in methods]
    texts = list(service.generator.stream([query.record()] * len(methods), adapters, max_new_tokens=query.tokens))[-1]
    columns = [
        Column(
            m,
            query.style,
            text,
            at_limit=not ended,
            verdict=service.judge.judge(text, query.style, query.lang, query.article),
        )
        for m, text, ended in zip(methods, texts, texts.finished, strict=True)
    ]
    return Example(query.topic, query.article, query.style, query.lang, query.tokens, columns)


def worth(example: Example) -> float:
    """What an example is worth: style, level and soundness of the trained methods, and differences."""
    base, *trained = example.columns
    score = 0.0
    for column in trained:
        verdict = column.verdict
        good = verdict.well_formed and not verdict.repeats and not column.at_limit
        score += (1 if good else -3) + (1 if verdict.level else 0)
        score += max(-3.0, min(3.0, verdict.log_odds or 0.0)) / 3
    last = trained[-1].verdict if trained else base.verdict
    score += 2 if last.well_formed and last.level and (last.log_odds or 0) > 0 and not last.repeats else -4
    score += (max(-3.0, min(3.0, (last.log_odds or 0.0))) - max(-3.0, min(3.0, (base.verdict.log_odds or 0.0)))) / 3
    score -= 2 * (len(example.columns) - len({column.text for column in example.columns}))  # the same, word for word
    return score


def choose(tried: list[Example], count: int) -> list[Example]:
    """The worthiest `count`, at least half with an article and both languages among them, no style thrice."""
    ranked = sorted(tried, key=worth, reverse=True)
    kept: list[Example] = []
    plain = 0
    for example in ranked:
        languages = sum(e.lang == example.lang for e in kept)
        if len(kept) == count or languages >= (2 * count + 2) // 3 or sum(e.style == example.style for e in kept) >= 2:
            continue
        if not example.article:
            if plain == count // 2:
                continue
            plain += 1
        kept.append(example)
    return sorted(kept, key=lambda e: (e.lang != "en", not e.article, -worth(e)))


def with_preferences(service: OutlineService, example: Example) -> Example:
    """The example with the token preferences of its last method's outline."""
    last = example.columns[-1]
    query = example.update(service.axes).query
    adapter = service.adapter(last.method, example.style)
    result = token_preferences(service.generator, query.record(), service.axes[example.style], last.text, adapter)
    return replace(example, inspected=last.method, preferences=result)


if __name__ == "__main__":
    sys.exit(main())
