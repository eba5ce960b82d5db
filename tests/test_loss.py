"""The loss on tensors, held against the paper's formulas written as float64 loops."""

import math
from itertools import combinations

import pytest
import torch
from scipy.stats import chisquare
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tkpo.loss import (
    IGNORE_INDEX,
    REDUCTIONS,
    SAMPLERS,
    draw_reject_tokens,
    fused_reject_tokens,
    preference_loss,
    prompt_contrast_loss,
    tkpo_loss,
    total_variation,
)

TAU, LAMBDA = 0.15, 0.5


# ---- the formulas, position by position in float64


def position_terms(logits, gold, rejects, tau=TAU):
    """(-log p(gold), r, gold beats every reject) at one position; logits: (V,) float64."""
    total = sum(z.exp() for z in logits)
    p = [z.exp() / total for z in logits]
    own = (p[gold] / tau).exp()
    others = sum((p[v] / tau).exp() for v in rejects)
    return -p[gold].log(), own / (own + others), all(p[gold] > p[v] for v in rejects)


def sequences_by_hand(logits, labels, rejects, tau=TAU):
    """[(cross-entropies, rewards, wins)] of every sequence's response positions."""
    sequences = []
    for b in range(len(labels)):
        places = [t for t in range(labels.shape[1]) if labels[b, t] != IGNORE_INDEX]
        terms = [position_terms(logits[b, t], int(labels[b, t]), rejects[b, t].tolist(), tau) for t in places]
        sequences.append(tuple(zip(*terms, strict=True)) if terms else ((), (), ()))
    return sequences


def preference_by_hand(rewards, reduction):
    n = len(rewards)
    return -(sum(rewards) / n).log() if reduction == "log_mean" else -sum(r.log() for r in rewards) / n


def loss_by_hand(logits, labels, rejects, reduction="log_mean", weight=LAMBDA, tau=TAU):
    """{loss, cross_entropy, preference, reward, accuracy}, means over the sequences that have a response."""
    present = [s for s in sequences_by_hand(logits, labels, rejects, tau) if s[0]]
    ce = sum(sum(ce) / len(ce) for ce, _, _ in present) / len(present)
    preference = sum(preference_by_hand(rewards, reduction) for _, rewards, _ in present) / len(present)
    rewards, wins = ([x for s in present for x in s[i]] for i in (1, 2))
    return {
        "loss": ce + weight * preference,
        "cross_entropy": ce,
        "preference": preference,
        "reward": sum(rewards) / len(rewards),
        "accuracy": sum(wins) / len(wins),
    }


# ---- inputs


def make_labels(lengths, starts, width, vocabulary, seed=0):
    """Labels (B, width): row b has lengths[b] response tokens from starts[b] on, -100 elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((len(lengths), width), IGNORE_INDEX)
    for b, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        labels[b, start : start + length] = torch.randint(vocabulary, (length,), generator=generator)
    return labels


def make_rejects(labels, count, vocabulary, seed=1):
    """(B, T, K) distinct tokens that are not gold, chosen one by one."""
    generator = torch.Generator().manual_seed(seed)
    rejects = torch.zeros(*labels.shape, count, dtype=torch.long)
    for b, t in labels.new_ones(labels.shape).nonzero().tolist():
        order = torch.randperm(vocabulary, generator=generator).tolist()
        rejects[b, t] = torch.tensor([v for v in order if v != labels[b, t]][:count])
    return rejects


B, T, V, K, H = 3, 6, 11, 4, 5
LENGTHS, STARTS = (3, 1, 4), (1, 2, 2)


@pytest.fixture
def batch():
    """A padded batch: logits, hidden, weight in float64; labels; rejects. logits = hidden @ weight.T."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(B, T, H, dtype=torch.float64, generator=generator)
    weight = 1.5 * torch.randn(V, H, dtype=torch.float64, generator=generator)
    labels = make_labels(LENGTHS, STARTS, T, V)
    return {
        "hidden": hidden,
        "weight": weight,
        "logits": hidden @ weight.T,
        "labels": labels,
        "rejects": make_rejects(labels, K, V),
    }


