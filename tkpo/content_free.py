"""Outlines that say nothing about the article, as pseudo-methods: what a score is worth is seen beside theirs."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tkpo.errors import TKPOError

NUMBERS_ONLY = "\n".join(f"{number}. x" for number in range(1, 6))


def content_free(records: Sequence[dict], train_records: Sequence[dict], seed: int = 0) -> dict[str, list[str]]:
    """{pseudo-method: one outline per record}.

    Args:
        records: the records to "predict", with `lang` and `attribute`.
        train_records: the training split, with `lang`, `attribute` and `output`.
        seed: of the draws.

    Returns:
        numbers_only: five numbered headings "x".
        random_outline: a training outline of the same language and attribute, another draw for each record.
        constant_outline: one training outline for all records of a language.

    Raises:
        TKPOError: where the training records have no outline in a record's language and attribute.
    """
    rng = random.Random(seed)
    pools: dict[tuple[str, str], list[str]] = {}
    for record in train_records:
        pools.setdefault((record["lang"], record["attribute"]), []).append(record["output"])
    for record in records:
        if (record["lang"], record["attribute"]) not in pools:
            raise TKPOError(f"no training outline in language {record['lang']!r} for {record['attribute']!r}")
    of_language = {
        lang: rng.choice([outline for key, pool in sorted(pools.items()) if key[0] == lang for outline in pool])
        for lang in sorted({lang for lang, _ in pools})
    }
    return {
        "numbers_only": [NUMBERS_ONLY for _ in records],
        "random_outline": [rng.choice(pools[record["lang"], record["attribute"]]) for record in records],
        "constant_outline": [of_language[record["lang"]] for record in records],
    }
