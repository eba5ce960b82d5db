"""The TKPO loss on tensors: no model, no tokenizer.

Notation, as in the paper: p_t is the policy's next-token distribution at response position t, y_t the gold
token, N_t the set of K reject tokens drawn from the distribution under the attribute-flipped prompt,

    r_t = exp(p_t(y_t)/tau) / (exp(p_t(y_t)/tau) + sum_{v in N_t} exp(p_t(v)/tau))        list-wise Bradley-Terry
    L   = L_CE + lambda * L_TKPO,   L_TKPO = -log(mean_t r_t)  or  -mean_t log r_t

`preference_loss` and `draw_reject_tokens` are the plain form, on logits. `tkpo_loss` is what training runs:
the same values from hidden states and the output head's weight, in chunks of response positions, so that a
(batch, length, vocabulary) tensor never exists. Sums and softmax are in float32 (float64 for float64 input).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tkpo.settings import CHUNK_SIZE, NO_FLIP, REDUCTIONS, SAMPLERS, TKPOSettings

IGNORE_INDEX = -100
BLOCK = 256  # at most so many tokens of the vocabulary are a block of the draw


# ---- plain form ----------------------------------------------------------------------------------------


def preference_loss(
    logits: Tensor,
    labels: Tensor,
    reject_tokens: Tensor,
    tau: float = TKPOSettings.tau,
    reduction: str = TKPOSettings.reduction,
) -> Tensor:
    """List-wise Bradley-Terry preference loss of each sequence, shape (B,).

    logits: (B, T, V), `logits[:, t]` predicts `labels[:, t]`.
    labels: (B, T) token ids, -100 outside the response.
    reject_tokens: (B, T, K) token ids; what stands outside the response is not read.
    tau: temperature that divides probabilities. reduction: "log_mean", -log((1/n) sum r_t), or "mean_log",
    -(1/n) sum log r_t.
    Raises ValueError for wrong shapes, an unknown reduction or a sequence without response tokens.
    """
    _check_reduction(reduction)
    if logits.dim() != 3 or logits.shape[:2] != labels.shape or reject_tokens.shape[:2] != labels.shape:
        raise ValueError(
            f"expected logits (B, T, V), labels (B, T), reject_tokens (B, T, K); got {tuple(logits.shape)}, "
            f"{tuple(labels.shape)}, {tuple(reject_tokens.shape)}"
        )
    mask = labels != IGNORE_INDEX
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"batch rows {empty} have no response token (every label is {IGNORE_INDEX})")
    rows = mask.nonzero()[:, 0]
    probs = logits[mask].to(_sum_dtype(logits.dtype)).softmax(dim=-1)
    candidates = torch.cat([labels[mask].unsqueeze(-1), reject_tokens[mask]], dim=-1)
    log_rewards = (probs.gather(-1, candidates) / tau).log_softmax(dim=-1)[:, 0]
    return _reduce(log_rewards, rows, len(labels), reduction)


def draw_reject_tokens(
    flipped_logits: Tensor,
    labels: Tensor,
    num_rejects: int = TKPOSettings.num_rejects,
    sampler: str = TKPOSettings.sampler,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw K distinct reject tokens at every position, never the gold one. Returns (B, T, K) token ids.

    flipped_logits: (B, T, V) under the flipped prompt, position by position beside `labels` (B, T).
    sampler: "multinomial" draws without replacement from the softmax with the gold token removed; "gumbel" is
    the same law by the Gumbel-top-k trick on logits; "topk" takes the K most likely; "uniform" ignores logits.
    Raises ValueError for an unknown sampler, wrong shapes, or a vocabulary that has no K tokens beside the gold.
    """
    if flipped_logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"expected logits {(*labels.shape, 'V')} beside labels {tuple(labels.shape)}, "
            f"got {tuple(flipped_logits.shape)}"
        )
    scores = flipped_logits.detach().to(_sum_dtype(flipped_logits.dtype), copy=True)
    return _draw(scores, labels, num_rejects, sampler, generator)


