"""Learning-rate schedules, and which rows a step takes: pure functions of the step."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from grpo_safe.algorithm.order import derived_seed, rows_of_step
from grpo_safe.algorithm.schedule import learning_rate


@pytest.mark.parametrize(
    ("step", "schedule", "warmup", "min_lr", "expected"),
    [
        (1, "linear", 0.2, 0.0, 0.5),
        (2, "linear", 0.2, 0.0, 1.0),
        (3, "linear", 0.2, 0.0, 1.0),
        (6, "linear", 0.2, 0.0, 0.625),
        (10, "linear", 0.2, 0.0, 0.125),
        (10, "linear", 0.2, 0.1, 0.2125),
        (6, "linear", 0.2, 0.1, 0.6625),
        (1, "cosine", 0.2, 0.0, 0.5),
        (7, "cosine", 0.2, 0.0, 0.5),
        (5, "cosine", 0.2, 0.0, 0.5 * (1 + math.cos(math.pi / 4))),
        (10, "cosine", 0.2, 0.0, 0.5 * (1 + math.cos(math.pi * 7 / 8))),
        (10, "cosine", 0.2, 0.25, 0.25 + 0.375 * (1 + math.cos(math.pi * 7 / 8))),
        (1, "constant", 0.0, 0.0, 1.0),
        (10, "constant", 0.3, 0.5, 1.0),
        (3, "constant", 0.3, 0.0, 1.0),
        (1, "constant", 0.3, 0.0, 1 / 3),
        (10, "linear", 1.0, 0.0, 1.0),
    ],
)
def test_worked_rates(step, schedule, warmup, min_lr, expected):
    assert learning_rate(step, 10, 1.0, schedule, warmup, min_lr) == pytest.approx(expected, abs=1e-12)
    assert learning_rate(step, 10, 3e-5, schedule, warmup, min_lr) == pytest.approx(3e-5 * expected, abs=1e-15)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_rates_rise_then_fall_and_stay_in_bounds(schedule, total):
    rates = [learning_rate(step, total, 2.0, schedule, 0.1, 0.05) for step in range(1, total + 1)]
    warm = round(0.1 * total)
    assert all(a < b for a, b in pairwise(rates[:warm]))
    assert all(a > b for a, b in pairwise(rates[warm:]))  # the first step after the warm-up has the whole rate
    assert rates[warm] == max(rates) == 2.0
    assert rates[-1] > 0.1


@pytest.mark.parametrize(("total", "per_step"), [(10, 3), (3, 2), (4, 9), (7, 7), (1, 3)])
def test_each_epoch_is_a_permutation_across_step_borders(total, per_step):
    taken = [row for step in range(1, 4 * total + 1) for row in rows_of_step(total, per_step, step, seed=5)]
    epochs = [taken[first : first + total] for first in range(0, len(taken) - total + 1, total)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)


def test_order_follows_the_seed_and_the_epoch():
    first = rows_of_step(50, 50, 1, 0)
    assert first == rows_of_step(50, 50, 1, 0)
    assert first != rows_of_step(50, 50, 2, 0)
    assert first != rows_of_step(50, 50, 1, 1)
    assert first != list(range(50))
    assert rows_of_step(50, 10, 3, 0) == first[20:30]  # a resumed run needs no data position


def test_derived_seed_depends_on_every_part_and_its_place():
    seeds = [derived_seed(*parts) for parts in [(0, 1, 2), (1, 1, 2), (0, 2, 2), (0, 1, 3), (2, 1, 0), (0, 1)]]
    assert len(set(seeds)) == len(seeds)
    assert derived_seed(0, 1, 2) == seeds[0]
    assert all(0 <= s < 2**32 for s in seeds)
