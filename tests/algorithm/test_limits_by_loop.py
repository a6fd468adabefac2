"""Limits against the loop: multipliers, windows, caps, delays, mixed advantages, and the gradient of the pessimistic cost."""

from __future__ import annotations

import itertools
import json
import math
import random

import by_loops
import pytest
import torch
from scipy.stats import t as student

from grpo_safe.algorithm.constraints import CONSTRAINTS, Limit, lagrangian, limit_bound, pessimistic


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def drawn_step(rng: random.Random, groups: int, size: int, k: int):
    """(advantages, scores, valid) with missing scores, a group that ties and one without a valid completion."""
    advantages, scores, valid = [], [], []
    for group in range(groups):
        level = rng.random()
        for _ in range(size):
            ok = group != 1 and rng.random() < 0.85
            row = [level if group == 0 else min(1.0, max(0.0, rng.gauss(level, 0.2))) for _ in range(k)]
            scores.append([math.nan if rng.random() < 0.1 else s for s in row])
            valid.append(ok)
            advantages.append(rng.gauss(0, 1) if ok else 0.0)
    return advantages, scores, valid


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_four_steps_equal_the_loop(name, seed) -> None:
    rng = random.Random(seed)
    groups, size, k = rng.randint(2, 5), rng.randint(2, 5), rng.randint(2, 3)
    limits = [(j, rng.choice([0.3, 0.6, 0.9]), rng.choice([None, 0.8, 0.95])) for j in range(rng.randint(1, k))]
    numbers = {
        "rate": rng.choice([0.1, 1.5]), "initial": rng.choice([0.5, 1.0]), "maximum": rng.choice([1.1, 5.0]),
        "window": rng.choice([5, 17, 256]), "delay": rng.choice([0, 2]), "baseline": rng.choice(["group", "batch"]),
        "normalize": rng.random() < 0.5,
    }  # fmt: skip
    if name == "pessimistic":
        numbers |= {
            "safety_prompts": rng.choice([50, 1000]),
            "c1": rng.choice([1.0, 4.0]),
            "c2": 2.0,
            "floor": rng.choice([0.01, 0.3]),
        }
    history, state = [], {}
    for _ in range(4):
        step = drawn_step(rng, groups, size, k)
        history.append(step)
        found = CONSTRAINTS[name](
            double(step[0]), double(step[1]), torch.tensor(step[2]), size, [Limit(*limit) for limit in limits], state, **numbers
        )
        mixed, multipliers, means, lows = by_loops.constrained(history, size, limits, pessimism=name == "pessimistic", **numbers)
        inside = [i for i, ok in enumerate(step[2]) if ok]
        assert [found.advantages.tolist()[i] for i in inside] == pytest.approx([mixed[i] for i in inside], abs=1e-9)
        assert [r.multiplier for r in found.reports] == pytest.approx(multipliers, rel=1e-10)
        assert [r.mean for r in found.reports] == pytest.approx(means, abs=1e-12, nan_ok=True)
        assert [r.low for r in found.reports] == pytest.approx(lows, abs=1e-9)
        for report, (_, at_least, confidence) in zip(found.reports, limits, strict=True):
            assert report.holds == ((report.mean if confidence is None else report.low) >= at_least)
        state = json.loads(json.dumps(found.state))  # as a resumed run gets it back
        assert all(len(costs) <= max(numbers["window"], groups * size) for costs in state["costs"])


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_the_multiplier_waits_rises_to_its_cap_and_falls_when_the_limit_holds(name) -> None:
    def run(score: float, steps: int, state: dict, **numbers):
        seen = []
        for _ in range(steps):
            found = CONSTRAINTS[name](
                torch.zeros(8), torch.full((8, 1), score), torch.ones(8).bool(), 4, [Limit(0, 0.5)], state,
                rate=0.5, initial=1.0, maximum=2.0, window=8, delay=3, **numbers,
            )  # fmt: skip
            state = found.state
            seen.append(found.reports[0].multiplier)
        return seen, state

    rising, state = run(0.1, 12, {})
    assert rising[:3] == [1.0, 1.0, 1.0]
    assert rising[3] == pytest.approx(math.exp(0.5 * 0.4))  # no spread: the bound is the mean
    assert rising[-1] == pytest.approx(2.0) and all(a <= b for a, b in itertools.pairwise(rising))
    falling, _ = run(0.9, 12, state)
    assert falling[0] == pytest.approx(2.0 * math.exp(0.5 * 2.0 * -0.4))  # a cap does not wind up
    assert all(a > b > 0 for a, b in itertools.pairwise(falling))


