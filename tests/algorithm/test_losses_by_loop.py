"""Every surrogate with every reduction against a loop over tokens: value, gradient, and what is logged."""

from __future__ import annotations

import inspect
import math
import random

import pytest
import torch

from grpo_safe.algorithm import losses
from grpo_safe.algorithm.losses import Denominators, policy_gradient
from grpo_safe.records import PolicyOutputs, TrainBatch

Dual = tuple[float, float]  # a value and its derivative with respect to one log-prob


def clip_by_loop(rho: float, a: float, low: float, high: float, delta: float | None = None) -> Dual:
    """min(min(rho, delta) A, clip(rho) A): value and derivative by log pi."""
    bounded = min(max(rho, 1 - low), 1 + high)
    capped = rho if delta is None else min(rho, delta)
    if capped * a <= bounded * a:
        return capped * a, capped * a if capped == rho else 0.0
    return bounded * a, bounded * a if bounded == rho else 0.0


def by_loop(kind, numbers, reduction, logps, old, ref, sampler, mask, advantages, sequences, tokens, kl, kl_coef, cap):
    """(loss, d loss / d logps), in floats. The gradient is the formula's derivative, token by token."""
    n, c = len(logps), len(logps[0])
    loss, gradient = 0.0, [[0.0] * c for _ in range(n)]
    for i in range(n):
        inside = [t for t in range(c) if mask[i][t]]
        for t in inside:
            weight = 1.0 if cap is None else min(cap, math.exp(old[i][t] - sampler[i][t]))
            per = {"sequence_mean": sequences * len(inside), "token_mean": tokens, "constant": sequences * 20}[reduction]
            a = advantages[i][t]
            if kind == "clip":
                value, slope = clip_by_loop(math.exp(logps[i][t] - old[i][t]), a, **numbers)
                loss -= weight * value / per
                gradient[i][t] -= weight * slope / per
            elif kind == "gspo":
                s = math.exp(sum(logps[i][u] - old[i][u] for u in inside) / len(inside))
                value, slope = clip_by_loop(s, a, **numbers)
                loss -= weight * value / per
                for u in inside:
                    gradient[i][u] -= weight * slope / len(inside) / per
            else:
                rho = min(math.exp(logps[i][t] - old[i][t]), numbers["eps_max"])
                loss -= weight * rho * a * logps[i][t] / per
                gradient[i][t] -= weight * rho * a / per
            if ref is not None:
                d = logps[i][t] - ref[i][t]
                value, slope = {"k1": (d, 1.0), "k2": (d * d / 2, d), "k3": (math.exp(-d) + d - 1, 1 - math.exp(-d))}[kl]
                loss += kl_coef * value / per
                gradient[i][t] += kl_coef * slope / per
    return loss, gradient


SURROGATES = [
    ("clip", losses.clip, {"eps_low": 0.2, "eps_high": 0.2}, {"low": 0.2, "high": 0.2}),
    ("clip", losses.clip, {"eps_low": 0.2, "eps_high": 0.28}, {"low": 0.2, "high": 0.28}),
    ("clip", losses.clip, {"eps_low": 0.1, "eps_high": 0.4, "delta": 1.6}, {"low": 0.1, "high": 0.4, "delta": 1.6}),
    ("gspo", losses.gspo, {}, {"low": 3e-4, "high": 4e-4}),
    ("gspo", losses.gspo, {"eps_low": 0.3, "eps_high": 0.1}, {"low": 0.3, "high": 0.1}),
    ("cispo", losses.cispo, {}, {"eps_max": 5.0}),
    ("cispo", losses.cispo, {"eps_max": 1.1}, {"eps_max": 1.1}),
]
REDUCTIONS = {"sequence_mean": losses.sequence_mean, "token_mean": losses.token_mean, "constant": losses.constant(20)}


def test_every_surrogate_and_reduction_of_the_module_is_here() -> None:
    makers = {name for name, f in inspect.getmembers(losses, inspect.isfunction) if f.__module__ == losses.__name__}
    parts = {kind for kind, *_ in SURROGATES} | set(REDUCTIONS) | set(losses.KL_ESTIMATORS)
    assert {name for name in makers if not name.startswith("_")} == parts | {"policy_gradient"}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("kind", "make", "numbers", "loop_numbers"), SURROGATES, ids=lambda v: str(v)[:24])
