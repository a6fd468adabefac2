"""One number out of several objectives where that is not a plain sum: the best step's reward, weights that cross 0, a limit's mean cost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grpo_safe.algorithm.aggregation import linear
from grpo_safe.algorithm.constraints import CONSTRAINTS, Limit
from grpo_safe.config import AlgoConfig, ObjectiveConfig
from grpo_safe.errors import UserError
from grpo_safe.rewards import Objectives, choose_objectives
from grpo_safe.stages.train_policy.finishing import validation_reward
from grpo_safe.stages.train_policy.method import build_method

NAN = float("nan")


def rewarded(aggregation: Any, scores: list[list[float]], weights: tuple[float, ...] = (1.0, 3.0)) -> float:
    objectives = Objectives(["safety", "charm"], list(weights), [0, 1], [None, None])
    method = build_method(AlgoConfig(aggregation=aggregation), objectives, {"safety": "absolute", "charm": "absolute"}, 8)
    s: Any = SimpleNamespace(objectives=objectives, method=method)
    return validation_reward(s, torch.tensor(scores))


def test_the_best_step_is_judged_by_the_aggregation_of_the_run() -> None:
    even, uneven = [[0.5, 0.5], [0.5, 0.5]], [[0.01, 0.9], [0.01, 0.9]]
    assert rewarded("linear", even) == pytest.approx(0.5)
    assert rewarded("linear", uneven) == pytest.approx((0.01 + 3 * 0.9) / 4)  # .6775: the better one
    assert rewarded("geometric", even) == pytest.approx(0.5)
    assert rewarded("geometric", uneven) == pytest.approx(0.01**0.25 * 0.9**0.75)  # .292: the worse one
    gated = {"name": "gated", "objective": "safety", "at_least": 0.5, "bonus": 1.0, "penalty": 2.0}
    assert rewarded(gated, [[0.6, 0.2], [0.4, 0.8]]) == pytest.approx((1.2 + 0.4 - 2.0) / 2)  # completion by completion


def test_a_completion_without_a_score_has_no_reward_in_the_validation() -> None:
    assert rewarded("linear", [[0.4, 0.8], [0.9, NAN]]) == pytest.approx((0.4 + 3 * 0.8) / 4)
    assert rewarded("linear", [[0.4, NAN], [0.9, 0.5]], (1.0, 0.0)) == pytest.approx(0.65)
    assert rewarded("linear", [[0.4, NAN]]) != rewarded("linear", [[0.4, NAN]])  # nan: never the best


def chosen(**ends: tuple[float, float | None]) -> Objectives:
    return choose_objectives({name: ObjectiveConfig(weight=a, weight_end=b) for name, (a, b) in ends.items()}, list(ends))


def test_weights_that_cross_0_together_are_refused() -> None:
    with pytest.raises(UserError, match=r"^objectives: every weight is 0 at 50% of the run.*weight_end: safety"):
        chosen(safety=(1.0, -1.0))
    with pytest.raises(UserError, match=r"0 at 25% of the run.*weight_end: charm, safety"):
        chosen(safety=(1.0, -3.0), charm=(-0.5, 1.5), logged=(0.0, None))
    for fine in (
        {"safety": (1.0, -1.0), "charm": (1.0, None)},
        {"safety": (1.0, -1.0), "charm": (1.0, -3.0)},
        {"safety": (1.0, -1.0), "charm": (0.0, 1.0)},
        {"safety": (1.0, 0.0), "charm": (0.0, 1.0)},
    ):
        objectives = chosen(**fine)  # type: ignore[arg-type]
        assert min(float(objectives.weights_at(step, 101).abs().sum()) for step in range(1, 102)) > 0.1


def test_no_weight_is_no_reward_and_no_nan() -> None:
    assert linear(torch.ones(2, 2), torch.ones(2).bool(), torch.zeros(2), {}).rewards.tolist() == [0.0, 0.0]
    assert linear(
        torch.tensor([[0.2, 0.6]]), torch.ones(1).bool(), torch.tensor([1.0, -1.0]), {}
    ).rewards.item() == pytest.approx(-0.2)


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_limit_sees_a_whole_step_however_short_its_window(name: str) -> None:
    """The first half of the step breaks the limit by .4, the second keeps it by .2: the mean cost is .1, not -.2."""
    scores = torch.cat([torch.full((200, 1), 0.1), torch.full((200, 1), 0.7)])
    numbers = {"window": 128, "rate": 1.0} | ({"c1": 0.0, "c2": 0.0} if name == "pessimistic" else {"maximum": 9.0})
    found = CONSTRAINTS[name](torch.zeros(400), scores, torch.ones(400).bool(), 4, [Limit(0, 0.5)], {}, **numbers)
    assert found.reports[0].multiplier == pytest.approx(torch.tensor(0.1).exp().item(), rel=1e-5)
    assert len(found.state["costs"][0]) == 400
    later = CONSTRAINTS[name](torch.zeros(4), scores[-4:], torch.ones(4).bool(), 4, [Limit(0, 0.5)], found.state, **numbers)
    assert len(later.state["costs"][0]) == 128