def flat(rejects, labels):
    """(N, K), the rejects of response positions in row-major order."""
    return torch.stack([rejects[b, t] for b, t in (labels != IGNORE_INDEX).nonzero().tolist()])


# ---- preference_loss


def test_a_case_worked_on_paper():
    # p = (.5, .3, .2), gold 0, reject 1, tau = .1: r = e^5 / (e^5 + e^3); then p = (.2, .3, .5): r = 1 / (1 + e^1).
    logits = torch.tensor([[[0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]]).log()
    labels, rejects = torch.tensor([[0, 0]]), torch.tensor([[[1], [1]]])
    first, second = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    expected = {"log_mean": -math.log((first + second) / 2), "mean_log": -(math.log(first) + math.log(second)) / 2}
    for reduction, value in expected.items():
        loss = preference_loss(logits, labels, rejects, tau=0.1, reduction=reduction)
        assert loss.shape == (1,)
        assert loss.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("tau", [0.15, 1.0, 0.03])
def test_preference_loss_is_the_formula_in_value_and_gradient(batch, reduction, tau):
    reference = batch["logits"].float().double().requires_grad_()
    sequences = sequences_by_hand(reference, batch["labels"], batch["rejects"], tau)
    expected = torch.stack([preference_by_hand(rewards, reduction) for _, rewards, _ in sequences])
    expected.sum().backward()

    logits = batch["logits"].float().requires_grad_()
    loss = preference_loss(logits, batch["labels"], batch["rejects"], tau, reduction)
    loss.sum().backward()
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits.grad.double(), reference.grad, atol=1e-5, rtol=0)
    assert reference.grad.abs().max() > 0.01  # so that 1e-5 says something
    assert logits.grad[batch["labels"] == IGNORE_INDEX].count_nonzero() == 0


def test_defaults_are_the_published_ones(batch):
    args = (batch["logits"], batch["labels"], batch["rejects"])
    assert torch.equal(preference_loss(*args), preference_loss(*args, tau=0.15, reduction="log_mean"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bfloat16_logits_are_summed_in_float32(batch, reduction):
    reference = batch["logits"].bfloat16().double().requires_grad_()
    sequences = sequences_by_hand(reference, batch["labels"], batch["rejects"])
    expected = torch.stack([preference_by_hand(rewards, reduction) for _, rewards, _ in sequences])
    expected.sum().backward()
    logits = batch["logits"].bfloat16().requires_grad_()
    loss = preference_loss(logits, batch["labels"], batch["rejects"], reduction=reduction)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, atol=1e-5, rtol=0)
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(logits.grad.double(), reference.grad, atol=1e-5, rtol=2**-8)


def test_what_stands_outside_the_response_is_not_read(batch):
    expected = preference_loss(batch["logits"], batch["labels"], batch["rejects"])
    outside = batch["labels"] == IGNORE_INDEX
    logits, rejects = batch["logits"].clone(), batch["rejects"].clone()
    logits[outside], rejects[outside] = float("nan"), -(10**9)
    assert torch.equal(preference_loss(logits, batch["labels"], rejects), expected)


def test_an_order_of_rejects_makes_no_difference(batch):
    expected = preference_loss(batch["logits"], batch["labels"], batch["rejects"])
    torch.testing.assert_close(preference_loss(batch["logits"], batch["labels"], batch["rejects"].flip(-1)), expected)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_huge_logit_gap_stays_finite(reduction):
    logits = torch.tensor([[[1e4, 0.0, 0.0], [0.0, 1e4, 0.0]]], requires_grad=True)
    loss = preference_loss(logits, torch.tensor([[0, 0]]), torch.tensor([[[1], [1]]]), reduction=reduction)
    loss.sum().backward()
    gap = math.exp(-1 / 0.15)
    right, wrong = 1 / (1 + gap), gap / (1 + gap)
    expected = -math.log((right + wrong) / 2) if reduction == "log_mean" else -math.log(right * wrong) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "broken",
    [
        {"labels": torch.zeros(B, T + 1, dtype=torch.long)},
        {"rejects": torch.zeros(B, T - 1, K, dtype=torch.long)},
        {"logits": torch.zeros(B * T, V)},
    ],
)
def test_shapes_that_do_not_fit_are_named(batch, broken):
    inputs = {**batch, **broken}
    with pytest.raises(ValueError, match="expected logits") as error:
        preference_loss(inputs["logits"], inputs["labels"], inputs["rejects"])
    assert str(tuple(next(iter(broken.values())).shape)) in str(error.value)


