"""compare() in both orders against the loop: missing scores, NaN, ties, penalties, limits and filter, over three steps."""

from __future__ import annotations

import json
import math
import random
from functools import partial

import by_loops
import pytest
import torch

from grpo_safe.algorithm.advantages import NORMALIZATIONS, whitened
from grpo_safe.algorithm.aggregation import AGGREGATIONS
from grpo_safe.algorithm.comparison import ORDERS, Slots, StepScores, compare
from grpo_safe.algorithm.constraints import Limit, lagrangian
from grpo_safe.algorithm.filters import FILTERS
from grpo_safe.stages.train_policy.method import RAW_ONLY

NUMBERS = {"gated": {"objective": 1}}
MULTIPLIERS = {"rate": 0.7, "initial": 1.0, "maximum": 3.0, "window": 20}


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def slots_of(aggregation, normalization, size, tau, filter_="everything", limits=(), whiten=False) -> Slots:
    return Slots(
        partial(AGGREGATIONS[aggregation], **NUMBERS.get(aggregation, {})), NORMALIZATIONS[normalization], FILTERS[filter_],
        partial(lagrangian, **MULTIPLIERS), whitened if whiten else None, size, 1e-3, tau, list(limits),
    )  # fmt: skip


def drawn(rng: random.Random, size: int, groups: int, k: int):
    """Scores, mask, penalty, noise: a group of ties, one with a single complete completion, holes and NaN anywhere."""
    values, mask = [], []
    for group in range(groups):
        level = [rng.random() for _ in range(k)]
        for i in range(size):
            row = level if group == 0 else [rng.choice([rng.random(), rng.random(), level[j]]) for j in range(k)]
            hole = rng.choices([None, "missing", "nan"], [8, 1, 1])[0] if group else None
            if group == 1 and i:
                hole = "nan"
            at = 0 if group == 1 else rng.randrange(k)
            values.append([math.nan if hole == "nan" and j == at else 5.0 if hole and j == at else row[j] for j in range(k)])
            mask.append([not (hole == "missing" and j == at) for j in range(k)])
    extra = [rng.choice([0.0, -0.5, -0.1]) if i >= size else 0.0 for i in range(len(values))]
    return values, mask, extra, [rng.random() for _ in values]


def aggregate_first(steps, weights, aggregation, normalization, size, tau):
    """(rewards, valid, advantages) of the last step."""
    history, used = [], [k for k, w in enumerate(weights) if w]
    for values, mask, _, _ in steps:
        known = [[m and math.isfinite(x) for x, m in zip(v, ms, strict=True)] for v, ms in zip(values, mask, strict=True)]
        clean = [[x if ok else 0.0 for x, ok in zip(v, oks, strict=True)] for v, oks in zip(values, known, strict=True)]
        history.append((clean, [all(oks[k] for k in used) for oks in known]))
    rewards = []
    for t, (_, valid) in enumerate(history):
        summed = by_loops.AGGREGATIONS[aggregation](history[: t + 1], weights, **NUMBERS.get(aggregation, {}))
        rewards.append(([r + e if v else 0.0 for r, e, v in zip(summed, steps[t][2], valid, strict=True)], valid))
    return *rewards[-1], by_loops.NORMALIZATIONS[normalization](rewards, size, tau, 1e-3)


def normalize_first(steps, weights, aggregation, normalization, size, tau, whiten):
    used, columns, valids = [k for k, w in enumerate(weights) if w], {}, []
    for values, mask, _, _ in steps:
        nan = [any(m[k] and not math.isfinite(v[k]) for k in used) for v, m in zip(values, mask, strict=True)]
        valids.append([not bad and any(m[k] for k in used) for bad, m in zip(nan, mask, strict=True)])
    for k in used:
        column = []
        for (values, mask, _, _), valid in zip(steps, valids, strict=True):
            known = [ok and m[k] for ok, m in zip(valid, mask, strict=True)]
            column.append(([v[k] if ok else 0.0 for v, ok in zip(values, known, strict=True)], known))
        columns[k] = by_loops.NORMALIZATIONS[normalization](column, size, tau, 1e-3)
    values, mask, extra, _ = steps[-1]
    valid = valids[-1]
    z = [[columns[k][i] if k in columns else 0.0 for k in range(len(weights))] for i in range(len(valid))]
    combined = by_loops.AGGREGATIONS[aggregation]([(z, valid)], weights)
    combined = [c + e if ok else 0.0 for c, e, ok in zip(combined, extra, valid, strict=True)]
    if whiten:
        combined = by_loops.whitened([(combined, valid)], size, 0.0, 0.0)
    rewards = []
    for v, m, ok in zip(values, mask, valid, strict=True):
        here = [k for k in used if m[k]]
        rewards.append(sum(weights[k] * v[k] for k in here) / sum(abs(weights[k]) for k in here) if ok else 0.0)
    return rewards, valid, combined


