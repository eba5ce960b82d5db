"""The TKPO loss inside any decoder-only model of transformers: `patch(model, settings)` and its undo.

A patched model's forward returns the TKPO loss in training, so that any trainer that only knows `labels` trains with
it. No file of transformers is touched, and the model is saved as the plain class that it is.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from tkpo.errors import TKPOError
from tkpo.loss import IGNORE_INDEX, TKPOLoss, fused_reject_tokens, tkpo_loss
from tkpo.settings import TKPOSettings
from tkpo.tree_attention import check_attention, is_checkpointed, tree_attention

OWN_KEYWORDS = ("flipped_input_ids", "flipped_attention_mask", "flipped_labels", "num_sequences")
TREE_KEYWORDS = ("article_ids", "branch_ids", "flipped_position_ids", "flipped_article_ids", "flipped_branch_ids")
UNREAD = ("use_cache", "logits_to_keep", "num_items_in_batch", "fused_lm_head")


@dataclass
class TKPOOutput(CausalLMOutputWithPast):
    """Scalars of `tkpo.loss.TKPOLoss` beside `loss`; `logits` stays None, it never exists as a whole."""

    cross_entropy: Tensor | None = None
    preference: Tensor | None = None
    contrast: Tensor | None = None
    reward: Tensor | None = None
    accuracy: Tensor | None = None
    num_sequences: Tensor | None = None
    aux_loss: Tensor | None = None
    # What TRL's SFTTrainer reads of its fused head: per position of `labels` without the first.
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None


# ---- the patch -----------------------------------------------------------------------------------------


def patch(target: PreTrainedModel | type[PreTrainedModel], settings: TKPOSettings | None) -> Callable[[], None]:
    """Give a causal LM, or every model of a class, the TKPO forward; returns the function that undoes it.

    target: a model of transformers that has `get_decoder()` and `get_output_embeddings()`, or its class. A PEFT model
        is patched at its base: `patch(peft_model.get_base_model(), settings)`, before or after PEFT wraps it. For TRL's
        SFTTrainer, patch `trainer.model` (its base, with PEFT) once the trainer is made: it replaces the model's
        forward when it is made.
    settings: the loss's hyperparameters; None leaves the model as it is until `model.tkpo` is set. For a trainer that
        knows only `labels` they need a flipper, which finds the attribute in `input_ids`.

    In training, or given flipped inputs, a patched model returns the loss (`TKPOOutput`); without labels, in eval mode
    or with `tkpo` None it is the plain model. Patching twice is an error; undoing twice does nothing.
    Raises TKPOError for a model whose logits the loss cannot rebuild from its hidden states.
    """
    is_class = isinstance(target, type)
    name = target.__name__ if is_class else type(target).__name__
    _check_target(target, name, settings)
    own = "forward" in vars(target)
    plain = target.forward
    call_plain = plain if is_class else lambda _, *args, **kwargs: plain(*args, **kwargs)

    inside = []  # not empty while a patched forward runs

    def forward(self, input_ids=None, attention_mask=None, *args, **kwargs):
        inside.append(True)
        try:
            return _forward(self, call_plain, input_ids, attention_mask, *args, **kwargs)
        finally:
            inside.pop()

    def check_inside(decoder, _):
        if decoder.training and torch.is_grad_enabled() and not inside:
            raise TKPOError(
                f"a trainer has replaced the patched forward of this {name} and would train without the TKPO loss: "
                "patch the model after the trainer is made (with TRL's SFTTrainer, `patch(trainer.model, settings)`)"
            )

    # Trainer and generate() read there what forward takes: labels, position_ids, logits_to_keep.
    unbound = plain if is_class else getattr(plain, "__func__", plain)
    functools.update_wrapper(forward, unbound)
    forward.__signature__ = inspect.signature(unbound)
    new = forward if is_class else types.MethodType(forward, target)
    target.forward = new
    target.tkpo = settings
    # The loss is a mean over sequences: trainers divide it by their accumulation steps themselves.
    target.accepts_loss_kwargs = False
    guard = None if is_class else target.get_decoder().register_forward_pre_hook(check_inside)

    def undo() -> None:
        if vars(target).get("forward") is not new:
            return
        if guard is not None:
            guard.remove()
        if own:
            target.forward = plain
        else:
            del target.forward
        del target.tkpo, target.accepts_loss_kwargs

    return undo


def _check_target(target: PreTrainedModel | type[PreTrainedModel], name: str, settings: TKPOSettings | None) -> None:
    """TKPOError, by `name`, unless the model or class can be patched."""
    if "tkpo" in vars(target):
        raise TKPOError(f"{name} is patched already: undo that patch first")
    for method in ("get_decoder", "get_output_embeddings"):
        if not hasattr(target, method):
            raise TKPOError(f"TKPO trains causal language models of transformers; {name} has no {method}()")
    if isinstance(target, type) and settings and settings.flips and settings.flipper is None:
        raise TKPOError("a patched class needs settings with a flipper: its trainers give no flipped inputs")
    if not isinstance(target, type):
        check_covered(target)


def check_covered(model: PreTrainedModel) -> None:
    """TKPOError, by name, for a model whose logits are not its head's product of the decoder's states.

    Known scales and soft caps count (`_head_of`). A model on the meta device or with partitioned weights is not tried.
    """
    head = model.get_output_embeddings()
    name = type(model).__name__
    if head is None or model.get_decoder() is model:
        raise TKPOError(f"{name} has no output head apart from its decoder: TKPO cannot rebuild its logits")
    if getattr(head, "bias", None) is not None:
        raise TKPOError(f"{name}'s output head has a bias, which the loss does not know")
    if any(p.is_meta or hasattr(p, "ds_id") for p in model.parameters()):
        return
    ids = torch.arange(1, 6, device=head.weight.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            expected = model(input_ids=ids, use_cache=False).logits.float()
            states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            scale, softcap = _head_of(model)
            found = torch.nn.functional.linear(states * scale, head.weight).float()
            found = found if softcap is None else softcap * (found / softcap).tanh()
    finally:
        model.train(training)
    if found.shape != expected.shape or (found - expected).abs().max() > 0.02 * expected.abs().max().clamp_min(1e-3):
        raise TKPOError(
            f"{name} makes its logits otherwise than by its output head from its decoder's states: not supported"
        )


def _head_of(model: PreTrainedModel) -> tuple[float, float | None]:
    """(what multiplies the logits, their soft cap or None), from the config's names for them."""
    config = model.config.get_text_config()
    scale = next((s for n in ("logit_scale", "lm_head_multiplier") if (s := getattr(config, n, None)) is not None), 1.0)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        scale = scale / divisor
    return scale, getattr(config, "final_logit_softcapping", None)


