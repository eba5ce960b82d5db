"""Subsets of records by whole articles, balanced over language, length and form."""

from __future__ import annotations

import hashlib
import math

from tkpo.errors import TKPOError
from tkpo.outline import length

LONG_FROM = {"en": 400, "zh": 700}  # words; characters other than white space


def corpus_length(article: dict) -> str:
    """ "long" for an article of the corpus files `*-long-*`, else "short"."""
    return "long" if "-long-" in str(article.get("id")) else "short"


def article_length(record: dict) -> str:
    """ "short" or "long": a record's own `length`, else by its input (long from 400 words or 700 characters)."""
    if record.get("length"):
        return record["length"]
    lang = record.get("lang", "en")
    return "long" if length(record.get("input") or "", lang) >= LONG_FROM[lang] else "short"


def balanced_subset(
    records: list[dict],
    number_of_articles: int,
    *,
    share_long: float = 1 / 3,
    share_zh: float = 1 / 2,
    share_topic: float | None = None,
) -> list[dict]:
    """The records of some articles, in their order: every style and form of an article that is taken.

    Articles are picked by hash of their id, so the same ones whatever the method, seed or order of `records`. Where a
    share asks for more articles than there are, the other kind fills the gap: first within a language, then across.

    records: annotated records; those with one `id` are one article.
    number_of_articles: how many to take; all of them if there are no more.
    share_long: share of long articles within each language.
    share_zh: share of Chinese articles.
    share_topic: share of articles whose records carry the topic alone; None: as among all articles of the same
        language and length.

    Raises:
        TKPOError: if number_of_articles is below 1 or a share is outside 0…1.
    """
    if number_of_articles < 1:
        raise TKPOError(f"number_of_articles must be at least 1, not {number_of_articles}")
    for name, share in (("share_long", share_long), ("share_zh", share_zh), ("share_topic", share_topic)):
        if share is not None and not 0 <= share <= 1:
            raise TKPOError(f"{name} must be within 0…1, not {share}")
    articles: dict[str, list[dict]] = {}
    for record in records:
        articles.setdefault(str(record["id"]), []).append(record)
    ids = sorted(articles, key=lambda article: hashlib.sha256(article.encode()).digest())
    kinds = {
        article: (rows[0]["lang"], article_length(rows[0]), all(r["form"] == "topic" for r in rows))
        for article, rows in articles.items()
    }
    shares = ({"zh": share_zh}, {"long": share_long}, None if share_topic is None else {True: share_topic})
    chosen = set(_pick(ids, kinds, number_of_articles, shares))
    return [record for record in records if str(record["id"]) in chosen]


def _pick(ids: list[str], kinds: dict[str, tuple], count: int, shares: tuple, level: int = 0) -> list[str]:
    """`count` of `ids`, split by what `kinds` says on each level in turn."""
    if level == len(shares):
        return ids[:count]
    groups: dict = {}
    for article in ids:
        groups.setdefault(kinds[article][level], []).append(article)
    sizes = {kind: len(groups[kind]) for kind in sorted(groups)}
    if shares[level] is None:
        weights = sizes
    else:
        ((named, share),) = shares[level].items()
        weights = {kind: share if kind == named else 1 - share for kind in sizes}
    counts = _allot(count, weights, sizes)
    return [a for kind, group in groups.items() for a in _pick(group, kinds, counts[kind], shares, level + 1)]


def _allot(total: int, weights: dict, sizes: dict) -> dict:
    """`total` over the kinds by weight (largest remainders), none above its size; what one lacks the others get."""
    total = min(total, sum(sizes.values()))
    counts = dict.fromkeys(sizes, 0)
    while left := total - sum(counts.values()):
        open_kinds = [kind for kind in sizes if counts[kind] < sizes[kind]]
        weight = sum(weights[kind] for kind in open_kinds)
        due = {kind: left * (weights[kind] / weight if weight else 1 / len(open_kinds)) for kind in open_kinds}
        given = {kind: math.floor(due[kind]) for kind in open_kinds}
        by_remainder = sorted(open_kinds, key=lambda kind: given[kind] - due[kind])
        for kind in by_remainder[: left - sum(given.values())]:
            given[kind] += 1
        for kind, number in given.items():
            counts[kind] = min(sizes[kind], counts[kind] + number)
    return counts
