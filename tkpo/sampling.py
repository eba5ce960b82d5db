"""How the next token of each outline is chosen from its logits: settings, and the choice itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopPLogitsWarper

from tkpo.errors import TKPOError
from tkpo.loop_guard import LoopGuard

GUARDS = ("structure", "none")
MAX_NEW_TOKENS = 384
MAX_STYLE_STRENGTH = 10.0
TOP_P = 0.95  # of sampling without min-p


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of decoding. TKPOError for a value outside its range.

    max_new_tokens: of one outline, at most.
    temperature: 0 is greedy.
    min_p: with a temperature above 0, tokens less likely than this share of the likeliest one are not drawn (arXiv
        2407.01082); 0: top-p sampling with p = 0.95 instead.
    seed: the same seed draws the same outlines.
    guard: "structure" (`tkpo.loop_guard`) or "none".
    style_strength: γ of flip-guided decoding: the logits z become z + γ (z − z̃), with z̃ under the flipped prompt;
        classifier-free guidance (arXiv 2306.17806) with the flip as negative prompt. 0 is off and costs nothing.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    min_p: float = 0.0
    seed: int = 0
    guard: str = "structure"
    style_strength: float = 0.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise TKPOError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise TKPOError(f"temperature must be 0 (greedy) or more, not {self.temperature}")
        if not 0 <= self.min_p <= 1:
            raise TKPOError(f"min_p must be between 0 and 1, not {self.min_p}")
        if self.min_p and not self.temperature:
            raise TKPOError("min_p needs a temperature above 0: greedy decoding draws nothing")
        if not 0 <= self.seed < 2**63:
            raise TKPOError("seed must be between 0 and 2**63 - 1")
        if not 0 <= self.style_strength <= MAX_STYLE_STRENGTH:
            raise TKPOError(f"style_strength must be between 0 and {MAX_STYLE_STRENGTH:g}, not {self.style_strength}")
        if self.guard not in GUARDS:
            raise TKPOError(f"no guard {self.guard!r}; there are: {', '.join(GUARDS)}")

    def record(self) -> dict:
        """The settings as records of predictions hold them: the guard by its version, the seed only where it drew."""
        record = asdict(self) | {"decoding": "sampling" if self.temperature else "greedy"}
        record["guard"] = LoopGuard.name if self.guard == "structure" else self.guard
        if not self.temperature:
            for name in ("temperature", "min_p", "seed"):
                del record[name]
        return record


class Pick:
    """Chooses the next token of each outline from its logits, greedily or by drawing, and tells it to `told`."""

    def __init__(
        self, guard: LoopGuard, numbers: Sequence[int], settings: Decoding, told: Callable[[dict[int, int]], None]
    ):
        """numbers: of each outline, for its draws: what an outline draws does not depend on the others beside it."""
        rows = len(numbers)
        self._outlines = [guard.outline() for _ in range(rows)] if settings.guard == "structure" else None
        self._warp = _warpers(settings)
        self._generators = [torch.Generator().manual_seed((settings.seed + n) % 2**63) for n in numbers]
        self._told = told

    def __call__(self, logits: Tensor, rows: list[int]) -> list[int]:
        """logits: (n, V), of these outlines; they are changed."""
        if self._outlines:
            for logit, row in zip(logits, rows, strict=True):
                self._outlines[row].mask(logit)
        if self._warp:
            for warp in self._warp:
                logits = warp(None, logits)
            probs = logits.float().softmax(dim=-1).cpu()
            drawn = (torch.multinomial(p, 1, generator=self._generators[r]) for p, r in zip(probs, rows, strict=True))
            tokens = [int(token) for token in drawn]
        else:
            tokens = logits.argmax(dim=-1).tolist()
        if self._outlines:
            tokens = [self._outlines[row].settle(token) for row, token in zip(rows, tokens, strict=True)]
            for row, token in zip(rows, tokens, strict=True):
                self._outlines[row].add(token)
        self._told(dict(zip(rows, tokens, strict=True)))
        return tokens


class FlipGuided:
    """`Pick` on logits that are led away from the flipped prompt's.

    Rows 2i and 2i + 1 of the batch are outline i under its own and under the flipped prompt. Both go on with the same
    token, so that they begin and end together.
    """

    def __init__(self, pick: Pick, strength: float):
        self._pick = pick
        self._strength = strength

    def __call__(self, logits: Tensor, rows: list[int]) -> list[int]:
        """logits: (2n, V), of both rows of n outlines, side by side."""
        own, flipped = logits[0::2], logits[1::2]
        tokens = self._pick(own + self._strength * (own - flipped), [row // 2 for row in rows[0::2]])
        return [token for token in tokens for _ in range(2)]


def _warpers(settings: Decoding) -> list:
    if not settings.temperature:
        return []
    floor = MinPLogitsWarper(settings.min_p) if settings.min_p else TopPLogitsWarper(TOP_P)
    return [TemperatureLogitsWarper(float(settings.temperature)), floor]
