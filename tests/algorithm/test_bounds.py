"""Numbers at the ends of their ranges: the last rate of a run, a log-ratio that float32 cannot raise e to, a prompt that repeats."""

from __future__ import annotations

import math

import pytest
import torch

from grpo_safe.algorithm.losses import k3
from grpo_safe.algorithm.order import occurrences
from grpo_safe.algorithm.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("total", [1, 2, 10, 100])
def test_every_step_trains(schedule: str, warmup: float, total: int) -> None:
    rates = [learning_rate(step, total, 1.0, schedule, warmup, 0.0) for step in range(1, total + 1)]
    assert min(rates) > 0
    assert max(rates) == 1.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rates_are_those_of_transformers(schedule: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=0, num_training_steps=10)
    for step in range(1, 11):
        assert learning_rate(step, 10, 1.0, schedule, 0.0, 0.0) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("log_ratio", [-95.0, 0.0, 19.0, 21.0, 95.0, 1000.0])
def test_k3_stays_finite(log_ratio: float) -> None:
    policy = torch.tensor([0.0], requires_grad=True)
    value = k3(policy, torch.tensor([log_ratio]))
    value.sum().backward()
    assert value.isfinite().all() and policy.grad.isfinite().all() and value >= 0
    if log_ratio < 20:
        assert float(value) == pytest.approx(math.expm1(log_ratio) - log_ratio, rel=1e-6)
        assert float(policy.grad) == pytest.approx(-math.expm1(log_ratio), rel=1e-6)


def test_occurrences() -> None:
    assert occurrences(["a", "b", "a", "a", "c", "b"]) == [0, 0, 1, 2, 0, 1]
    assert occurrences([]) == []