def test_unknown_reduction_and_empty_response_are_errors(batch):
    with pytest.raises(ValueError, match=r"log_sum.*log_mean, mean_log"):
        preference_loss(batch["logits"], batch["labels"], batch["rejects"], reduction="log_sum")
    labels = batch["labels"].clone()
    labels[1] = IGNORE_INDEX
    with pytest.raises(ValueError, match=r"rows \[1\] have no response"):
        preference_loss(batch["logits"], labels, batch["rejects"])


# ---- draw_reject_tokens

DRAWS = 20_000
LOGITS = [2.0, 0.0, 1.0, -1.0, 0.5]  # vocabulary of 5
GOLD = 2


def pair_counts(logits, sampler, seed=0):
    """How often each unordered pair of the four tokens beside gold came out of DRAWS draws of K = 2."""
    drawn = draw_reject_tokens(
        torch.tensor(logits).expand(1, DRAWS, 5),
        torch.full((1, DRAWS), GOLD),
        num_rejects=2,
        sampler=sampler,
        generator=torch.Generator().manual_seed(seed),
    )
    pairs = list(combinations([0, 1, 3, 4], 2))
    found = [tuple(sorted(pair)) for pair in drawn[0].tolist()]
    assert set(found) <= set(pairs)
    return pairs, [found.count(pair) for pair in pairs]


@pytest.mark.parametrize("sampler", ["multinomial", "gumbel"])
@pytest.mark.parametrize("logits", [LOGITS, [x + 100 for x in LOGITS], [1.5 * x for x in LOGITS]])
def test_draws_follow_the_multinomial_law_without_replacement(sampler, logits):
    total = sum(math.exp(x) for i, x in enumerate(logits) if i != GOLD)
    q = {i: math.exp(x) / total for i, x in enumerate(logits) if i != GOLD}
    pairs, counts = pair_counts(logits, sampler)
    law = [q[a] * q[b] / (1 - q[a]) + q[b] * q[a] / (1 - q[b]) for a, b in pairs]
    assert sum(law) == pytest.approx(1)
    assert chisquare(counts, [DRAWS * p for p in law]).pvalue > 1e-3


def test_uniform_draws_do_not_depend_on_logits():
    for logits in (LOGITS, [50.0, 0.0, 1.0, -50.0, 0.5]):
        _, counts = pair_counts(logits, "uniform")
        assert chisquare(counts).pvalue > 1e-3


def test_topk_takes_the_likeliest_tokens_beside_gold():
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 5, 30, generator=generator)
    labels = logits.argsort(dim=-1, descending=True)[..., 1]  # gold is the second likeliest
    labels[1, 3:] = IGNORE_INDEX
    drawn = draw_reject_tokens(logits, labels, num_rejects=6, sampler="topk")
    for b, t in (labels != IGNORE_INDEX).nonzero().tolist():
        row = logits[b, t].tolist()
        ranked = sorted((v for v in range(30) if v != labels[b, t]), key=lambda v: -row[v])
        assert set(drawn[b, t].tolist()) == set(ranked[:6])


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rejects_are_distinct_and_never_gold(sampler, dtype):
    generator = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(4, 50, 25, generator=generator)).to(dtype)
    labels = logits.argmax(dim=-1)  # the token that a broken draw would take first
    before = logits.clone()
    drawn = draw_reject_tokens(logits, labels, 20, sampler, generator)
    assert drawn.shape == (4, 50, 20) and drawn.dtype == torch.long
    assert torch.equal(logits, before)
    for row, gold in zip(drawn.flatten(0, 1).tolist(), labels.flatten().tolist(), strict=True):
        assert len(set(row)) == 20 and gold not in row and set(row) <= set(range(25))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("gap", [1e4, 200.0])
