"""Rows in which samples share what they have in common: an article is read once for all its styles.

A row is `[prefix | branch 1 | … | branch n]`, several such groups one after the other. Every token has an article
number (its group) and a branch number: 0 in a prefix, else from 1 over the whole row. A token sees the earlier tokens
of its own branch and of its group's prefix, and positions go on from the prefix: hidden states, losses and gradients
are those of separate rows (the idea: arXiv 2410.20305, for pairs). Flipped branches go on from the same prefixes.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tkpo.errors import TKPOError
from tkpo.loss import IGNORE_INDEX

MIN_SHARE = 0.5  # samples are grouped where at least so much of their prompts is alike

# ---- grouping ------------------------------------------------------------------------------------------


def group_by_prefix(samples: list[dict], most: int) -> list[list[int]]:
    """Numbers of the samples that share their leading tokens, at most `most` per group, in the samples' order.

    samples: rows with `input_ids` and `labels`. Those that share most are joined first, and only where that saves
    tokens and at least half of every prompt is alike, whatever it holds: nothing is known of articles here.
    """
    order = sorted(range(len(samples)), key=lambda i: samples[i]["input_ids"])
    alike = [_alike(samples[i]["input_ids"], samples[j]["input_ids"]) for i, j in itertools.pairwise(order)]
    group_of = {place: [place] for place in range(len(order))}
    prefix_of = dict.fromkeys(group_of, 0)  # by a group's first place; not read for a group of one
    for place in sorted(range(len(alike)), key=lambda place: -alike[place]):
        left, right, shared = group_of[place], group_of[place + 1], alike[place]
        saved = sum((len(group) - 1) * prefix_of[group[0]] for group in (left, right))
        joined = left + right
        longest = max(_prompt_length(samples[order[i]]) for i in joined)
        if len(joined) <= most and shared >= MIN_SHARE * longest and (len(joined) - 1) * shared > saved:
            group_of.update(dict.fromkeys(joined, joined))
            prefix_of[joined[0]] = shared
    groups = {group[0]: sorted(order[i] for i in group) for group in group_of.values()}
    return sorted(groups.values())


def shared_length(samples: list[dict]) -> int:
    """Leading tokens that all samples and their flipped forms have in common, before the last of any prompt."""
    first = samples[0]["input_ids"]
    length = len(first)
    for sample in samples:
        for prefix in ("", "flipped_"):
            if f"{prefix}input_ids" in sample:
                length = min(length, _alike(first, sample[f"{prefix}input_ids"]), _prompt_length(sample, prefix) - 1)
    return length


def _alike(ours: list[int], theirs: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))


def _prompt_length(sample: dict, prefix: str = "") -> int:
    labels = sample[f"{prefix}labels"]
    return next((i for i, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


class SharedPrefixDataset(Dataset):
    """Encoded samples as micro-batches of whole groups, each a list of groups of rows.

    samples: rows of `encode_dataset`. batch_size: samples a micro-batch holds at most; groups are filled in as they
    come, so that one with fewer stands where the next group does not fit.
    """

    def __init__(self, samples, batch_size: int):
        if batch_size < 2:
            raise TKPOError(
                "share_prefix shares nothing with one sample per forward pass: raise per_device_train_batch_size "
                "(--micro-batch-size) to the number of styles, e.g. 4"
            )
        self.samples = samples
        self.batches: list[list[list[int]]] = []
        room = 0
        for group in group_by_prefix(list(samples), batch_size):
            if len(group) > room:
                self.batches.append([])
                room = batch_size
            self.batches[-1].append(group)
            room -= len(group)

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[list[dict]]:
        return [[self.samples[i] for i in group] for group in self.batches[number]]


# ---- rows ----------------------------------------------------------------------------------------------


def collate(batches: list[list[list[dict]]]) -> dict[str, Tensor]:
    """One row, (1, T), of all groups of the given micro-batches, and the flipped branches as another, (1, T').

    Returns input_ids, labels, position_ids, article_ids, branch_ids, and the same with `flipped_` before them where
    the samples have flipped forms.
    """
    groups = [group for batch in batches for group in batch]
    names = ("input_ids", "labels", "position_ids", "article_ids", "branch_ids")
    flips = "flipped_input_ids" in groups[0][0]
    columns: dict[str, list[int]] = {prefix + name: [] for prefix in ("", "flipped_")[: 1 + flips] for name in names}
    branch = 0

    def add(prefix: str, ids: list[int], labels: list[int], start: int, article: int, branch: int) -> None:
        length = len(ids)
        parts = (ids, labels, range(start, start + length), [article] * length, [branch] * length)
        for name, part in zip(names, parts, strict=True):
            columns[prefix + name] += part

    for article, group in enumerate(groups):
        shared = shared_length(group)
        add("", group[0]["input_ids"][:shared], [IGNORE_INDEX] * shared, 0, article, 0)
        for sample in group:
            branch += 1
            for prefix in ("", "flipped_")[: 1 + flips]:
                own = sample[f"{prefix}input_ids"][shared:], sample[f"{prefix}labels"][shared:]
                add(prefix, *own, shared, article, branch)
    return {name: torch.tensor([values]) for name, values in columns.items()}
