"""PPO-C's calibrated reward against loops over floats, alone and inside a comparison."""

from __future__ import annotations

import math
import random

import pytest
import torch

from grpo_safe.algorithm.comparison import StepScores, compare
from grpo_safe.algorithm.confidence import CALIBRATIONS, difference, none, threshold
from grpo_safe.config import AlgoConfig
from grpo_safe.rewards import Objectives
from grpo_safe.stages.train_policy.method import build_method


def slow(name: str, steps, weight: float, rate: float, bound: float) -> tuple[list[float], float]:
    """The last step's rewards and running mean; steps is the history of (rewards, valid, confidences)."""
    mean = None
    for rewards, valid, confidences in steps:
        held = [min(bound, max(-bound, r)) for r in rewards]
        inside = [r for r, v in zip(held, valid, strict=True) if v]
        now = math.fsum(inside) / len(inside) if inside else (mean or 0.0)
        mean = now if mean is None else rate * now + (1 - rate) * mean if inside else mean
        out = []
        for r, c in zip(held, confidences, strict=True):
            step = (
                weight * (r - mean) * (c - 0.5)
                if name == "difference"
                else weight * abs(r) * (c - 0.5) * (1 if r >= mean else -1)
            )
            out.append(r + step)
    return out, mean


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["difference", "threshold"])
def test_equals_the_loop_over_several_steps(name: str, seed: int) -> None:
    rng = random.Random(seed)
    numbers, state, steps = {"weight": 1.5, "rate": 0.3, "bound": 2.0}, {}, []
    for _ in range(4):
        rewards = [rng.gauss(0.3, 1.5) for _ in range(6)]
        valid = [rng.random() < 0.8 for _ in rewards] if seed else [False] * 6 if len(steps) == 2 else [True] * 6
        steps.append((rewards, valid, [rng.choice([0.0, 0.5, 1.0, rng.random()]) for _ in rewards]))
        double = [torch.tensor(column, dtype=torch.float64) for column in (rewards, steps[-1][2])]
        found = CALIBRATIONS[name](double[0], torch.tensor(valid), double[1], state, **numbers)
        state = found.state
        expected, mean = slow(name, steps, **numbers)
        assert found.rewards.tolist() == pytest.approx(expected, rel=1e-12)
        assert state == {"mean": pytest.approx(mean, rel=1e-12)}


def test_confidence_pays_where_the_answer_is_good_and_costs_where_it_is_bad() -> None:
    rewards, confidence = torch.tensor([0.9, 0.9, 0.1, 0.1]), torch.tensor([1.0, 0.0, 1.0, 0.0])
    for function in (difference, threshold):
        sure, unsure, wrong, doubting = function(rewards, torch.ones(4).bool(), confidence, {}).rewards.tolist()
        assert sure > unsure and doubting > wrong
    assert none(rewards, torch.ones(4).bool(), confidence, {}).rewards is rewards


def test_in_a_comparison_it_stands_before_penalties_and_keeps_its_state() -> None:
    method = build_method(
        AlgoConfig(group_size=2, calibration={"name": "difference", "weight": 2.0, "rate": 0.5}, normalization="centred"),
        Objectives(["safety"], [1.0], [0], [None]), {}, 8,
    )  # fmt: skip
    values, extra = torch.tensor([[0.8], [0.4], [0.6], [0.2]]), torch.tensor([0.0, 0.0, -0.3, 0.0])
    scores = StepScores(values, torch.ones(4, 1).bool(), extra, torch.zeros(4), torch.tensor([1.0, 0.5, 0.0, 1.0]))
    found = compare(method.order, method.slots, scores, torch.ones(1), {"calibration": {"mean": 0.3}})
    mean = 0.5 * 0.5 + 0.5 * 0.3
    expected = [0.8 + 2 * (0.8 - mean) * 0.5, 0.4, 0.6 - 2 * (0.6 - mean) * 0.5 - 0.3, 0.2 + 2 * (0.2 - mean) * 0.5]
    assert found.rewards.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.state["calibration"] == {"mean": pytest.approx(mean)}
    plain = build_method(AlgoConfig(group_size=2), Objectives(["safety"], [1.0], [0], [None]), {}, 8)
    assert "calibration" not in compare(plain.order, plain.slots, scores, torch.ones(1), {}).state
    assert not plain.asks_confidence and method.asks_confidence