def _draw(scores: Tensor, labels: Tensor, num_rejects: int, sampler: str, generator: torch.Generator | None) -> Tensor:
    """`draw_reject_tokens` from float32 or float64 logits, which are overwritten."""
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; there are: {', '.join(SAMPLERS)}")
    vocabulary = scores.shape[-1]
    if not 1 <= num_rejects < vocabulary:
        raise ValueError(
            f"num_rejects is {num_rejects}: it must be at least 1 and below the vocabulary's size, {vocabulary}"
        )
    gold = labels.clamp_min(0).unsqueeze(-1)
    if sampler in ("multinomial", NO_FLIP):  # the caller says whose logits they are
        # Tokens that underflow to probability 0 stay drawable, should fewer than K others be left.
        weights = scores.sub_(scores.amax(dim=-1, keepdim=True)).exp_().clamp_min_(1e-30).scatter_(-1, gold, 0.0)
        return _without_replacement(weights.flatten(0, -2), num_rejects, generator).view(*labels.shape, num_rejects)
    if sampler == "uniform":
        scores.zero_()
    if sampler in ("gumbel", "uniform"):
        noise = torch.empty_like(scores).exponential_(generator=generator)
        scores -= noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()
    return scores.scatter_(-1, gold, float("-inf")).topk(num_rejects, dim=-1).indices


