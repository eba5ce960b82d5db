"""The terms of the TKPO loss in the log of a Trainer that only knows `loss`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from tkpo.causal_lm import TKPOOutput
from tkpo.settings import TKPOSettings


class LossLog(TrainerCallback):
    """Adds the loss's terms, as TKPOTrainer names them, to each line that has a `loss`.

    For a patched model (`tkpo.causal_lm.patch`) under transformers' Trainer or LLaMA-Factory's. Each term is a mean
    over the sequences since the last line, of all processes.
    """

    def __init__(self, settings: TKPOSettings):
        self.terms = ["cross_entropy"]
        self.terms += ["preference", "reward", "accuracy"] if settings.preference_weight else []
        self.terms += ["contrast"] if settings.contrast_weight else []
        self._sums: Tensor | None = None  # of the terms and, last, of the sequences
        self._hook: Any = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._hook = base.register_forward_hook(self._add)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _add(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training or not isinstance(output, TKPOOutput):
            return
        count = torch.as_tensor(output.num_sequences, dtype=torch.float32, device=output.loss.device)
        terms = torch.stack([getattr(output, name).detach().float() for name in self.terms])
        new = torch.cat([terms * count, count.reshape(1)])
        self._sums = new if self._sums is None else self._sums + new

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self._sums is None or "loss" not in (logs or {}):
            return
        sums = self._sums
        self._sums = None
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        *terms, count = sums.tolist()
        means = {name: round(value / max(count, 1.0), 6) for name, value in zip(self.terms, terms, strict=True)}
        logs.update(means)
        state.log_history[-1].update(means)