def test_kappa_counts_the_prompts_that_the_window_holds() -> None:
    """Half of the completions have no score: they are no sample of the bound."""
    scores = torch.tensor([0.2, 0.4, math.nan, math.nan, 0.6, 0.7, math.nan, math.nan], dtype=torch.float64)[:, None].repeat(3, 1)
    advantages, valid = torch.zeros(24, dtype=torch.float64), torch.ones(24, dtype=torch.bool)
    found = pessimistic(advantages, scores, valid, 4, [Limit(0, 0.5, 0.9)], {}, rate=0.1, safety_prompts=10**9)
    costs = [0.5 - s for s in scores[:, 0].tolist() if math.isfinite(s)]
    kappa = student.ppf(0.9, 3 - 1) / math.sqrt(3)  # 12 scored completions = 3 prompts' worth, not 6
    bound = by_loops.average(costs) + kappa * by_loops.spread(costs)
    assert math.log(found.reports[0].multiplier) == pytest.approx(0.1 * bound, abs=1e-5)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_pessimistic_cost_has_the_gradient_of_mean_plus_kappa_std(confidence) -> None:
    """A categorical policy over five completions, its batch drawn in exact proportion (arXiv 2506.08266; methods.md 2.A.2)."""
    counts, size = [1600, 900, 700, 500, 300], 4
    n = sum(counts)
    costs = double([0.9, 0.1, -0.4, 0.35, -0.1])
    pi = double(counts) / n
    logits = pi.log().requires_grad_()
    prompts = n // size
    kappa = student.ppf(confidence, prompts - 1) / prompts**0.5 + 5 * student.ppf(confidence, 99) / 10
    logps = logits.log_softmax(0)
    mean = (logps.exp() * costs).sum()
    bound = mean + kappa * ((logps.exp() * costs.square()).sum() - mean.square()).sqrt()
    (wanted,) = torch.autograd.grad(bound, logits, retain_graph=True)
    (of_the_mean,) = torch.autograd.grad(mean, logits, retain_graph=True)

    which = torch.repeat_interleave(torch.arange(5), torch.tensor(counts))
    found = pessimistic(
        torch.zeros(n, dtype=torch.float64), (0.5 - costs[which])[:, None], torch.ones(n, dtype=torch.bool), size,
        [Limit(0, 0.5, confidence)], {}, window=n, safety_prompts=100, c2=5.0, normalize=False,
    )  # fmt: skip
    multiplier = found.reports[0].multiplier
    pushed = -found.advantages * (1 + multiplier) / multiplier  # augmented costs minus the batch's mean
    (gradient,) = torch.autograd.grad((pushed * logps[which]).mean(), logits)
    assert (gradient - wanted).norm() < 1e-3 * wanted.norm()  # Bessel's factor n / (n - 1) is left
    assert (of_the_mean - wanted).norm() > 0.05 * wanted.norm()


def test_group_and_batch_baselines_differ_where_a_whole_group_breaks_the_limit() -> None:
    scores = double([[0.1], [0.1], [0.9], [0.9]])
    arguments = (torch.zeros(4, dtype=torch.float64), scores, torch.ones(4, dtype=torch.bool), 2, [Limit(0, 0.6)], {})
    batch = lagrangian(*arguments, baseline="batch", normalize=False)
    assert batch.advantages[:2].max() < 0 < batch.advantages[2:].min()
    group = lagrangian(*arguments, baseline="group", normalize=False)
    assert group.advantages.tolist() == [0.0] * 4
    assert group.reports[0].no_spread and not batch.reports[0].no_spread
    multiplier = batch.reports[0].multiplier
    assert batch.advantages.tolist() == pytest.approx([s * 0.4 * multiplier / (1 + multiplier) for s in (-1, -1, 1, 1)])


def test_the_bound_is_students_t_over_prompts() -> None:
    numbers = double([0.2, 0.5, 0.9, 0.4])
    mean, low = limit_bound(numbers, 0.9)
    assert mean == pytest.approx(0.5)
    assert low == pytest.approx(0.5 - 1.637744 * math.sqrt((0.09 + 0 + 0.16 + 0.01) / 3) / 2, abs=1e-6)  # t(.9, 3) from tables
    assert limit_bound(numbers[:1], 0.9) == (pytest.approx(0.2), -math.inf)
    assert math.isnan(limit_bound(numbers[:0], 0.9)[0])