def _without_replacement(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """(n, count) distinct columns of each row of weights (n, V), which is overwritten: successive draws by weight.

    Drawing with replacement and passing over what was drawn before is the same law, and asks for a few random
    numbers a row in place of V, which a CPU makes one by one. What was drawn gets weight 0, so that a row that still
    lacks some goes on among the others.
    """
    drawn = weights.new_empty(len(weights), count, dtype=torch.long)
    found = torch.zeros(len(weights), dtype=torch.long, device=weights.device)
    rows = torch.arange(len(weights), device=weights.device)
    while len(rows):
        own = weights if len(rows) == len(weights) else weights[rows]
        tokens = _with_replacement(own, 4 * count, generator)
        ordered, order = tokens.sort(dim=-1, stable=True)
        fresh = torch.ones_like(tokens, dtype=torch.bool)
        fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        fresh = torch.empty_like(fresh).scatter_(-1, order, fresh) & (own.gather(-1, tokens) > 0)
        place = found[rows].unsqueeze(-1) + fresh.cumsum(dim=-1) - 1
        fresh &= place < count
        taken, tokens = rows.unsqueeze(-1).expand_as(tokens)[fresh], tokens[fresh]
        drawn[taken, place[fresh]] = tokens
        weights[taken, tokens] = 0
        found[rows] += fresh.sum(dim=-1)
        rows = rows[found[rows] < count]
    return drawn


def _with_replacement(weights: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """(n, count) columns of each row of weights (n, V), by inverse sums in float64: first of blocks, then within."""
    size = max(d for d in range(1, BLOCK + 1) if weights.shape[-1] % d == 0)
    blocks = weights.unflatten(-1, (-1, size))
    sums = blocks.sum(dim=-1).double()  # of few numbers each: float32 will do
    ends = sums.cumsum(dim=-1)
    point = torch.rand(len(weights), count, dtype=torch.float64, device=weights.device, generator=generator)
    point *= ends[:, -1:]
    block = torch.searchsorted(ends, point, right=True).clamp_max_(ends.shape[-1] - 1)
    point -= (ends - sums).gather(-1, block)
    inside = blocks.gather(1, block.unsqueeze(-1).expand(-1, -1, size)).cumsum(dim=-1, dtype=torch.float64)
    place = torch.searchsorted(inside, point.unsqueeze(-1), right=True).squeeze(-1).clamp_max_(size - 1)
    return block * size + place


# ---- fused form ----------------------------------------------------------------------------------------


@dataclass
class TKPOLoss:
    """What `tkpo_loss` returns; every field but `token_losses` is a scalar tensor, a mean over the sequences with a
    response.

    loss: cross_entropy + preference_weight * preference + contrast_weight * contrast, differentiable.
    cross_entropy, preference, contrast: its terms, detached.
    reward: mean r_t over response positions. accuracy: share of response positions whose gold probability
    beats every reject's. num_sequences: sequences that had a response.
    token_losses: (N,), differentiable: each response position's cross-entropy plus its sequence's weighted other
    terms, for trainers that average over tokens themselves.
    """

    loss: Tensor
    cross_entropy: Tensor
    preference: Tensor
    contrast: Tensor
    reward: Tensor
    accuracy: Tensor
    num_sequences: Tensor
    token_losses: Tensor


def tkpo_loss(
    hidden: Tensor,
    labels: Tensor,
    weight: Tensor,
    reject_tokens: Tensor | None,
    tau: float = TKPOSettings.tau,
    reduction: str = TKPOSettings.reduction,
    preference_weight: float = TKPOSettings.preference_weight,
    chunk_size: int = CHUNK_SIZE,
    num_sequences: Tensor | float | None = None,
    *,
    sequence_ids: Tensor | None = None,
    flipped_states: Tensor | None = None,
    contrast_weight: float = TKPOSettings.contrast_weight,
    contrast_beta: float = TKPOSettings.contrast_beta,
    contrast_positions: str = TKPOSettings.contrast_positions,
    softcap: float | None = None,
) -> TKPOLoss:
    """Cross-entropy plus preference (and prompt-contrast) loss from hidden states, without ever holding (B, T, V).

    hidden: (B, T, H), last hidden states; `hidden[:, t]` predicts `labels[:, t]`.
    labels: (B, T), -100 outside the response.
    weight: (V, H), the output head's weight, with or without grad.
    reject_tokens: (N, K), as `fused_reject_tokens` draws them, for the N response positions in row-major order;
        None (or preference_weight 0) leaves the preference term out.
    tau, reduction: as in `preference_loss`.
    chunk_size: response positions whose logits exist at a time.
    num_sequences: what to divide the sum over sequences by; default: the sequences here that have a response.
    sequence_ids: (B, T), which sequence, from 0, each position belongs to, where a row holds several; default: its row.
    flipped_states: (N, H), the hidden states that predict the same N response tokens under the flipped prompt; they
        are needed for the prompt contrast, `prompt_contrast_loss`, and left unread where contrast_weight is 0.
    contrast_beta, contrast_positions: as in `prompt_contrast_loss`.
    softcap: c of a head whose logits are c * tanh(W h / c), as Gemma 2's.

    A sequence without response adds nothing; a batch of such gives 0 that is still connected to `hidden`.
    Each sequence's cross-entropy is the mean over its response tokens. Raises ValueError for wrong shapes.
    """
    _check_reduction(reduction)
    _check_shapes(hidden, labels, weight, reject_tokens, flipped_states)
    mask = labels != IGNORE_INDEX
    rows = mask.nonzero()[:, 0] if sequence_ids is None else sequence_ids[mask]
    batch = len(labels) if sequence_ids is None else int(sequence_ids.max()) + 1
    states, gold = hidden[mask], labels[mask].unsqueeze(-1)
    with_preference = reject_tokens is not None and preference_weight != 0
    candidates = torch.cat([gold, reject_tokens], dim=-1) if with_preference else gold
    cross_entropy, log_rewards, wins = TokenTerms.apply(states, weight, candidates, tau, chunk_size, softcap)

    present = torch.zeros(batch, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
    count = present.sum().clamp_min(1) if num_sequences is None else num_sequences
    zero = cross_entropy.new_zeros(batch)
    preference = _reduce(log_rewards, rows, batch, reduction) if with_preference else zero
    contrast = zero
    if contrast_weight and flipped_states is not None:
        flipped_ce, *_ = TokenTerms.apply(flipped_states, weight, gold, tau, chunk_size, softcap)
        weights = None
        if contrast_positions == "total_variation":
            weights = total_variation(states, flipped_states, weight, chunk_size, softcap)
        contrast = prompt_contrast_loss(-cross_entropy, -flipped_ce, rows, batch, contrast_beta, weights)
        contrast = torch.where(present, contrast, 0.0)
    ce = _sequence_mean(cross_entropy, rows, batch)
    others = preference_weight * preference + contrast_weight * contrast
    terms = [term.sum() / count for term in (ce + others, ce, preference, contrast)]
    shares = [log_rewards.exp().mean(), wins.mean()] if with_preference and len(rows) else [zero.sum(), zero.sum()]
    loss = terms[0] if len(rows) else terms[0] + hidden.sum() * 0
    detached = (term.detach() for term in (*terms[1:], *shares, present.sum()))
    return TKPOLoss(loss, *detached, token_losses=cross_entropy + others[rows])


def _check_shapes(
    hidden: Tensor, labels: Tensor, weight: Tensor, reject_tokens: Tensor | None, flipped_states: Tensor | None
) -> None:
    """ValueError unless the tensors of `tkpo_loss` have the shapes that its docstring gives."""
    if hidden.shape[:2] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"expected hidden (B, T, H), labels (B, T), weight (V, H); got {tuple(hidden.shape)}, "
            f"{tuple(labels.shape)}, {tuple(weight.shape)}"
        )
    count = int((labels != IGNORE_INDEX).sum())
    for name, value in (("reject tokens", reject_tokens), ("flipped states", flipped_states)):
        if value is not None and value.shape[:1] != (count,):
            raise ValueError(
                f"{count} response positions but {name} for {value.shape[0]}: the flipped sequences must hold the "
                "same responses"
            )


def prompt_contrast_loss(
    log_probs: Tensor,
    flipped_log_probs: Tensor,
    rows: Tensor,
    batch: int,
    beta: float = TKPOSettings.contrast_beta,
    weights: Tensor | None = None,
) -> Tensor:
    """Prompt contrast of each sequence, (B,): -log sigmoid(beta * sum_t w_t [log p(y_t|x) - log p(y_t|x~)]).

    Not in the paper. The same response is to be likelier under its own prompt x than under the flipped prompt x~, which
    raises the mutual information of attribute and response without a second response.

    log_probs, flipped_log_probs: (N,), the gold tokens' log-probabilities under the true and the flipped prompt.
    rows: (N,), the sequence of each position. batch: B, how many sequences there are.
    beta: inverse temperature. weights: (N,), w_t, without gradient; default 1.
    """
    gaps = log_probs - flipped_log_probs
    gaps = gaps if weights is None else gaps * weights
    return torch.nn.functional.softplus(-beta * gaps.new_zeros(batch).index_add(0, rows, gaps))


@torch.no_grad()
def total_variation(
    states: Tensor, flipped_states: Tensor, weight: Tensor, chunk_size: int = CHUNK_SIZE, softcap: float | None = None
) -> Tensor:
    """Total variation, (N,) in 0...1, between the next-token distributions of two hidden states (N, H) each."""
    head, accumulate = weight.to(states.dtype), _sum_dtype(states.dtype)
    chunks = zip(states.split(chunk_size), flipped_states.split(chunk_size), strict=True)
    distances = [
        (_logits(ours, head, softcap).softmax(dim=-1) - _logits(theirs, head, softcap).softmax(dim=-1)).abs().sum(-1)
        / 2
        for ours, theirs in chunks
    ]
    return torch.cat(distances) if distances else states.new_empty(0, dtype=accumulate)


@torch.no_grad()
def fused_reject_tokens(
    flipped_hidden: Tensor,
    flipped_labels: Tensor,
    weight: Tensor,
    num_rejects: int = TKPOSettings.num_rejects,
    sampler: str = TKPOSettings.sampler,
    generator: torch.Generator | None = None,
    chunk_size: int = CHUNK_SIZE,
    softcap: float | None = None,
) -> Tensor:
    """`draw_reject_tokens` from hidden states (B, T, H) at response positions only: returns (N, K) token ids.

    softcap: as in `tkpo_loss`; the other arguments as in `draw_reject_tokens`.
    """
    mask = flipped_labels != IGNORE_INDEX
    states, gold = flipped_hidden[mask], flipped_labels[mask]
    head = weight.to(states.dtype)
    drawn = [
        _draw(_logits(chunk, head, softcap), labels, num_rejects, sampler, generator)
        for chunk, labels in zip(states.split(chunk_size), gold.split(chunk_size), strict=True)
        if len(chunk)
    ]
    return torch.cat(drawn) if drawn else gold.new_empty(0, num_rejects)


class TokenTerms(torch.autograd.Function):
    """Per position: cross-entropy, log r_t, and whether the gold token beats every reject.

    With z = W h, p = softmax(z), candidates v = (gold, rejects), s = softmax(p_v / tau), r = s_0:

        d ce    / d z = p - e_gold
        d log r / d z = sum_v a_v (e_v - p),  a_v = p_v ([v is gold] - s_v) / tau

    so that both gradients in h need one dense product, u = W^T p, and K + 1 rows of W. With a frozen W (LoRA)
    they are worked out in the forward pass, from the logits at hand: backward is two scalings. With a trained W
    backward makes each chunk's logits again, and the gradient of W with them. A soft cap, z = c tanh(W h / c), puts
    its slope 1 - (z / c)^2 beside each entry of these gradients.
    """

    @staticmethod
    def forward(ctx, states, weight, candidates, tau, chunk_size, softcap=None):
        head = weight.to(states.dtype)
        frozen = states.requires_grad and not weight.requires_grad
        accumulate = _sum_dtype(states.dtype)
        count = len(states)
        ce = torch.empty(count, dtype=accumulate, device=states.device)
        log_reward, wins = torch.empty_like(ce), torch.empty_like(ce)
        ce_grad, reward_grad = (torch.empty_like(states) if frozen else None for _ in range(2))
        for start in range(0, count, chunk_size):
            part = slice(start, start + chunk_size)
            log_norm, probs, picked, bends = _chunk_probs(states[part], head, candidates[part], softcap)
            log_shares = (picked / tau).log_softmax(dim=-1)
            log_reward[part] = log_shares[:, 0]
            wins[part] = (picked[:, :1] > picked[:, 1:]).all(dim=-1).to(accumulate)
            ce[part] = log_norm
            if frozen:
                rows = head[candidates[part]].to(accumulate)  # (n, K+1, H)
                if bends is not None:
                    rows *= bends.gather(-1, candidates[part]).unsqueeze(-1)
                    probs *= bends
                mean_row = (probs.to(states.dtype) @ head).to(accumulate)  # u
                slopes = _reward_slopes(picked, log_shares, tau)
                ce_grad[part] = (mean_row - rows[:, 0]).to(states.dtype)
                mixed = torch.bmm(slopes.unsqueeze(1), rows).squeeze(1)
                reward_grad[part] = (mixed - slopes.sum(-1, keepdim=True) * mean_row).to(states.dtype)
        ctx.frozen, ctx.tau, ctx.chunk_size, ctx.softcap = frozen, tau, chunk_size, softcap
        if frozen:
            ctx.save_for_backward(ce_grad, reward_grad)
        else:
            ctx.save_for_backward(states, weight, candidates)
        ctx.mark_non_differentiable(wins)
        return ce, log_reward, wins

    @staticmethod
    def backward(ctx, ce_scale, reward_scale, _):
        if ctx.frozen:
            ce_grad, reward_grad = ctx.saved_tensors
            scale = ce_scale.unsqueeze(-1).to(ce_grad.dtype), reward_scale.unsqueeze(-1).to(ce_grad.dtype)
            return scale[0] * ce_grad + scale[1] * reward_grad, None, None, None, None, None
        states, weight, candidates = ctx.saved_tensors
        head = weight.to(states.dtype)
        states_grad = torch.empty_like(states)
        weight_grad = torch.zeros_like(weight, dtype=_sum_dtype(weight.dtype))
        for start in range(0, len(states), ctx.chunk_size):
            part = slice(start, start + ctx.chunk_size)
            _, probs, picked, bends = _chunk_probs(states[part], head, candidates[part], ctx.softcap)
            slopes = _reward_slopes(picked, (picked / ctx.tau).log_softmax(dim=-1), ctx.tau)
            slopes = slopes * reward_scale[part].unsqueeze(-1)
            slopes[:, 0] -= ce_scale[part]  # the - e_gold of cross-entropy
            logits_grad = probs.mul_(-slopes.sum(-1, keepdim=True)).scatter_add_(-1, candidates[part], slopes)
            logits_grad = (logits_grad if bends is None else logits_grad.mul_(bends)).to(states.dtype)
            states_grad[part] = logits_grad @ head
            if weight_grad.dtype == states.dtype:
                weight_grad.addmm_(logits_grad.T, states[part])  # without a second tensor of its size
            else:
                weight_grad += logits_grad.T @ states[part]
        return states_grad, weight_grad.to(weight.dtype), None, None, None, None


def _logits(states: Tensor, head: Tensor, softcap: float | None) -> Tensor:
    """(n, V) in the dtype of sums."""
    logits = (states @ head.T).to(_sum_dtype(states.dtype))
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _chunk_probs(
    states: Tensor, head: Tensor, candidates: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """-log p(gold) (n,), probabilities (n, V), the candidates' probabilities (n, K+1), the soft cap's slopes (n, V)."""
    logits = _logits(states, head, softcap)
    bends = None if softcap is None else 1 - (logits / softcap) ** 2
    logits -= logits.amax(dim=-1, keepdim=True)
    gold = logits.gather(-1, candidates[:, :1])
    probs = logits.exp_()  # in place: a chunk's logits are the largest tensor there is
    total = probs.sum(dim=-1, keepdim=True)
    probs /= total
    return (total.log() - gold).squeeze(-1), probs, probs.gather(-1, candidates), bends


def _reward_slopes(picked: Tensor, log_shares: Tensor, tau: float) -> Tensor:
    """a_v of `TokenTerms`: p_v d(log r)/dp_v, (n, K+1)."""
    slopes = -log_shares.exp()
    slopes[:, 0] += 1
    return picked * slopes / tau


def _reduce(log_rewards: Tensor, rows: Tensor, batch: int, reduction: str) -> Tensor:
    """Sequence losses (B,) from log r_t at response positions; 0 for a row that has none.

    From logarithms, because r_t itself underflows for a small tau.
    """
    if reduction == "mean_log":
        return -_sequence_mean(log_rewards, rows, batch)
    largest = (
        log_rewards.detach().new_zeros(batch).scatter_reduce(0, rows, log_rewards.detach(), "amax", include_self=False)
    )
    means = _sequence_mean((log_rewards - largest[rows]).exp(), rows, batch)
    present = torch.zeros(batch, dtype=torch.bool, device=rows.device).index_fill_(0, rows, True)
    return -(torch.where(present, means, 1.0).log() + largest)


def _sequence_mean(values: Tensor, rows: Tensor, batch: int) -> Tensor:
    counts = torch.bincount(rows, minlength=batch).clamp_min(1).to(values.dtype)
    return values.new_zeros(batch).index_add(0, rows, values) / counts


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"unknown reduction {reduction!r}; there are: {', '.join(REDUCTIONS)}")


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
