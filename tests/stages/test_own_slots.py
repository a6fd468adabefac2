"""A function of one's own in a slot of algo is tried on a made-up step: what would die in the loop ends in one sentence before any model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import stage_config

from grpo_safe.algorithm.advantages import GroupAdvantages
from grpo_safe.algorithm.aggregation import Aggregated
from grpo_safe.algorithm.confidence import Calibrated
from grpo_safe.algorithm.constraints import Constrained, LimitReport
from grpo_safe.algorithm.losses import Loss, Surrogate
from grpo_safe.config import AlgoConfig, LimitConfig
from grpo_safe.errors import UserError
from grpo_safe.models.reference import Choice
from grpo_safe.rewards import Objectives
from grpo_safe.stages import train_policy
from grpo_safe.stages.train_policy.method import build_method

HERE = __name__  # the functions below are the user's


def whole_loss():
    return Loss(lambda outputs, batch, denominators: (outputs.logps.sum(), {}))


def surrogate_itself(logps, old_logps, advantages, mask):
    return Surrogate(-advantages * logps, mask, mask)


def no_function():
    return 1.0


def per_completion():
    return lambda logps, old, advantages, mask: Surrogate(-(advantages * logps).sum(-1), mask, mask)


def bare_tensor():
    return lambda logps, old, advantages, mask: -advantages * logps


def without_gradient():
    return lambda logps, old, advantages, mask: Surrogate(-advantages * logps.detach(), mask, mask)


def infinite():
    return lambda logps, old, advantages, mask: Surrogate(-advantages * logps / (logps - old), mask, mask)


def steep():
    return lambda logps, old, advantages, mask: Surrogate((logps - old).abs().sqrt() * advantages + logps, mask, mask)


def greedy():
    def surrogate(logps, old, advantages, mask):
        advantages.mul_(2)
        return Surrogate(-advantages * logps, mask, mask)

    return surrogate


def mean_only(values, valid, weights, state):
    return values.mean(-1)


def three_arguments(values, valid, weights):
    return Aggregated(values.mean(-1), {})


def column(values, valid, weights, state):
    return Aggregated(values.mean(-1, keepdim=True), state)


def logarithm(values, valid, weights, state):
    return Aggregated((values - 1).log().sum(-1), state)


def keeps_tensor(values, valid, weights, state):
    return Aggregated(values.mean(-1), {"mean": values.mean()})


def loses_its_state(values, valid, weights, state):
    means = state.get("means", {0: 0.0})
    return Aggregated(values.mean(-1) - means[0], {"means": means})  # json makes the key a string


def rescales(values, valid, weights, state):
    weights /= weights.sum()
    return Aggregated(values @ weights, state)


def by_weight(values, valid, weights, state):
    return Aggregated((values / weights).sum(-1), state)


def as_rewards(rewards, valid, confidence, state):
    return rewards


def list_of_rewards(rewards, valid, confidence, state):
    return Calibrated(rewards.tolist(), state)


def own_std(rewards, valid, group_size, tau, tie_spread, state):
    groups = rewards.view(-1, group_size)
    found = (groups - groups.mean(-1, keepdim=True)) / groups.std(-1, keepdim=True)  # the group of equal rewards
    return GroupAdvantages(found.reshape(-1), groups.std(-1), groups.std(-1) == 0, {})


def soft_ties(rewards, valid, group_size, tau, tie_spread, state):
    spread = rewards.view(-1, group_size).std(-1)
    return GroupAdvantages(rewards - rewards.mean(), spread, 1.0 - spread, {})


def spread_per_completion(rewards, valid, group_size, tau, tie_spread, state):
    return GroupAdvantages(rewards - rewards.mean(), rewards, rewards < 0, {})


def best_index(rewards, valid, group_size, noise):
    return rewards.view(-1, group_size).argmax(-1)


def unreported(advantages, scores, valid, group_size, limits, state):
    return Constrained(advantages, [], state)


def share_above_one():
    return Choice(every=1, share=1.5)


def not_a_choice():
    return "start"


async def later(values, valid, weights, state):
    return Aggregated(values.mean(-1), state)


def harmonic(values, valid, weights, state, floor=0.05):
    return Aggregated(1 / (weights / weights.sum() / values.clamp(min=floor)).sum(-1), state)


def reported(advantages, scores, valid, group_size, limits, state):
    return Constrained(advantages, [LimitReport(0.5, 0.4, True, 1.0, False) for _ in limits], state)


def drawn(rewards, valid, group_size, noise):
    return (torch.rand(len(rewards)) < 0.5).float()


def built(limits: bool = False, **algo) -> object:
    named = {"a": LimitConfig(at_least=0.5)} if limits else {}
    objectives = Objectives(["a", "b"], [1.0, 3.0], [0, 1], [None, None], {}, named)
    return build_method(AlgoConfig(**{"group_size": 4} | algo), objectives, {}, 8)


@pytest.mark.parametrize(
    ("slot", "name", "said"),
    [
        ("loss", "whole_loss", r"gave a Loss .*expected its numbers -> a function \(logps"),
        ("loss", "surrogate_itself", r"TypeError: surrogate_itself\(\) missing 4 required positional arguments"),
        ("loss", "no_function", r"gave a float \(1\.0\)"),
        ("loss", "per_completion", r"gave loss a Tensor of shape \[4\] where \[4, 3\] is due"),
        ("loss", "bare_tensor", r"gave a Tensor of shape \[4, 3\]; expected .* Surrogate"),
        ("loss", "without_gradient", "without a gradient in logps"),
        ("loss", "infinite", "gave loss numbers that are not finite"),
        ("loss", "steep", "whose gradient in logps is not finite"),
        ("loss", "greedy", "changed its argument 3 in place"),
        ("aggregation", "mean_only", r"gave a Tensor of shape \[12\]; expected .* Aggregated\(rewards \[N\], state\)"),
        ("aggregation", "three_arguments", r"TypeError: three_arguments\(\) takes 3 positional arguments but 4 were given"),
        ("aggregation", "column", r"gave rewards a Tensor of shape \[12, 1\] where \[12\] is due"),
        ("aggregation", "logarithm", "gave rewards numbers that are not finite"),
        ("aggregation", "keeps_tensor", r"gave a state that no resume state can hold \(Object of type Tensor"),
        ("aggregation", "loses_its_state", r"KeyError: 0 \(.*test_own_slots\.py:\d+\)"),
        ("aggregation", "rescales", "changed its argument 3 in place"),
        ("aggregation", "later", r"gave a coroutine"),
        ("calibration", "as_rewards", r"gave a Tensor of shape \[12\]; expected .* Calibrated"),
        ("calibration", "list_of_rewards", r"gave rewards a list"),
        ("normalization", "own_std", "gave advantages numbers that are not finite"),
        ("normalization", "soft_ties", "gave tied of torch.float32"),
        ("normalization", "spread_per_completion", r"gave spread a Tensor of shape \[12\] where \[3\] is due"),
        ("filter", "best_index", r"gave a Tensor of shape \[3\] where \[12\] is due"),
        ("constraint", "unreported", r"gave reports a list \(\[\]\) for 1 limits"),
        ("reference", "share_above_one", "gave every=1, share=1.5"),
        ("reference", "not_a_choice", r"gave a str \('start'\)"),
    ],
)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_an_unfit_function_is_named_with_what_it_did(slot: str, name: str, said: str) -> None:
    with pytest.raises(UserError, match=rf"algo\.{slot}={HERE}\.{name}.* {said}"):
        built(limits=slot == "constraint", **{slot: f"{HERE}.{name}"})


@pytest.mark.parametrize(
    ("algo", "said"),
    [
        ({"aggregation": {"name": "soft_min", "sharpness": 0}}, "algo.aggregation=soft_min, sharpness=0 gave rewards numbers"),
        ({"aggregation": {"name": "soft_min", "sharpness": "much"}}, "algo.aggregation.sharpness=much: expected a number"),
        ({"loss": {"name": "dpo", "beta": "small"}, "kl_coef": 0.0}, "algo.loss.beta=small: expected a number"),
        ({"loss": {"eps_max": 2.0}}, r"algo.loss=\{'eps_max': 2.0\}: no name"),
        ({"reference": {"name": "ema", "decay": -1}}, "algo.reference=ema, decay=-1 gave every=1, share=2"),
        ({"filter": "builtins.print"}, "algo.filter=builtins.print"),
    ],
)
def test_numbers_that_no_step_survives_are_refused(algo: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        built(**algo)


def test_what_is_fit_passes_and_leaves_the_random_numbers_as_they_were() -> None:
    torch.manual_seed(3)
    first = torch.rand(1)
    torch.manual_seed(3)
    method = built(
        limits=True, aggregation=f"{HERE}.harmonic", constraint=f"{HERE}.reported", filter=f"{HERE}.drawn", group_size=2
    )
    assert torch.rand(1) == first
    assert method.slots.aggregate.func is harmonic  # the run calls it without the checks


def test_the_last_weights_are_tried_too() -> None:
    algo = AlgoConfig(aggregation=f"{HERE}.by_weight")
    build_method(algo, Objectives(["a", "b"], [1.0, 3.0], [0, 1], [None, None]), {}, 8)
    with pytest.raises(UserError, match=r"by_weight gave rewards numbers that are not finite"):
        build_method(algo, Objectives(["a", "b"], [1.0, 3.0], [0, 1], [None, None], {"b": 0.0}), {}, 8)


def test_a_stage_refuses_before_any_model_is_loaded(tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grpo_safe.models.resolve_start", lambda *_: pytest.fail("went on to the models"))
    with pytest.raises(UserError, match=rf"algo\.loss={HERE}\.whole_loss gave a Loss"):
        cfg = stage_config("train-policy", tmp_path, tiny_store, f"algo.loss={HERE}.whole_loss")
        train_policy.run(cfg, tmp_path)