def test_huge_logit_gaps_still_give_distinct_rejects(sampler, gap):
    """All tokens but two have probability 0 in float32, and one of the two is gold."""
    logits = torch.zeros(1, 200, 12)
    logits[..., 3], logits[..., 7] = gap, gap
    drawn = draw_reject_tokens(logits, torch.full((1, 200), 3), 11, sampler)
    assert all(set(row) == set(range(12)) - {3} for row in drawn[0].tolist())
    if sampler != "uniform":
        few = draw_reject_tokens(logits, torch.full((1, 200), 3), 4, sampler)
        assert all(len(set(row)) == 4 and 3 not in row and 7 in row for row in few[0].tolist())


@pytest.mark.parametrize("sampler", ["multinomial", "gumbel", "uniform"])
def test_a_generator_makes_draws_reproducible(sampler):
    logits, labels = torch.zeros(2, 40, 30), torch.zeros(2, 40, dtype=torch.long)

    def draw(seed):
        return draw_reject_tokens(logits, labels, 5, sampler, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_draws_carry_no_gradient():
    logits = torch.zeros(1, 2, 6, requires_grad=True)
    assert not draw_reject_tokens(logits, torch.zeros(1, 2, dtype=torch.long), 3, "gumbel").requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("count", [0, 5, 6])
def test_k_must_leave_room_for_gold(sampler, count):
    logits, labels = torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match=f"num_rejects is {count}.*5"):
        draw_reject_tokens(logits, labels, count, sampler)
    assert draw_reject_tokens(logits, labels, 4, sampler).sort().values.tolist() == [[[1, 2, 3, 4]] * 2]


def test_unknown_sampler_and_wrong_shapes_are_errors():
    with pytest.raises(ValueError, match=r"'greedy'.*multinomial, gumbel, topk, uniform"):
        draw_reject_tokens(torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.long), 2, "greedy")
    with pytest.raises(ValueError, match="expected logits"):
        draw_reject_tokens(torch.zeros(1, 2, 5), torch.zeros(1, 3, dtype=torch.long), 2)


@pytest.mark.parametrize("vocabulary", [1000, 514, 257])  # blocks of 250, 2 and 1 tokens
def test_draws_from_a_large_vocabulary_follow_the_law(vocabulary):
    """How often a token is among K = 2: p_j + sum over i of p_i p_j / (1 - p_i)."""
    rows, gold = 20_000, 5
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(3)).double()
    logits[[0, 7, 254, vocabulary - 1]] += torch.tensor([6.0, 5.0, 5.0, 4.0])
    p = logits.exp()
    p[gold] = 0
    p /= p.sum()
    among = p + p * ((p / (1 - p)).sum() - p / (1 - p))
    assert among.sum().item() == pytest.approx(2)
    labels, generator = torch.full((1, rows), gold), torch.Generator().manual_seed(4)
    drawn = draw_reject_tokens(logits.float().expand(1, rows, -1), labels, 2, generator=generator)[0]
    assert (drawn[:, 0] != drawn[:, 1]).all()
    counts = torch.bincount(drawn.flatten(), minlength=vocabulary).double()
    assert counts[gold] == 0
    likely = rows * among > 20
    assert likely.sum() > 20
    assert ((counts - rows * among).abs() < 4.5 * (rows * among * (1 - among)).sqrt())[likely].all()
    assert counts[~likely].sum().item() == pytest.approx(rows * among[~likely].sum().item(), rel=0.1)


