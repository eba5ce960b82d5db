"""Qwen2 whose forward returns the TKPO loss in training.

`TKPOQwen2ForCausalLM` is Qwen2ForCausalLM with another forward; `patch_qwen2` gives that forward to every
Qwen2ForCausalLM of the running process and returns its undo. No file of transformers is touched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import Qwen2ForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast

from tkpo.errors import TKPOError
from tkpo.loss import IGNORE_INDEX, TKPOLoss, fused_reject_tokens, tkpo_loss
from tkpo.settings import TKPOSettings


@dataclass
class TKPOOutput(CausalLMOutputWithPast):
    """Scalars of `tkpo.loss.TKPOLoss` beside `loss`; `logits` stays None, it never exists as a whole."""

    cross_entropy: Tensor | None = None
    preference: Tensor | None = None
    reward: Tensor | None = None
    accuracy: Tensor | None = None
    num_sequences: Tensor | None = None


def _forward(
    self,
    plain_forward: Callable,
    input_ids=None,
    attention_mask=None,
    *args,
    labels=None,
    flipped_input_ids=None,
    flipped_attention_mask=None,
    flipped_labels=None,
    num_sequences=None,
    **kwargs,
):
    """Qwen2's forward; with `labels` (B, T), in training or with flipped inputs, the TKPO loss instead.

    labels, flipped_labels: as transformers has them, `labels[:, t]` is the token at `input_ids[:, t]`, -100
    outside the response. flipped_*: (B, T'), may have another length and padding than the true inputs; the
    i-th response token of a row matches the i-th of its flipped row. num_sequences: see `tkpo.loss.tkpo_loss`.
    """
    settings = self.tkpo
    flipped = flipped_input_ids is not None
    if labels is None or settings is None or not (self.training or flipped):
        return plain_forward(self, input_ids, attention_mask, *args, labels=labels, **kwargs)
    if input_ids is None or args or kwargs.get("past_key_values") is not None:
        raise TKPOError("TKPO trains from input_ids and labels given by name, without past_key_values")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise TKPOError("TKPO needs a 2-D attention_mask; turn sequence packing (neat_packing) off")
    kwargs = {k: v for k, v in kwargs.items() if k not in ("use_cache", "logits_to_keep", "num_items_in_batch")}
    if hasattr(self.lm_head, "lora_A"):
        raise TKPOError("an adapter on lm_head would not be seen: take lm_head out of target_modules")
    draw = {"num_rejects": settings.num_rejects, "chunk_size": settings.chunk_size}
    flips = settings.flips
    shared = 0
    if flips:
        if not flipped:
            if settings.flipper is None:
                raise TKPOError("no flipped inputs were given and TKPOSettings has no flipper: give it a PromptFlipper")
            flipped_input_ids, flipped_attention_mask, flipped_labels = settings.flipper.flip_batch(
                input_ids, labels, attention_mask
            )
        targets = _shift(flipped_labels)
        if _can_share(self.model, kwargs):
            shared = _count_shared(
                (input_ids, attention_mask), (flipped_input_ids, flipped_attention_mask), targets == IGNORE_INDEX
            )
    true = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=shared > 0, **kwargs)
    hidden = true.last_hidden_state
    rejects = None
    if flips:
        cache = true.past_key_values if shared else None
        for layer in cache.layers if shared else ():
            layer.keys, layer.values = layer.keys[:, :, :shared].detach(), layer.values[:, :, :shared].detach()
        with torch.no_grad():
            states = self.model(
                input_ids=flipped_input_ids[:, shared:],
                attention_mask=flipped_attention_mask,
                past_key_values=cache,
                use_cache=shared > 0,
            ).last_hidden_state
        targets = targets[:, shared:]
        rejects = _through_head(
            self.lm_head, states, lambda h, w: fused_reject_tokens(h, targets, w, sampler=settings.sampler, **draw)
        )
    elif settings.preference_weight:
        rejects = _through_head(
            self.lm_head, hidden.detach(), lambda h, w: fused_reject_tokens(h, _shift(labels), w, **draw)
        )
    options = {name: getattr(settings, name) for name in ("tau", "reduction", "preference_weight", "chunk_size")}

    def terms(h, w):
        result = tkpo_loss(h, _shift(labels), w, rejects, num_sequences=num_sequences, **options)
        return tuple(getattr(result, f.name) for f in fields(TKPOLoss))

    result = TKPOLoss(*_through_head(self.lm_head, hidden, terms))
    return TKPOOutput(**vars(result))


def _can_share(model: torch.nn.Module, kwargs: dict) -> bool:
    """Whether the flipped pass may go on from keys and values of the true one: all kept, at positions 0, 1, …"""
    checkpointed = model.training and model.gradient_checkpointing
    return not checkpointed and not model.has_sliding_layers and kwargs.get("position_ids") is None


def _count_shared(true: tuple, flipped: tuple, unused: Tensor) -> int:
    """Leading columns in which two batches (ids, mask or None) are alike, and whose states are unused (B, T')."""
    length = min(true[0].shape[1], flipped[0].shape[1]) - 1
    masks = [torch.ones_like(ids) if mask is None else mask for ids, mask in (true, flipped)]
    alike = unused[:, :length].clone()
    for ours, theirs in ((true[0], flipped[0]), masks):
        alike &= ours[:, :length] == theirs[:, :length]
    return int(alike.all(dim=0).long().cumprod(dim=0).sum())


def _through_head(head: torch.nn.Module, states: Tensor, function: Callable):
    """`function(states, head.weight)`, run as the forward of the output head.

    What partitions weights (DeepSpeed ZeRO-3) gathers them in hooks around each module's forward and backward, and
    takes their gradients there: called this way, the head is gathered while the loss needs it, tied to the
    embedding or not. The hooks see tensors and tuples of tensors only.
    """
    own = vars(head).get("forward")
    head.forward = lambda states: function(states, head.weight)
    try:
        return head(states)
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _shift(labels: Tensor) -> Tensor:
    """Labels aligned with the states that predict them; the last state predicts nothing."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


class TKPOQwen2ForCausalLM(Qwen2ForCausalLM):
    """Qwen2 that trains with TKPO; set `model.tkpo = TKPOSettings(...)`.

    In eval mode, without labels, or with `tkpo` None it is plain Qwen2.
    """

    tkpo: TKPOSettings | None = None
    # The loss is a mean over sequences: trainers divide it by their accumulation steps themselves.
    accepts_loss_kwargs = False

    def forward(self, input_ids=None, attention_mask=None, *args, **kwargs):
        return _forward(self, Qwen2ForCausalLM.forward, input_ids, attention_mask, *args, **kwargs)

    # Trainer and generate() read there what forward takes: labels, position_ids, logits_to_keep.
    forward.__signature__ = inspect.signature(Qwen2ForCausalLM.forward)

    def save_pretrained(self, *args, **kwargs):
        """Save as the plain Qwen2ForCausalLM it is: tools know a model by the class named in config.json."""
        own = type(self)
        self.__class__ = Qwen2ForCausalLM
        try:
            self.save_pretrained(*args, **kwargs)
        finally:
            self.__class__ = own

    @classmethod
    def adopt(cls, model: Qwen2ForCausalLM, settings: TKPOSettings) -> TKPOQwen2ForCausalLM:
        """Turn a loaded Qwen2ForCausalLM into this class, in place."""
        if not isinstance(model, Qwen2ForCausalLM):
            raise TKPOError(f"TKPO is written for Qwen2ForCausalLM, this model is {type(model).__name__}")
        model.__class__ = cls
        model.tkpo = settings
        return model


def patch_qwen2(settings: TKPOSettings) -> Callable[[], None]:
    """Give every Qwen2ForCausalLM of this process the TKPO forward; returns the function that undoes it.

    For trainers that only know `labels`, such as LLaMA-Factory's SFT stage: `settings.flipper` flips the
    prompts inside forward. Patching twice is an error; undoing twice does nothing.
    """
    if "tkpo" in vars(Qwen2ForCausalLM):
        raise TKPOError("Qwen2ForCausalLM is patched already: undo that patch first")
    if settings.flipper is None and settings.flips:
        raise TKPOError("patch_qwen2 needs settings with a flipper")
    plain = Qwen2ForCausalLM.forward

    def forward(self, input_ids=None, attention_mask=None, *args, **kwargs):
        return _forward(self, plain, input_ids, attention_mask, *args, **kwargs)

    forward.__signature__ = inspect.signature(plain)
    Qwen2ForCausalLM.forward = forward
    Qwen2ForCausalLM.tkpo = settings
    Qwen2ForCausalLM.accepts_loss_kwargs = False

    def undo() -> None:
        if Qwen2ForCausalLM.forward is forward:
            Qwen2ForCausalLM.forward = plain
            del Qwen2ForCausalLM.tkpo, Qwen2ForCausalLM.accepts_loss_kwargs

    return undo
