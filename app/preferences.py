"""What the loss sees: each token of an outline under the true and under the flipped prompt, with its rejects."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tkpo.attributes import Axis
from tkpo.flip import PromptFlipper
from tkpo.loss import draw_reject_tokens, preference_loss

NUM_REJECTS = 20  # the published K and tau
TAU = 0.15
CHUNK = 128  # positions whose logits (CHUNK, 2, V) exist at the same time
HEAD_BLOCK = 16384  # rows of the output head that are converted at the same time


@torch.inference_mode()
def token_preferences(
    generator,
    record: dict,
    axis: Axis,
    outline: str,
    adapter: str,
    seed: int = 0,
    limit: int = 384,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict | None:
    """One teacher-forced pass over `outline` under the record's prompt and its flip; None if stopped.

    Returns style, flipped, mean_reward, preference (−log mean r_t), cross_entropy (nats a token), accuracy (share of
    positions where the outline's token beats every reject), cut (tokens left out beyond `limit`) and tokens: a list of
    text, p, p_flipped, reward (r_t) and rejects, the K tokens drawn from the flipped prompt's distribution with text,
    p and p_flipped, likeliest under the flipped prompt first. The last token is the end of the turn, as in training.
    K and τ are the published 20 and 0.15; a tiny vocabulary allows only smaller K.
    """
    tokenizer = generator.tokenizer
    prompt = generator.prompt_ids(record, adapter)
    encoded = tokenizer(outline, add_special_tokens=False, return_offsets_mapping=True)
    whole = encoded["input_ids"]
    ids = [*whole[:limit], tokenizer.eos_token_id] if len(whole) <= limit else whole[:limit]
    flipped_prompt = PromptFlipper(tokenizer, axis).flip_ids(prompt, len(prompt), "the prompt")
    states = generator.hidden_states([[*prompt, *ids], [*flipped_prompt, *ids]], adapter)
    n, head = len(ids), generator.lm_head_weight
    both = torch.stack([row[-n - 1 : -1] for row in states], dim=1)  # (n, 2, H)
    gold = torch.tensor(ids, device=head.device)
    draws = torch.Generator(device=head.device).manual_seed(seed)
    parts = []
    for start in range(0, n, CHUNK):
        if should_stop():
            return None
        part = slice(start, start + CHUNK)
        logits = _logits(both[part].flatten(0, 1), head).unflatten(0, (-1, 2))
        parts.append(_chunk(logits[:, 0], logits[:, 1], gold[part], draws))
    p, p_flipped, log_r, rejects, q, q_flipped = (torch.cat(values) for values in zip(*parts, strict=True))

    texts = _pieces(outline, encoded["offset_mapping"][:limit]) + [END] * (len(ids) > len(whole[:limit]))
    tokens = []
    for i, shown in enumerate(texts):
        drawn = zip(rejects[i].tolist(), q[i].tolist(), q_flipped[i].tolist(), strict=True)
        named = [{"text": _name(tokenizer, v), "p": a, "p_flipped": b} for v, a, b in drawn]
        named.sort(key=lambda reject: -reject["p_flipped"])
        values = {"p": p[i].item(), "p_flipped": p_flipped[i].item(), "reward": log_r[i].exp().item()}
        tokens.append({"text": shown, **values, "rejects": named})
    rewards = log_r.exp()
    return {
        "style": record["attribute"],
        "flipped": axis.flip[record["attribute"]],
        "mean_reward": rewards.mean().item(),
        "preference": -rewards.mean().log().item(),
        "cross_entropy": -p.log().mean().item(),
        "accuracy": (p[:, None] > q).all(dim=1).float().mean().item(),
        "cut": len(whole) - len(whole[:limit]),
        "tokens": tokens,
    }


END = "⏹"


def _chunk(logits: Tensor, flipped_logits: Tensor, gold: Tensor, draws: torch.Generator) -> tuple[Tensor, ...]:
    """(n, V) logits of both prompts → gold probabilities, log r_t (n,), rejects and their probabilities (n, K)."""
    logits, flipped_logits, labels = logits.float(), flipped_logits.float(), gold.unsqueeze(1)
    k = min(NUM_REJECTS, logits.shape[-1] - 1)
    rejects = draw_reject_tokens(flipped_logits.unsqueeze(1), labels, k, "multinomial", draws)
    # A sequence of one token has the loss −log r_t, so n such sequences give r_t position by position.
    log_r = -preference_loss(logits.unsqueeze(1), labels, rejects, TAU)
    probs, flipped_probs, rejects = logits.softmax(-1), flipped_logits.softmax(-1), rejects.squeeze(1)
    gold_probs = probs.gather(1, labels).squeeze(1), flipped_probs.gather(1, labels).squeeze(1)
    return *gold_probs, log_r, rejects, probs.gather(1, rejects), flipped_probs.gather(1, rejects)


def _logits(states: Tensor, head: Tensor) -> Tensor:
    """states (n, H) times the output head (V, H), whose blocks alone are brought to the states' dtype."""
    return torch.cat([states @ block.to(states.dtype).T for block in head.split(HEAD_BLOCK)], dim=1)


def _pieces(outline: str, spans: list[tuple[int, int]]) -> list[str]:
    """The piece of text that each token adds; "" for a token that only continues a character."""
    pieces, reached = [], 0
    for start, end in spans:
        pieces.append(outline[max(start, reached) : end])
        reached = max(reached, end)
    return pieces


def _name(tokenizer, token: int) -> str:
    name = tokenizer.decode([token])
    return name if "\ufffd" not in name else tokenizer.convert_ids_to_tokens(token)
