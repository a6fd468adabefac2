"""grpo_loss against a loop over tokens, by hand, and its gradient."""

from __future__ import annotations

import math

import pytest
import torch
from grpo import grpo_loss

from grpo_safe.algorithm.losses import Denominators, k3
from grpo_safe.records import PolicyOutputs, TrainBatch


def batch_of(mask, advantages, old=None, ref=None) -> TrainBatch:
    mask = torch.as_tensor(mask)
    n, c = mask.shape
    prompt = torch.ones(n, 2, dtype=torch.long)
    return TrainBatch(
        prompt, prompt, torch.ones(n, c, dtype=torch.long), mask, mask.sum(1), torch.zeros(n, c), torch.as_tensor(advantages),
        old, ref,
    )  # fmt: skip


def by_loop(logps, entropy, batch: TrainBatch, eps, kl_coef, entropy_coef, sequences):
    """The formula, token by token; also how many tokens are clipped."""
    total, clipped = torch.zeros((), dtype=torch.float64), 0
    for i in range(len(batch)):
        count, row = 0, torch.zeros((), dtype=torch.float64)
        for t in range(logps.shape[1]):
            if not batch.completion_mask[i, t]:
                continue
            count += 1
            a = float(batch.advantages[i])
            old = logps[i, t].detach() if batch.old_logps is None else batch.old_logps[i, t]
            rho = torch.exp(logps[i, t] - old)
            bounded = min(max(float(rho.detach()), 1 - eps), 1 + eps)
            objective = rho * a
            if bounded * a < float(rho.detach()) * a:  # the clipped term is the smaller one, and has no gradient
                objective, clipped = torch.tensor(bounded * a, dtype=torch.float64), clipped + 1
            term = -objective
            if batch.ref_logps is not None:
                quotient = torch.exp(batch.ref_logps[i, t] - logps[i, t])
                term = term + kl_coef * (quotient - torch.log(quotient) - 1)
            if entropy is not None:
                term = term - entropy_coef * entropy[i, t]
            row = row + term
        total = total + row / max(1, count)
    return total / sequences, clipped


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("given_old", [False, True])
def test_loss_and_gradient_equal_the_loop(seed, given_old):
    g = torch.Generator().manual_seed(seed)
    n, c = 5, 7

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = torch.tensor([0, 1, c, 3, 5])
    mask = (torch.arange(c) < lengths[:, None]).long()
    logps = (-2 + normal(n, c)).requires_grad_()
    entropy = normal(n, c).abs().requires_grad_()
    old = logps.detach() + 0.4 * normal(n, c) if given_old else None
    batch = batch_of(mask, normal(n), old, logps.detach() + normal(n, c))
    loss, sums = grpo_loss(0.2, 0.04, 0.01)(PolicyOutputs(logps, entropy), batch, Denominators(9.0, 1.0))
    slow, clipped = by_loop(logps, entropy, batch, 0.2, 0.04, 0.01, 9.0)
    assert float(loss.detach()) == pytest.approx(float(slow.detach()), abs=1e-12)
    assert int(sums["clipped"]) == clipped
    assert given_old == (clipped > 0)
    fast_grads = torch.autograd.grad(loss, [logps, entropy])
    for fast, by_slow in zip(fast_grads, torch.autograd.grad(slow, [logps, entropy]), strict=True):
        assert torch.allclose(fast, by_slow, atol=1e-12, rtol=0)
    assert fast_grads[0][0].tolist() == [0.0] * c  # |o| = 0


@pytest.mark.parametrize(
    ("advantage", "loss", "gradient", "clipped"),
    [
        (1.0, -0.85, [0.0, -0.25], 1),  # rho 1.25 is clipped to 1.2, rho .5 is not: the mean of 1.2 and .5
        (-1.0, 1.025, [0.625, 0.0], 1),  # rho 1.25 stays, rho .5 is clipped to .8
        (0.0, 0.0, [0.0, 0.0], 0),
    ],
)
def test_clipping_by_hand(advantage, loss, gradient, clipped):
    logps = torch.tensor([[0.5, 0.25]], dtype=torch.float64).log().requires_grad_()
    old = torch.tensor([[0.4, 0.5]], dtype=torch.float64).log()
    found, sums = grpo_loss(0.2, 0.0, 0.0)(
        PolicyOutputs(logps), batch_of([[1, 1]], torch.tensor([advantage], dtype=torch.float64), old), Denominators(1.0, 2.0)
    )
    assert float(found.detach()) == pytest.approx(loss)
    assert torch.autograd.grad(found, logps)[0][0].tolist() == pytest.approx(gradient)
    assert int(sums["clipped"]) == clipped
    assert float(sums["ratio"]) == pytest.approx(1.75)
    assert "kl" not in sums and "entropy" not in sums


