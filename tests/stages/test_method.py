"""build_method: what it refuses and why, and a user's own function in each slot."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from grpo_safe.algorithm.advantages import GroupAdvantages
from grpo_safe.algorithm.aggregation import Aggregated
from grpo_safe.algorithm.comparison import StepScores, compare
from grpo_safe.algorithm.constraints import Constrained, LimitReport
from grpo_safe.algorithm.losses import Denominators, Surrogate
from grpo_safe.config import AlgoConfig, LimitConfig
from grpo_safe.errors import UserError
from grpo_safe.records import PolicyOutputs, TrainBatch
from grpo_safe.rewards import Objectives
from grpo_safe.stages.train_policy.method import RAW_ONLY, build_method

NAMES = ["safety", "politeness", "charm"]
SCALES = {"safety": "absolute", "politeness": "absolute", "charm": "relative"}  # charm was fitted on pairs only


def built(weights=(1.0, 1.0, 0.0), limits=None, moving=None, **algo):
    limits = {name: LimitConfig(**numbers) for name, numbers in (limits or {}).items()}
    objectives = Objectives(NAMES, list(weights), [0, 1, 2], [None] * 3, moving or {}, limits)
    return build_method(AlgoConfig(group_size=2, **algo), objectives, SCALES, 8)


def slot(name: str) -> object:
    return {"name": "gated", "objective": "safety"} if name == "gated" else name


@pytest.mark.parametrize("name", sorted(RAW_ONLY))
def test_raw_score_aggregations_refuse_a_relative_head_and_normalized_scores(name) -> None:
    with pytest.raises(
        UserError, match=f"algo.aggregation={name}: charm was fitted on pairs only .* choose linear, or give it weight 0"
    ):
        built((1.0, 1.0, 0.5), aggregation=slot(name))
    with pytest.raises(UserError, match=f"{name} works on raw scores; choose algo.order=aggregate_first"):
        built(aggregation=slot(name), order="normalize_first")
    with pytest.raises(UserError, match="charm was fitted on pairs only"):  # a weight that only comes later counts too
        built(aggregation=slot(name), moving={"charm": 1.0})
    assert built(aggregation=slot(name)).slots.limits == []  # with weight 0 the relative head is in nobody's way


@pytest.mark.parametrize("name", sorted({*RAW_ONLY, "soft_min"}))
def test_a_negative_weight_is_refused_at_either_end_of_the_run(name) -> None:
    for weights, moving in (((1.0, -0.5, 0.0), {}), ((1.0, 0.5, 0.0), {"politeness": -0.5})):
        with pytest.raises(
            UserError, match=r"objectives.politeness.weight(_end)? below 0: it has no meaning there; choose linear"
        ):
            built(weights, aggregation=slot(name), moving=moving)
        assert built(weights, aggregation="linear", moving=moving)


def test_a_gate_needs_a_weight_else_nobody_checks_that_its_score_is_there() -> None:
    with pytest.raises(UserError, match=r"algo.aggregation=gated with objectives.safety.weight=0"):
        built((0.0, 1.0, 0.0), aggregation=slot("gated"))


def test_limits_refuse_a_relative_head_and_name_the_rest_in_order() -> None:
    with pytest.raises(UserError, match=r"objectives.charm.limit: .* its scale is relative and has no threshold"):
        built(limits={"charm": {"at_least": 0.5}})
    limits = built(limits={"politeness": {"at_least": 0.4}, "safety": {"at_least": 0.8, "confidence": 0.9}}).slots.limits
    assert [(limit.objective, limit.at_least, limit.confidence) for limit in limits] == [(1, 0.4, None), (0, 0.8, 0.9)]


@pytest.mark.parametrize(
    ("algo", "sentence"),
    [
        ({"order": "sideways"}, "algo.order=sideways: expected one of aggregate_first, normalize_first"),
        ({"normalization": "zscore"}, "algo.normalization=zscore: expected one of group_std"),
        ({"filter": "best"}, "algo.filter=best: expected one of everything"),
        (
            {"constraint": {"name": "pessimistic", "kappa": 2}},
            "algo.constraint.kappa: pessimistic has no such number; it has rate",
        ),
        ({"constraint": {"name": "lagrangian"}}, "algo.constraint=lagrangian: no objective has a limit"),
        (
            {"normalization": {"name": "running_clip", "cap": 2}},
            "algo.normalization.cap: running_clip has no such number; it has clip",
        ),
        ({"normalization": {"name": "running_clip", "state": {}}}, "algo.normalization.state: running_clip has no such number"),
        (
            {"aggregation": {"name": "linear", "weights": [1, 2]}},
            "algo.aggregation.weights: linear has no such number; it has none",
        ),
        ({"loss": {"name": "clip", "eps_low": 0.1}}, "algo.loss.eps_low: clip has no such number"),
        ({"reduction": "median"}, "algo.reduction=median: expected one of sequence_mean"),
        ({"kl_estimator": "k4"}, "algo.kl_estimator=k4: expected one of k1, k2, k3"),
        ({"filter": "math.nothing_there"}, "algo.filter=math.nothing_there: no such function"),
        ({"loss": "math.pi"}, "algo.loss=math.pi: not a function"),
    ],
)
def test_unknown_names_and_numbers_are_refused_with_what_there_is(algo, sentence) -> None:
    limits = {"safety": {"at_least": 0.5}} if algo.get("constraint", {}).get("name") == "pessimistic" else None
    with pytest.raises(UserError, match=sentence):
        built(limits=limits, **algo)


@pytest.fixture
def own(monkeypatch) -> None:
    """A module of the user's, with one function per slot."""
    module = ModuleType("my_slots")

    def product(values, valid, weights, state, power=1.0):
        return Aggregated(values.prod(-1) ** power, {"calls": state.get("calls", 0) + 1})

    def double(rewards, valid, group_size, tau, tie_spread, state=None, factor=2.0):
        groups = torch.zeros(len(rewards) // group_size)
        return GroupAdvantages(factor * rewards, groups, groups.bool(), {"seen": len(rewards)})

    def first_only(rewards, valid, group_size, noise):
        return torch.eye(group_size, dtype=rewards.dtype)[0].repeat(len(rewards) // group_size)

    def shift(advantages, scores, valid, group_size, limits, state, by=0.0):
        return Constrained(
            advantages + by, [LimitReport(0.5, 0.4, True, 1.0, False)] * len(limits), {"step": state.get("step", 0) + 1}
        )

    def plain(scale=1.0):
        def surrogate(logps, old_logps, advantages, mask):
            return Surrogate(-scale * advantages * logps, torch.zeros_like(logps), torch.ones_like(logps))

        return surrogate

    for function in (product, double, first_only, shift, plain):
        setattr(module, function.__name__, function)
    monkeypatch.setitem(sys.modules, "my_slots", module)


def test_a_function_of_ones_own_works_in_every_slot(own) -> None:
    method = built(
        (1.0, 1.0, 1.0),
        limits={"safety": {"at_least": 0.5}},
        aggregation={"name": "my_slots.product", "power": 2.0},
        normalization={"name": "my_slots.double", "factor": 10.0},
        filter="my_slots.first_only",
        constraint={"name": "my_slots.shift", "by": 0.25},
        loss={"name": "my_slots.plain", "scale": 3.0},
        kl_coef=0.0,
    )
    values = torch.tensor([[0.5, 1.0, 1.0], [1.0, 1.0, 1.0], [0.2, 1.0, 1.0], [1.0, 1.0, 0.1]])
    scores = StepScores(values, torch.ones(4, 3).bool(), torch.zeros(4), torch.zeros(4))
    found = compare(method.order, method.slots, scores, torch.ones(3), {})
    assert found.rewards.tolist() == pytest.approx([0.25, 1.0, 0.04, 0.01])
    assert found.groups.advantages.tolist() == pytest.approx([2.75, 0.0, 0.65, 0.0])
    assert found.state == {"aggregation": {"calls": 1}, "normalization": {"seen": 4}, "limits": {"step": 1}}
    again = compare(method.order, method.slots, scores, torch.ones(3), found.state).state
    assert again["aggregation"] == {"calls": 2} and again["limits"] == {"step": 2}

    one = torch.ones(1, 1, dtype=torch.long)
    batch = TrainBatch(one, one, one, one, one[0], torch.zeros(1, 1), torch.tensor([2.0]))
    loss, _ = method.loss.function(PolicyOutputs(torch.tensor([[-1.0]])), batch, Denominators(1.0, 1.0))
    assert float(loss) == pytest.approx(-3.0 * 2.0 * -1.0)


def test_a_number_that_ones_own_function_lacks_is_refused(own) -> None:
    with pytest.raises(UserError, match=r"algo.filter.keep: my_slots.first_only has no such number; it has none"):
        built(filter={"name": "my_slots.first_only", "keep": 2})


def test_the_loss_asks_for_entropy_with_gradient_only_where_a_bonus_needs_it() -> None:
    assert built().loss.entropy == "detached" and built(entropy_coef=0.01).loss.entropy == "kept"
    assert built(kl_in="reward", kl_estimator="k1").reward_kl is not None
    assert built(kl_in="reward", kl_coef=0.0).reward_kl is None and built(kl_in="loss").reward_kl is None