def check_three_steps(order, slots, weights, rng, size, by_loop):
    steps, state, mixed = [], {}, []
    for _ in range(3):
        steps.append(drawn(rng, size, rng.randint(3, 5), len(weights)))
        values, mask, extra, noise = steps[-1]
        scores = StepScores(double(values), torch.tensor(mask), double(extra), double(noise))
        found = compare(ORDERS[order], slots, scores, double(weights), state)
        rewards, valid, advantages = by_loop(steps)
        assert found.valid.tolist() == valid and not all(valid)
        assert found.rewards.tolist() == pytest.approx(rewards, abs=1e-10)
        if slots.limits:
            seen = [[x if m else math.nan for x, m in zip(v, ms, strict=True)] for v, ms in zip(values, mask, strict=True)]
            mixed.append((advantages, seen, valid))
            limits = [(limit.objective, limit.at_least, limit.confidence) for limit in slots.limits]
            advantages, multipliers, _, _ = by_loops.constrained(mixed, size, limits, **MULTIPLIERS)
            assert [r.multiplier for r in found.limits] == pytest.approx(multipliers)
        name = next(n for n, f in FILTERS.items() if f is slots.keep)
        factors = by_loops.FILTERS[name](rewards, valid, size, noise)
        expected = [a * f for a, f in zip(advantages, factors, strict=True)]
        assert found.groups.advantages.tolist() == pytest.approx(expected, abs=1e-9)
        assert any(abs(a) > 0.01 for a in expected)
        assert [a for a, ok in zip(found.groups.advantages.tolist(), valid, strict=True) if not ok] == [0.0] * valid.count(False)
        state = json.loads(json.dumps(found.state))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("normalization", ["group_std", "leave_one_out", "whitened", "running_clip"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregate_first_equals_the_loop(aggregation, normalization, seed) -> None:
    rng = random.Random(10 + seed)
    size, weights, tau = rng.randint(3, 5), [1.0, 0.5, rng.choice([0.0, 2.0])], rng.choice([0.0, 0.3])
    slots = slots_of(aggregation, normalization, size, [tau])
    check_three_steps(
        "aggregate_first", slots, weights, rng, size,
        lambda steps: aggregate_first(steps, weights, aggregation, normalization, size, tau),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("aggregation", [name for name in AGGREGATIONS if name not in RAW_ONLY])
def test_normalize_first_equals_the_loop(aggregation, normalization, whiten, seed) -> None:
    rng = random.Random(20 + seed)
    size, tau = rng.randint(3, 5), rng.choice([0.0, 0.3])
    weights = [1.0, 0.5 if aggregation == "soft_min" else -0.5, rng.choice([0.0, 2.0])]
    slots = slots_of(aggregation, normalization, size, [tau], whiten=whiten)
    check_three_steps(
        "normalize_first", slots, weights, rng, size,
        lambda steps: normalize_first(steps, weights, aggregation, normalization, size, tau, whiten),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("filter_", FILTERS)
@pytest.mark.parametrize("order", ORDERS)
def test_limits_then_the_filter_equal_the_loop(order, filter_, seed) -> None:
    rng = random.Random(30 + seed)
    size, weights = rng.randint(3, 5), [1.0, 0.5, 0.0]
    limits = [Limit(2, 0.7, 0.9), Limit(0, 0.4)]  # the first has no weight: its NaN leaves the completion in
    slots = slots_of("total", "group_std", size, [0.0], filter_, limits)

    def by_loop(steps):
        if order == "aggregate_first":
            return aggregate_first(steps, weights, "total", "group_std", size, 0.0)
        return normalize_first(steps, weights, "total", "group_std", size, 0.0, False)

    check_three_steps(order, slots, weights, rng, size, by_loop)


@pytest.mark.parametrize(
    ("order", "of_the_one_that_misses"), [("aggregate_first", [False, 0.0]), ("normalize_first", [True, 1.0])]
)
def test_a_missing_score_and_a_nan_by_hand(order, of_the_one_that_misses) -> None:
    """Four completions, two heads: complete, complete, the second head missing, the second head NaN."""
    values = double([[0.0, 0.0], [0.5, 1.0], [1.0, 9.0], [0.7, math.nan]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True]])
    scores = StepScores(values, mask, torch.zeros(4), torch.zeros(4))
    found = compare(ORDERS[order], slots_of("total", "group_std", 4, [0.0]), scores, double([1.0, 1.0]), {})
    assert found.valid.tolist() == [True, True, of_the_one_that_misses[0], False]
    # its own head: (1 - .5) / .5 = 1; the missing one adds 0
    assert found.groups.advantages[2:].tolist() == pytest.approx([of_the_one_that_misses[1], 0.0], abs=1e-3)