def test_value_and_gradient_equal_the_loop(kind, make, numbers, loop_numbers, reduction, seed) -> None:
    rng = random.Random(seed)
    n, c = rng.randint(2, 6), rng.randint(3, 7)
    lengths = [0, 1, c, *(rng.randint(0, c) for _ in range(n))][:n] if n > 2 else [c, 1]
    mask = [[int(t < length) for t in range(c)] for length in lengths]
    logps = [[rng.gauss(-2, 1) for _ in range(c)] for _ in range(n)]
    spread = 0.3 if seed else 1e-4  # gspo's published clip acts within 3e-4
    old = [[x + rng.gauss(0, spread) for x in row] for row in logps]
    ref = [[x + rng.gauss(0, 1) for x in row] for row in logps] if seed % 2 else None
    sampler = [[x + rng.gauss(0, 1) for x in row] for row in old]
    rows = [rng.gauss(0, 1) for _ in range(n)]
    per_token = seed == 3 and kind != "gspo"
    advantages = [[rng.gauss(0, 1) if per_token else a for _ in range(c)] for a in rows]
    kl, cap, kl_coef = rng.choice(["k1", "k2", "k3"]), rng.choice([None, 2.0]), 0.3
    sequences, tokens = n + 3.0, sum(lengths) + 7.0  # other ranks' counts are in it

    def double(rows) -> torch.Tensor:
        return torch.tensor(rows, dtype=torch.float64)

    tensor = double(logps).requires_grad_()
    m = torch.tensor(mask)
    prompt = torch.ones(n, 2, dtype=torch.long)
    batch = TrainBatch(
        prompt, prompt, torch.ones_like(m), m, m.sum(1), double(sampler), double(advantages if per_token else rows), double(old),
        None if ref is None else double(ref),
    )  # fmt: skip
    loss_fn = policy_gradient(make(**numbers), REDUCTIONS[reduction], losses.KL_ESTIMATORS[kl], kl_coef, 0.0, cap)
    loss, sums = loss_fn(PolicyOutputs(tensor), batch, Denominators(sequences, tokens))
    expected, gradient = by_loop(
        kind, loop_numbers, reduction, logps, old, ref, sampler, mask, advantages, sequences, tokens, kl, kl_coef, cap
    )
    assert abs(expected) > 1e-6
    assert float(loss.detach()) == pytest.approx(expected, abs=1e-12)
    (found,) = torch.autograd.grad(loss, tensor)
    assert torch.allclose(found, double(gradient), atol=1e-12, rtol=0)
    assert (cap is None) == ("sampler_weight" not in sums) and (ref is None) == ("kl" not in sums)
    if cap is not None:
        weights = [min(2.0, math.exp(old[i][t] - sampler[i][t])) for i in range(n) for t in range(c) if mask[i][t]]
        assert float(sums["sampler_weight"]) == pytest.approx(sum(weights))


@pytest.mark.parametrize(
    ("rho", "advantage", "value", "slope", "clipped"),
    [
        (1.25, 1.0, -1.25, -1.25, 0),  # below 1 + eps_high = 1.28
        (1.5, 1.0, -1.28, 0.0, 1),
        (0.5, -1.0, 0.8, 0.0, 1),
        (3.0, -2.0, 6.0, 6.0, 0),  # a bad token that became likely keeps its push
        (5.0, -2.0, 8.0, 0.0, 0),  # but for delta = 4
    ],
)
def test_asymmetric_and_two_sided_clip_by_hand(rho, advantage, value, slope, clipped) -> None:
    logps = torch.tensor([[math.log(rho)]], dtype=torch.float64, requires_grad=True)
    found = losses.clip(0.2, 0.28, 4.0)(logps, torch.zeros_like(logps), torch.tensor([[advantage]]).double(), torch.ones(1, 1))
    assert float(found.loss.detach()) == pytest.approx(value)
    assert float(torch.autograd.grad(found.loss.sum(), logps)[0]) == pytest.approx(slope)
    assert float(found.clipped) == clipped


def test_on_policy_gspo_and_cispo_have_the_gradient_of_grpo() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])
    prompt = torch.ones(2, 1, dtype=torch.long)
    gradients = []
    for make in (losses.clip, losses.gspo, losses.cispo):
        logps = torch.full((2, 4), -1.5, dtype=torch.float64, requires_grad=True)
        batch = TrainBatch(prompt, prompt, mask, mask, mask.sum(1), torch.zeros(2, 4), torch.tensor([1.0, -2.0]).double())
        loss, _ = policy_gradient(make(), losses.sequence_mean, losses.k3, 0.0, 0.0)(
            PolicyOutputs(logps), batch, Denominators(2.0, 5.0)
        )
        gradients.append(torch.autograd.grad(loss, logps)[0])
    assert gradients[0][0, 0] == pytest.approx(-1 / 3 / 2) and gradients[0][0, 3] == 0.0
    assert torch.allclose(gradients[0], gradients[1]) and torch.allclose(gradients[0], gradients[2])