def test_a_sure_prediction_still_gives_distinct_tokens():
    logits = torch.full((1, 6, 1000), -300.0)  # their exp underflows in float32
    logits[..., 3], logits[..., 900] = 300.0, 280.0
    drawn = draw_reject_tokens(logits, torch.tensor([[3] * 6]), 20)
    assert all(len(set(row)) == 20 and 3 not in row and 900 in row for row in drawn[0].tolist())


# ---- tkpo_loss and fused_reject_tokens


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])  # 8: all response positions at once
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("trainable", [True, False], ids=["trained_head", "frozen_head"])
def test_fused_loss_is_the_formula_in_value_and_gradient(batch, chunk_size, reduction, trainable):
    hidden, weight = batch["hidden"].clone().requires_grad_(), batch["weight"].clone().requires_grad_(trainable)
    expected = loss_by_hand(hidden @ weight.T, batch["labels"], batch["rejects"], reduction)
    inputs = [hidden, weight] if trainable else [hidden]
    grads = torch.autograd.grad(expected["loss"], inputs)

    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        states = batch["hidden"].to(dtype).requires_grad_()
        head = batch["weight"].to(dtype).requires_grad_(trainable)
        rejects = flat(batch["rejects"], batch["labels"])
        result = tkpo_loss(
            states, batch["labels"], head, rejects, reduction=reduction, chunk_size=chunk_size, preference_weight=LAMBDA
        )
        for name, value in expected.items():
            assert float(getattr(result, name)) == pytest.approx(float(value), abs=tolerance), name
        assert int(result.num_sequences) == B
        found = torch.autograd.grad(result.loss, [states, head] if trainable else [states])
        for ours, theirs in zip(found, grads, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), theirs, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("trainable", [True, False], ids=["trained_head", "frozen_head"])
def test_fused_gradients_pass_gradcheck(batch, reduction, trainable):
    def loss(hidden, weight):
        rejects = flat(batch["rejects"], batch["labels"])
        return tkpo_loss(hidden, batch["labels"], weight, rejects, reduction=reduction, chunk_size=3).loss

    inputs = batch["hidden"].requires_grad_(), batch["weight"].requires_grad_(trainable)
    assert torch.autograd.gradcheck(loss, inputs, atol=1e-6, rtol=1e-5)


def test_gradient_scales_with_what_comes_after_the_loss(batch):
    grads = []
    for factor in (1.0, -3.0):
        hidden = batch["hidden"].clone().requires_grad_()
        rejects = flat(batch["rejects"], batch["labels"])
        (factor * tkpo_loss(hidden, batch["labels"], batch["weight"], rejects).loss).backward()
        grads.append(hidden.grad)
    torch.testing.assert_close(grads[1], -3 * grads[0])


def test_only_the_loss_carries_a_gradient(batch):
    rejects = flat(batch["rejects"], batch["labels"])
    result = tkpo_loss(batch["hidden"].requires_grad_(), batch["labels"], batch["weight"], rejects)
    assert [name for name, value in vars(result).items() if value.requires_grad] == ["loss", "token_losses"]


