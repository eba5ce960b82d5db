"""What the loss can be told, with the defaults that the command line, TKPOConfig and LLaMA-Factory's section share.

Imports neither torch nor transformers, so that the command line can show the defaults at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tkpo.errors import TKPOError

if TYPE_CHECKING:
    from tkpo.flip import PromptFlipper

NO_FLIP = "no_flip"
SAMPLERS = (
    "multinomial",  # without replacement from the flipped prompt's distribution
    "gumbel",  # the same law by the Gumbel-top-k trick
    "topk",  # the K likeliest tokens
    "uniform",  # any tokens, with equal probability
    NO_FLIP,  # multinomial from the policy's own distribution: no flipped pass (ablation)
)
REDUCTIONS = ("log_mean", "mean_log")
CONTRAST_POSITIONS = (
    "uniform",  # every response token counts alike
    "total_variation",  # by how much the flip changes the next-token distribution there
)
CHUNK_SIZE = 128  # response positions whose logits exist at the same time


@dataclass
class TKPOSettings:
    """Hyperparameters of the loss and the flip that it needs.

    preference_weight: lambda; 0 is supervised fine-tuning and runs no flipped pass.
    tau: temperature of the Bradley-Terry preference. num_rejects: K, reject tokens per response position.
    sampler: one of `SAMPLERS`. reduction: one of `REDUCTIONS`. chunk_size: response positions per chunk of logits.
    contrast_weight: weight of the prompt contrast (`tkpo.loss.prompt_contrast_loss`), 0: none. contrast_beta: its
    inverse temperature. contrast_positions: one of `CONTRAST_POSITIONS`.
    flipper: needed when forward gets no flipped inputs.
    Raises TKPOError for a value outside its range.
    """

    preference_weight: float = 0.5
    tau: float = 0.15
    num_rejects: int = 20
    sampler: str = "multinomial"
    reduction: str = "log_mean"
    chunk_size: int = CHUNK_SIZE
    contrast_weight: float = 0.0
    contrast_beta: float = 0.1
    contrast_positions: str = "uniform"
    flipper: PromptFlipper | None = None

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise TKPOError(f"unknown sampler {self.sampler!r}; there are: {', '.join(SAMPLERS)}")
        if self.reduction not in REDUCTIONS:
            raise TKPOError(f"unknown reduction {self.reduction!r}; there are: {', '.join(REDUCTIONS)}")
        if not self.tau > 0:
            raise TKPOError(f"tau must be above 0, not {self.tau}")
        if not self.preference_weight >= 0:
            raise TKPOError(f"preference_weight (lambda) must not be negative, not {self.preference_weight}")
        if self.num_rejects < 1:
            raise TKPOError(f"num_rejects (K) must be at least 1, not {self.num_rejects}")
        if not self.contrast_weight >= 0:
            raise TKPOError(f"contrast_weight must not be negative, not {self.contrast_weight}")
        if not self.contrast_beta > 0:
            raise TKPOError(f"contrast_beta must be above 0, not {self.contrast_beta}")
        if self.contrast_positions not in CONTRAST_POSITIONS:
            known = ", ".join(CONTRAST_POSITIONS)
            raise TKPOError(f"unknown contrast_positions {self.contrast_positions!r}; there are: {known}")

    def check_vocabulary(self, size: int) -> None:
        """TKPOError if a vocabulary of `size` tokens has not K beside the gold one."""
        if self.preference_weight and self.num_rejects >= size:
            raise TKPOError(
                f"num_rejects (K) is {self.num_rejects}, but the model's vocabulary has only {size} tokens: lower it"
            )

    @property
    def flips(self) -> bool:
        """Whether a step needs the flipped prompt."""
        return self.draws_from_flip or bool(self.contrast_weight)

    @property
    def draws_from_flip(self) -> bool:
        """Whether rejects are drawn under the flipped prompt."""
        return bool(self.preference_weight) and self.sampler != NO_FLIP