def test_on_policy_gradient_is_minus_advantage_over_length_over_sequences():
    logps = torch.full((2, 4), -3.0, dtype=torch.float64, requires_grad=True)
    batch = batch_of([[1, 1, 1, 1], [1, 1, 0, 0]], torch.tensor([2.0, -1.0], dtype=torch.float64))
    loss, _ = grpo_loss(0.2, 0.0, 0.0)(PolicyOutputs(logps), batch, Denominators(8.0, 6.0))
    assert float(loss.detach()) == pytest.approx(-(2.0 - 1.0) / 8)
    assert torch.autograd.grad(loss, logps)[0].tolist() == [[-2 / 4 / 8] * 4, [1 / 2 / 8, 1 / 2 / 8, 0.0, 0.0]]


def test_kl_term_by_hand():
    logps = torch.tensor([[0.25, 0.5]], dtype=torch.float64).log().requires_grad_()
    ref = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    batch = batch_of([[1, 1]], torch.zeros(1, dtype=torch.float64), None, ref)
    loss, sums = grpo_loss(0.2, 0.1, 0.0)(PolicyOutputs(logps), batch, Denominators(1.0, 2.0))
    assert float(sums["kl"]) == pytest.approx(2 - math.log(2) - 1)
    assert float(loss.detach()) == pytest.approx(0.1 * (1 - math.log(2)) / 2)
    # d k3 / d log pi = 1 - pi_ref / pi
    assert torch.autograd.grad(loss, logps)[0][0].tolist() == pytest.approx([0.1 * (1 - 2) / 2, 0.0])


def test_entropy_is_logged_without_a_coefficient_and_rewarded_with_one():
    logps = torch.full((1, 2), -1.0)
    entropy = torch.tensor([[1.0, 3.0]])
    batch = batch_of([[1, 1]], torch.zeros(1))
    without, sums = grpo_loss(0.2, 0.0, 0.0)(PolicyOutputs(logps, entropy), batch, Denominators(1.0, 2.0))
    with_bonus, _ = grpo_loss(0.2, 0.0, 0.5)(PolicyOutputs(logps, entropy), batch, Denominators(1.0, 2.0))
    assert float(sums["entropy"]) == 4.0
    assert float(without) == 0.0
    assert float(with_bonus) == pytest.approx(-0.5 * 2.0)


@pytest.mark.parametrize("given_old", [False, True])
def test_positions_outside_the_mask_never_reach_the_loss(given_old):
    """A confident policy gives the pad token a log-prob of -200: exp(200) is inf, and inf * 0 would be nan."""
    logps = torch.tensor([[-1.0, -200.0], [-200.0, -200.0]], requires_grad=True)
    old = torch.tensor([[-1.0, 0.0], [-350.0, -400.0]]) if given_old else None
    batch = batch_of([[1, 0], [0, 0]], torch.tensor([1.0, 1.0]), old, torch.tensor([[-1.0, 0.0], [-1.0, 0.0]]))
    loss, sums = grpo_loss(0.2, 0.04, 0.0)(PolicyOutputs(logps), batch, Denominators(2.0, 1.0))
    assert float(loss.detach()) == pytest.approx(-0.5)
    assert torch.autograd.grad(loss, logps)[0].tolist() == [[-0.5, 0.0], [0.0, 0.0]]
    assert float(sums["kl"]) == 0.0 and float(sums["ratio"]) == 1.0 and float(sums["clipped"]) == 0.0


def test_logged_sums_carry_no_gradient():
    logps = torch.full((1, 2), -1.0, requires_grad=True)
    batch = batch_of([[1, 1]], torch.ones(1), None, torch.full((1, 2), -1.5))
    _, sums = grpo_loss(0.2, 0.04, 0.01)(PolicyOutputs(logps, -logps), batch, Denominators(1.0, 2.0))
    assert sorted(sums) == ["clipped", "entropy", "kl", "ratio"]
    assert not any(value.requires_grad for value in sums.values())


def test_k3_has_its_value_and_is_never_negative():
    log_ratio = torch.linspace(-30, 10, 4001, dtype=torch.float64)
    found = k3(torch.zeros_like(log_ratio), log_ratio)
    assert torch.allclose(found, log_ratio.exp() - log_ratio - 1, rtol=1e-9, atol=1e-14)
    assert bool((found >= 0).all())
    near = torch.cat([torch.logspace(-9, -2, 500), -torch.logspace(-9, -2, 500)])
    small = k3(torch.zeros_like(near), near)  # float32, where exp(x) - x - 1 would round to +-6e-8
    assert bool((small >= -1e-14).all())
    big_enough = near.abs() > 1e-4
    assert torch.allclose(small[big_enough], near[big_enough] ** 2 / 2, rtol=2e-2)


def test_mean_k3_estimates_the_kl_divergence():
    torch.manual_seed(0)
    pi, ref = torch.randn(6, dtype=torch.float64).softmax(0), torch.randn(6, dtype=torch.float64).softmax(0)
    exact = float((pi * (pi / ref).log()).sum())
    assert float((pi * k3(pi.log(), ref.log())).sum()) == pytest.approx(exact, abs=1e-12)
