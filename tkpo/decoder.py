"""What a decoder is to the generator: token ids and adapter names in, tokens and hidden states out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor


class Decoder(Protocol):
    """A base model with its adapters; each row of a batch uses an adapter of its own, any other name the base.

    Implementations: `tkpo.decoding.PackedDecoder` (Qwen2 on a CPU), `tkpo.generation.TransformersDecoder` (the rest).
    """

    @property
    def head_weight(self) -> Tensor:
        """The output head's weight, (V, H), in the dtype that it is stored in."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What the layers compute in."""
        ...

    def hidden_states(self, sequences: list[list[int]], adapters: list[str]) -> list[Tensor]:
        """Last hidden states, (T, H) each, of sequences of token ids."""
        ...

    def decode(
        self,
        prompts: list[list[int]],
        adapters: list[str],
        choose: Callable[[Tensor, list[int]], list[int]],
        end: int,
        max_new_tokens: int,
        check: Callable[[], bool] = lambda: False,
        slots: int | None = None,
        shared: list[int] | None = None,
        progress: Callable[[float], None] = lambda _: None,
    ) -> None:
        """Write after every prompt, until each row has ended with the token `end` or has `max_new_tokens`.

        prompts: token ids. adapters: one name per prompt.
        choose: given logits (n, V) and the n rows they belong to, returns their next tokens.
        check: asked before every step; once it is true, writing stops.
        slots: rows written at a time, default all.
        shared: leading tokens of each prompt that later prompts of this adapter will have too.
        progress: told the share of the prompts' tokens, 0 to 1, that has been read.
        """
        ...
