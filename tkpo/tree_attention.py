"""Attention over rows with shared prefixes (`tkpo.shared_prefix`): who sees whom, in each attention's own form.

On a CPU a prefix and each branch are attended apart, so that nothing is computed between branches; FlexAttention skips
such blocks; any other attention that takes a mask takes the whole one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tkpo.errors import TKPOError

NAME = "tkpo_tree"
BLOCK = 128  # FlexAttention's block size

Numbers = tuple[Tensor, Tensor]  # article numbers and branch numbers, one of each per token


def check_attention(model) -> None:
    """TKPOError if the model's attention cannot take the mask."""
    kind = model.config._attn_implementation
    if kind not in ("sdpa", "eager", "flex_attention"):
        raise TKPOError(
            "share_prefix needs an attention that takes any mask: attn_implementation sdpa (CPU), flex_attention (GPU) "
            f"or eager, not {kind}"
        )


@contextlib.contextmanager
def tree_attention(model, queries: Numbers, keys: Numbers) -> Iterator[dict]:
    """What to call the decoder with, so that `queries` see what they may of `keys`, whose end they are."""
    config, mask = model.get_decoder().config, attention_mask(model, queries, keys)
    apart = config._attn_implementation == "sdpa" and queries[0].device.type == "cpu"
    if not apart or (model.training and is_checkpointed(model)):  # layers are run again, outside of this context
        yield {"attention_mask": mask}
        return
    config._attn_implementation = NAME
    try:
        yield {"attention_mask": mask, "tree": parts(queries, keys)}
    finally:
        config._attn_implementation = "sdpa"


def attention_mask(model, queries: Numbers, keys: Numbers):
    """The mask of `queries` over `keys`, as the model's attention takes it.

    Returns (1, 1, Q, K): bool for SDPA, 0 and the dtype's lowest number for eager; a BlockMask, whose empty blocks are
    skipped, for FlexAttention.
    """
    kind = model.config._attn_implementation
    shape = {"Q_LEN": len(queries[0]), "KV_LEN": len(keys[0])}
    past = shape["KV_LEN"] - shape["Q_LEN"]
    if kind == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        # Kernels ask about whole blocks, beyond the ends too.
        queries, keys = ([_padded(numbers, BLOCK) for numbers in pair] for pair in (queries, keys))

        def sees(batch, head, query, key):
            return _sees(queries, keys, query, key, past)

        return create_block_mask(sees, None, None, **shape, device=queries[0].device)
    rows = torch.arange(shape["Q_LEN"], device=queries[0].device).unsqueeze(1)
    columns = torch.arange(shape["KV_LEN"], device=queries[0].device).unsqueeze(0)
    mask = _sees(queries, keys, rows, columns, past)[None, None]
    if kind == "eager":
        lowest = torch.finfo(model.dtype).min
        return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(~mask, lowest)
    return mask


def _padded(numbers: Tensor, multiple: int) -> Tensor:
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % multiple), value=-1)


def _sees(queries: Numbers, keys: Numbers, query, key, past: int):
    same = queries[0][query] == keys[0][key]
    return same & (key <= query + past) & ((keys[1][key] == 0) | (keys[1][key] == queries[1][query]))


def is_checkpointed(model) -> bool:
    """Whether gradient checkpointing is on; transformers has renamed its flag."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    return bool(next((getattr(model, name) for name in names if hasattr(model, name)), False))


# ---- apart, on a CPU -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A run of queries of one prefix or branch, and the runs of keys that they see, the last of them causally."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor | None  # (q, k); None: causal


def parts(queries: Numbers, keys: Numbers) -> list[Part]:
    """The runs of `queries`, in order, with what each sees of `keys`."""
    runs = _runs(keys)
    found = []
    for (article, branch), own in _runs(queries).items():
        seen = [runs[article, branch]]
        if branch and (article, 0) in runs:
            seen.insert(0, runs[article, 0])
        before = seen[0].stop - seen[0].start if len(seen) > 1 else 0
        length = own.stop - own.start
        mask = torch.ones(length, before + length, dtype=torch.bool).tril(before) if before else None
        found.append(Part(own, tuple(seen), mask))
    return found


def _runs(numbers: Numbers) -> dict[tuple[int, int], slice]:
    """Where each (article, branch) stands: each is one run."""
    runs, start = {}, 0
    for pair, tokens in itertools.groupby(zip(*(n.tolist() for n in numbers), strict=True)):
        length = sum(1 for _ in tokens)
        runs[pair] = slice(start, start + length)
        start += length
    return runs


def _attend(module, query, key, value, attention_mask, dropout=0.0, scaling=None, tree=None, **kwargs):
    """Attention part by part; as transformers' own where a model does not pass the parts on.

    query (1, heads, Q, D); key, value (1, key heads, K, D). Returns ((1, Q, heads, D), None).
    """
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    repeats = query.shape[1] // key.shape[1]
    key, value = (x if repeats == 1 else x.repeat_interleave(repeats, dim=1) for x in (key, value))
    outputs = []
    for part in tree:
        own = query[:, :, part.queries]
        seen = [torch.cat([x[:, :, s] for s in part.keys], dim=2) for x in (key, value)]
        options = {"attn_mask": part.mask, "is_causal": part.mask is None, "dropout_p": dropout, "scale": scaling}
        outputs.append(torch.nn.functional.scaled_dot_product_attention(own, *seen, **options))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, _attend)