@pytest.mark.parametrize("off", ["rejects", "weight"])
def test_without_preference_it_is_the_cross_entropy_of_torch(batch, off):
    hidden = batch["hidden"].float().requires_grad_()
    reference = batch["hidden"].float().requires_grad_()
    rejects = None if off == "rejects" else flat(batch["rejects"], batch["labels"])
    weight = batch["weight"].float()
    result = tkpo_loss(hidden, batch["labels"], weight, rejects, preference_weight=0.5 if off == "rejects" else 0.0)
    rows = [torch.nn.functional.cross_entropy(reference[b] @ weight.T, batch["labels"][b]) for b in range(B)]
    expected = sum(rows) / B
    torch.testing.assert_close(result.loss, expected)
    assert result.preference == 0 and torch.equal(result.cross_entropy, result.loss.detach())
    torch.testing.assert_close(
        *(torch.autograd.grad(x, y)[0] for x, y in ((result.loss, hidden), (expected, reference)))
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("trainable", [True, False], ids=["trained_head", "frozen_head"])
def test_a_row_without_response_adds_nothing(batch, reduction, trainable):
    labels = batch["labels"].clone()
    labels[1] = IGNORE_INDEX
    results, grads = [], []
    for rows in ([0, 1, 2], [0, 2]):
        hidden = batch["hidden"][rows].clone().requires_grad_()
        weight = batch["weight"].clone().requires_grad_(trainable)
        rejects = flat(batch["rejects"], labels)  # the same six positions both times
        results.append(tkpo_loss(hidden, labels[rows], weight, rejects, reduction=reduction, chunk_size=4))
        results[-1].loss.backward()
        grads.append((hidden.grad, weight.grad))
    for name, value in vars(results[0]).items():
        torch.testing.assert_close(value, getattr(results[1], name), msg=name)
    assert int(results[0].num_sequences) == 2
    assert grads[0][0][1].count_nonzero() == 0
    torch.testing.assert_close(grads[0][0][[0, 2]], grads[1][0])
    if trainable:
        torch.testing.assert_close(grads[0][1], grads[1][1])


@pytest.mark.parametrize("trainable", [True, False], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_any_response_gives_a_connected_zero(batch, trainable, reduction):
    labels = torch.full_like(batch["labels"], IGNORE_INDEX)
    hidden, weight = batch["hidden"].requires_grad_(), batch["weight"].requires_grad_(trainable)
    rejects = fused_reject_tokens(hidden, labels, weight, K)
    assert rejects.shape == (0, K) and rejects.dtype == torch.long
    for given in (rejects, None):
        hidden.grad = None
        result = tkpo_loss(hidden, labels, weight, given, reduction=reduction)
        assert not any(float(value.sum()) for value in vars(result).values())
        result.loss.backward()
        assert hidden.grad.shape == hidden.shape and hidden.grad.count_nonzero() == 0
    assert not trainable or weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("number", [8, 8.0, torch.tensor(8)])
def test_num_sequences_divides_the_sum_over_sequences(batch, number):
    rejects = flat(batch["rejects"], batch["labels"])
    own = tkpo_loss(batch["hidden"], batch["labels"], batch["weight"], rejects)
    given = tkpo_loss(batch["hidden"], batch["labels"], batch["weight"], rejects, num_sequences=number)
    for name in ("loss", "cross_entropy", "preference"):
        torch.testing.assert_close(getattr(given, name), getattr(own, name) * B / 8)
    for name in ("reward", "accuracy", "num_sequences"):  # these stay what they are for this batch
        assert torch.equal(getattr(given, name), getattr(own, name))


def test_fused_errors(batch):
    rejects = flat(batch["rejects"], batch["labels"])
    with pytest.raises(ValueError, match="8 response positions but reject tokens for 7"):
        tkpo_loss(batch["hidden"], batch["labels"], batch["weight"], rejects[:-1])
    with pytest.raises(ValueError, match="unknown reduction"):
        tkpo_loss(batch["hidden"], batch["labels"], batch["weight"], rejects, reduction="sum")
    with pytest.raises(ValueError, match="expected hidden"):
        tkpo_loss(batch["hidden"][:, 1:], batch["labels"], batch["weight"], rejects)
    with pytest.raises(ValueError, match="expected hidden"):
        tkpo_loss(batch["hidden"], batch["labels"], batch["weight"].T, rejects)


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_fused_rejects_are_the_plain_ones_in_row_major_order(batch, chunk_size):
    plain = draw_reject_tokens(batch["logits"], batch["labels"], K, "topk")
    fused = fused_reject_tokens(
        batch["hidden"], batch["labels"], batch["weight"], K, sampler="topk", chunk_size=chunk_size
    )
    assert fused.tolist() == flat(plain, batch["labels"]).tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fused_rejects_are_distinct_never_gold_and_reproducible(batch, sampler):
    def draw():
        generator = torch.Generator().manual_seed(0)
        return fused_reject_tokens(
            batch["hidden"].requires_grad_(), batch["labels"], batch["weight"], V - 1, sampler, generator, chunk_size=3
        )

    gold = [v for v in batch["labels"].flatten().tolist() if v != IGNORE_INDEX]
    assert [set(row) for row in draw().tolist()] == [set(range(V)) - {v} for v in gold]
    assert torch.equal(draw(), draw()) and not draw().requires_grad


def test_fused_rejects_follow_the_law_across_chunks():
    """As the plain draw: a head that turns a constant state into LOGITS, 20,000 positions, chunks of 999."""
    labels = torch.full((2, DRAWS // 2), GOLD)
    drawn = fused_reject_tokens(
        torch.ones(2, DRAWS // 2, 1),
        labels,
        torch.tensor(LOGITS).unsqueeze(1),
        num_rejects=2,
        generator=torch.Generator().manual_seed(0),
        chunk_size=999,
    )
    total = sum(math.exp(x) for i, x in enumerate(LOGITS) if i != GOLD)
    q = {i: math.exp(x) / total for i, x in enumerate(LOGITS) if i != GOLD}
    pairs = list(combinations(q, 2))
    found = [tuple(sorted(pair)) for pair in drawn.tolist()]
    law = [q[a] * q[b] / (1 - q[a]) + q[b] * q[a] / (1 - q[b]) for a, b in pairs]
    assert chisquare([found.count(pair) for pair in pairs], [DRAWS * p for p in law]).pvalue > 1e-3


@pytest.mark.parametrize("trainable", [True, False], ids=["trained_head", "frozen_head"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_stays_near_the_float32_plain_form(batch, trainable, weight_dtype):
    """States in bfloat16 beside a head in bfloat16 or float32: logits are rounded to 8 bits, sums are not."""
    hidden16, weight16 = batch["hidden"].bfloat16(), batch["weight"].bfloat16()
    hidden32, weight32 = hidden16.float().requires_grad_(), weight16.float().requires_grad_(trainable)
    plain = loss_by_hand((hidden32 @ weight32.T).double(), batch["labels"], batch["rejects"])
    plain["loss"].backward()
    hidden, weight = hidden16.clone().requires_grad_(), weight16.to(weight_dtype).requires_grad_(trainable)
    result = tkpo_loss(hidden, batch["labels"], weight, flat(batch["rejects"], batch["labels"]), chunk_size=3)
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    for name in ("loss", "cross_entropy", "preference", "reward"):
        assert float(getattr(result, name)) == pytest.approx(float(plain[name]), rel=0.01), name
    pairs = [(hidden, hidden32)] + [(weight, weight32)] * trainable
    for ours, theirs in pairs:
        assert ours.grad.dtype == ours.dtype
        error = (ours.grad.float() - theirs.grad).norm() / theirs.grad.norm()
        assert error < 0.02


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation gives out."""

    largest, calls = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest, self.calls = max([self.largest, *sizes]), self.calls + 1
        return out


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("trainable", [True, False], ids=["trained_head", "frozen_head"])
def test_no_more_than_a_chunk_of_logits_exists_forward_and_backward(sampler, trainable):
    """61 positions, 997 words, chunks of 8: no tensor is larger than 8 x 997."""
    words, chunk, count = 997, 8, 61
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, count, 4, generator=generator).requires_grad_()
    weight = torch.randn(words, 4, generator=generator).requires_grad_(trainable)
    labels = torch.randint(words, (1, count), generator=generator)
    with LargestTensor() as forward:
        rejects = fused_reject_tokens(hidden, labels, weight, 3, sampler, chunk_size=chunk)
        loss = tkpo_loss(hidden, labels, weight, rejects, chunk_size=chunk).loss
    with LargestTensor() as backward:
        loss.backward()
    assert forward.largest == chunk * words  # the logits of a chunk: the mode does see them
    assert backward.largest <= chunk * words and backward.calls > 5
    with LargestTensor() as plain:
        draw_reject_tokens(hidden @ weight.T, labels, 3, sampler)
    assert plain.largest == count * words


# ---- prompt contrast and soft caps


def test_prompt_contrast_is_its_formula():
    log_probs, flipped = torch.tensor([-1.0, -0.2, -3.0]), torch.tensor([-2.0, -0.1, -1.0])
    rows, weights = torch.tensor([0, 0, 1]), torch.tensor([0.5, 2.0, 1.0])
    found = prompt_contrast_loss(log_probs, flipped, rows, 2, 0.3)
    sums = [(-1.0 + 2.0) + (-0.2 + 0.1), -3.0 + 1.0]
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-0.3 * s)) for s in sums], abs=1e-6)
    found = prompt_contrast_loss(log_probs, flipped, rows, 2, 0.3, weights)
    sums = [0.5 * 1.0 + 2.0 * -0.1, -2.0]
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-0.3 * s)) for s in sums], abs=1e-6)


def test_total_variation_of_known_distributions():
    """Under the identity as head: p = (.5, .5, 0), q = (.5, 0, .5) differ by one half."""
    big = 40.0
    states, flipped = torch.tensor([[big, big, 0.0]]), torch.tensor([[big, 0.0, big]])
    assert total_variation(states, flipped, torch.eye(3)).tolist() == pytest.approx([0.5], abs=1e-6)
    assert total_variation(states, states, torch.eye(3)).tolist() == [0.0]


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_fused_contrast_and_soft_cap_are_autograd_on_plain_logits(frozen, softcap):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, weight, flipped = draw(2, 5, 6), draw(11, 6), draw(6, 6)
    labels = torch.tensor([[-100, 3, 4, 5, -100], [1, 2, 9, -100, -100]])
    rejects = torch.stack([torch.tensor([0, 7, 10, 8])] * 6)
    settings = {"tau": 0.3, "preference_weight": 0.6, "chunk_size": 4, "softcap": softcap}
    contrast = {"contrast_weight": 0.8, "contrast_beta": 0.4, "contrast_positions": "total_variation"}

    def inputs():
        return [x.clone().requires_grad_(not (frozen and x is weight)) for x in (hidden, weight, flipped)]

    h, w, f = inputs()
    result = tkpo_loss(h, labels, w, rejects, flipped_states=f, **settings, **contrast)
    result.loss.backward()

    def log_probs(states):
        logits = states @ w2.T
        return (logits if softcap is None else softcap * (logits / softcap).tanh()).log_softmax(-1)

    h2, w2, f2 = inputs()
    mask = labels != -100
    gold, rows = labels[mask].unsqueeze(-1), mask.nonzero()[:, 0]
    ours, theirs = log_probs(h2[mask]), log_probs(f2)
    distance = (ours.exp() - theirs.exp()).abs().sum(-1).detach() / 2
    picked = ours.exp().gather(-1, torch.cat([gold, rejects], dim=-1)) / 0.3
    total = 0
    for row in (0, 1):
        own = rows == row
        reward = picked[own].softmax(-1)[:, 0].mean()
        gap = ((ours - theirs).gather(-1, gold)[:, 0] * distance)[own].sum()
        total += -ours.gather(-1, gold)[own].mean() - 0.6 * reward.log() - 0.8 * (0.4 * gap).sigmoid().log()
    total = total / 2
    total.backward()
    assert float(result.loss) == pytest.approx(float(total), abs=1e-10)
    for ours, theirs in ((h, h2), (w, w2), (f, f2)):
        if ours.requires_grad:
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-10, rtol=1e-8)


def test_drawing_sees_the_soft_cap():
    """A cap far below the logits' differences makes the likeliest tokens nearly equal, but keeps their order."""
    hidden, labels = torch.tensor([[[9.0, 8.0, 1.0, 0.0]]]), torch.tensor([[3]])
    generator = torch.Generator().manual_seed(0)
    drawn = [
        int(fused_reject_tokens(hidden, labels, torch.eye(4), 1, generator=generator, softcap=0.01)) for _ in range(300)
    ]
    assert min(drawn.count(token) for token in (0, 1, 2)) > 60