# ---- forward -------------------------------------------------------------------------------------------


def _forward(
    self,
    plain_forward: Callable,
    input_ids=None,
    attention_mask=None,
    *args,
    labels=None,
    **kwargs,
):
    """The model's forward; with `labels` (B, T), in training or where TKPO's own keywords ask for it, the TKPO loss.

    labels, flipped_labels: as transformers has them, `labels[:, t]` is the token at `input_ids[:, t]`, -100
    outside the response. flipped_*: (B, T'), may have another length and padding than the true inputs; the
    i-th response token of a row matches the i-th of its flipped row. num_sequences: see `tkpo.loss.tkpo_loss`.
    article_ids, branch_ids and their flipped_ counterparts: rows with shared prefixes, see `tkpo.shared_prefix`.
    """
    settings = self.tkpo
    own = {name: kwargs.pop(name) for name in (*OWN_KEYWORDS, *TREE_KEYWORDS) if name in kwargs}
    if labels is None or settings is None or not (self.training or own):
        return plain_forward(self, input_ids, attention_mask, *args, labels=labels, **kwargs)
    if input_ids is None or args or any(kwargs.get(name) is not None for name in ("past_key_values", "cache")):
        raise TKPOError("TKPO trains from input_ids and labels given by name, without past_key_values")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise TKPOError("TKPO needs a 2-D attention_mask; turn sequence packing (neat_packing) off")
    head = self.get_output_embeddings()
    if hasattr(head, "lora_A"):
        raise TKPOError("an adapter on lm_head would not be seen: take lm_head out of target_modules")
    kwargs = {k: v for k, v in kwargs.items() if k not in UNREAD}
    num_sequences = own.get("num_sequences")
    if getattr(self.config.get_text_config(), "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    passes = _Tree(self, own) if "branch_ids" in own else _Rows(self, own)
    hidden, flipped, outputs = passes.states(input_ids, attention_mask, labels, kwargs)
    result = _loss(self, head, hidden, labels, flipped, own.get("branch_ids"), num_sequences)
    output = TKPOOutput(**{name: value for name, value in vars(result).items() if name != "token_losses"})
    if getattr(outputs, "router_logits", None) is not None:
        output.aux_loss = _router_loss(self, outputs.router_logits, attention_mask)
        share = 1 if num_sequences is None else result.num_sequences / num_sequences
        output.loss = output.loss + self.config.get_text_config().router_aux_loss_coef * share * output.aux_loss
    return _with_token_losses(output, labels, result.token_losses)


def _loss(model, head, hidden, labels, flipped, branch_ids, num_sequences) -> TKPOLoss:
    """The loss of hidden states (B, T, H); flipped: (states, targets) of the flipped pass, or None."""
    settings = model.tkpo
    scale, softcap = _head_of(model)
    targets = _shift(labels)
    sequences = None if branch_ids is None else _branches_of(branch_ids)
    names = ("tau", "reduction", "preference_weight", "contrast_weight", "contrast_beta", "contrast_positions")
    options = {name: getattr(settings, name) for name in names}
    draw = {"num_rejects": settings.num_rejects, "chunk_size": settings.chunk_size, "softcap": softcap}

    def terms(states, flipped_states, weight):
        rejects = None
        if settings.preference_weight:
            from_flip = settings.draws_from_flip
            source, gold = (flipped_states, flipped[1]) if from_flip else (states, targets)
            sampler = settings.sampler if from_flip else "multinomial"
            rejects = fused_reject_tokens(source.detach(), gold, weight, sampler=sampler, **draw)
        result = tkpo_loss(
            states,
            targets,
            weight,
            rejects,
            chunk_size=settings.chunk_size,
            num_sequences=num_sequences,
            sequence_ids=sequences,
            flipped_states=flipped_states[flipped[1] != IGNORE_INDEX] if settings.contrast_weight else None,
            softcap=softcap,
            **options,
        )
        return tuple(getattr(result, f.name) for f in fields(TKPOLoss))

    states = hidden if scale == 1 else hidden * scale
    flipped_states = None
    if flipped is not None:
        flipped_states = flipped[0] if scale == 1 else flipped[0] * scale
    return TKPOLoss(*_through_head(head, terms, states, flipped_states))


def _with_token_losses(output: TKPOOutput, labels: Tensor, token_losses: Tensor) -> TKPOOutput:
    """TRL's SFTTrainer sums `-log_probs` and divides by the step's tokens: per token, it finds the loss there."""
    mask = labels[:, 1:] != IGNORE_INDEX
    if token_losses.shape[0] == int(mask.sum()):
        per_token = token_losses.new_zeros(mask.shape)
        output.log_probs = per_token.masked_scatter(mask, -token_losses)
        output.label_mask = mask
        output.entropy, output.is_top1 = torch.zeros_like(per_token), torch.zeros_like(mask)
    return output


def _router_loss(model, router_logits, attention_mask) -> Tensor:
    """An MoE's auxiliary loss by the function that its own module uses."""
    balance = sys.modules[_plain_class(model).__module__].load_balancing_loss_func
    config = model.config.get_text_config()
    return balance(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)


def _plain_class(model) -> type:
    return next(c for c in type(model).__mro__ if hasattr(sys.modules[c.__module__], "load_balancing_loss_func"))


# ---- the two passes ------------------------------------------------------------------------------------


class _Passes:
    """The true pass and, where the settings need it, the flipped one, going on from what the true one has read."""

    def __init__(self, model, own: dict):
        self.model, self.settings, self.own = model, model.tkpo, own
        self.decoder = model.get_decoder()
        names = inspect.signature(self.decoder.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.grad = torch.enable_grad if self.settings.contrast_weight else torch.no_grad
        if not self.settings.contrast_weight or not torch.is_grad_enabled():
            self.grad = torch.no_grad

    def keeps(self) -> bool:
        """Whether keys and values of the true pass can be kept: all of them, in every layer."""
        return not (self.model.training and is_checkpointed(self.model)) and has_full_attention(self.model)

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self.decoder.config)

    def crop(self, cache: DynamicCache, columns) -> None:
        """Leaves only `columns` of what a cache holds, without gradient unless the flipped pass needs it."""
        for layer in cache.layers:
            for name in ("keys", "values"):
                kept = getattr(layer, name)[:, :, columns]
                setattr(layer, name, kept if self.grad is torch.enable_grad else kept.detach())

    def run(self, cache: DynamicCache | None, **inputs):
        if cache is not None:
            inputs[self.cache_name] = cache
        return self.decoder(**inputs, use_cache=cache is not None)


class _Rows(_Passes):
    """One sample a row, padded on either side."""

    def states(self, input_ids, attention_mask, labels, kwargs):
        """(hidden (B, T, H), (flipped hidden, their targets) or None, the true pass's outputs)."""
        shared = 0
        if self.settings.flips:
            flipped_ids, flipped_mask, flipped_labels = self._flipped(input_ids, attention_mask, labels)
            targets = _shift(flipped_labels)
            if self.keeps() and kwargs.get("position_ids") is None:
                true, theirs = (input_ids, attention_mask), (flipped_ids, flipped_mask)
                shared = _count_shared(true, theirs, targets == IGNORE_INDEX)
        cache = self.new_cache() if shared else None
        outputs = self.run(cache, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if not self.settings.flips:
            return outputs.last_hidden_state, None, outputs
        if cache is not None:
            self.crop(cache, slice(0, shared))
        with self.grad():
            states = self.run(cache, input_ids=flipped_ids[:, shared:], attention_mask=flipped_mask).last_hidden_state
        return outputs.last_hidden_state, (states, targets[:, shared:]), outputs

    def _flipped(self, input_ids, attention_mask, labels):
        if "flipped_input_ids" in self.own:
            return (self.own.get(f"flipped_{name}") for name in ("input_ids", "attention_mask", "labels"))
        if self.settings.flipper is None:
            raise TKPOError("no flipped inputs were given and TKPOSettings has no flipper: give it a PromptFlipper")
        return self.settings.flipper.flip_batch(input_ids, labels, attention_mask)


class _Tree(_Passes):
    """A row of shared prefixes and their branches, see `tkpo.shared_prefix`."""

    def states(self, input_ids, attention_mask, labels, kwargs):
        check_attention(self.model)
        if not has_full_attention(self.model):
            raise TKPOError(
                f"share_prefix needs full attention in every layer, which {type(self.model).__name__} here has not: "
                "train without share_prefix"
            )
        ids = self.own["article_ids"][0], self.own["branch_ids"][0]
        cache = self.new_cache() if self.settings.flips and self.keeps() else None
        with tree_attention(self.model, ids, ids) as attention:
            outputs = self.run(cache, input_ids=input_ids, **attention, **kwargs)
        flipped = None
        if self.settings.flips:
            flipped = (
                self._flipped_states(input_ids, kwargs["position_ids"], ids, cache),
                _shift(self.own["flipped_labels"]),
            )
        return outputs.last_hidden_state, flipped, outputs

    def _flipped_states(self, input_ids, position_ids, ids, cache) -> Tensor:
        """States of the flipped branches, (1, T', H); without cached keys and values their prefixes are read anew."""
        prefix = (ids[1] == 0).nonzero()[:, 0]
        flipped = self.own["flipped_article_ids"][0], self.own["flipped_branch_ids"][0]
        keys = tuple(torch.cat([own[prefix], theirs]) for own, theirs in zip(ids, flipped, strict=True))
        inputs = {"input_ids": self.own["flipped_input_ids"], "position_ids": self.own["flipped_position_ids"]}
        if cache is not None:
            self.crop(cache, prefix)
            queries = flipped
        else:
            queries = keys
            true = {"input_ids": input_ids, "position_ids": position_ids}
            inputs = {name: torch.cat([true[name][:, prefix], value], dim=1) for name, value in inputs.items()}
        with self.grad(), tree_attention(self.model, queries, keys) as attention:
            states = self.run(cache, **attention, **inputs).last_hidden_state
        return states if cache is not None else states[:, len(prefix) :]


def has_full_attention(model: PreTrainedModel) -> bool:
    """Whether every layer sees every earlier token: no sliding window, no recurrent state."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None or getattr(config, "use_sliding_window", None) is False


def _branches_of(branch_ids: Tensor) -> Tensor:
    """Sequence numbers from 0; what prefixes get is never read, they have no labels."""
    return (branch_ids - 1).clamp_min(0)


def _count_shared(true: tuple, flipped: tuple, unused: Tensor) -> int:
    """Leading columns in which two batches (ids, mask or None) are alike, and whose states are unused (B, T')."""
    length = min(true[0].shape[1], flipped[0].shape[1]) - 1
    masks = [torch.ones_like(ids) if mask is None else mask for ids, mask in (true, flipped)]
    alike = unused[:, :length].clone()
    for ours, theirs in ((true[0], flipped[0]), masks):
        alike &= ours[:, :length] == theirs[:, :length]
    return int(alike.all(dim=0).long().cumprod(dim=0).sum())


def _through_head(head: torch.nn.Module, function: Callable, *states):
    """`function(*states, head.weight)`, run as the forward of the output head.

    What partitions weights (DeepSpeed ZeRO-3, FSDP) gathers them in hooks around each module's forward and backward,
    and takes their gradients there: called this way, the head is gathered while the loss needs it, tied to the
    embedding or not. The hooks see tensors and tuples of tensors only.
    """
    own = vars(head).get("forward")
    head.forward = lambda *states: function(*states, head.weight)
    try:
        return head(*states)
    finally:
        if own is None:
            del head.forward
        else:
            head.forward = own


def _shift(labels: Tensor) -> Tensor:
    """Labels aligned with the states that predict them; the last state predicts nothing."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
