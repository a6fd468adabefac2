"""The slots of `algo` -> functions, chosen once before the loop. A slot is a name, {name: NAME, number: ...}, or an import path.

What a combination cannot use is refused here, with the reason, before any model is loaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from grpo_safe.algorithm import losses
from grpo_safe.algorithm.advantages import NORMALIZATIONS, whitened
from grpo_safe.algorithm.aggregation import AGGREGATIONS, SIGNED
from grpo_safe.algorithm.comparison import ORDERS, Order, Slots
from grpo_safe.algorithm.confidence import CALIBRATIONS
from grpo_safe.algorithm.constraints import CONSTRAINTS, Limit
from grpo_safe.algorithm.critic import ppo
from grpo_safe.algorithm.filters import FILTERS
from grpo_safe.algorithm.gflow import gflow_dpo
from grpo_safe.algorithm.preference import PREFERENCE_LOSSES
from grpo_safe.algorithm.robust import group_robust
from grpo_safe.algorithm.token_dpo import tdpo
from grpo_safe.config import AlgoConfig
from grpo_safe.data.rows import import_function
from grpo_safe.errors import UserError
from grpo_safe.models.reference import REFERENCES, Choice
from grpo_safe.rewards import Objectives
from grpo_safe.rewards.confidence import unstated
from grpo_safe.stages.train_policy.trying import called, try_loss, try_reference, try_slots

COMPARING_LOSSES: dict[str, Callable[..., losses.Loss]] = {
    **PREFERENCE_LOSSES,
    **{f.__name__: f for f in (tdpo, group_robust, gflow_dpo)},
}
RAW_ONLY = {"chebyshev", "smooth_chebyshev", "geometric", "gated", "worst_head", "max_min"}  # mean nothing on normalized scores


@dataclass(frozen=True)
class Method:
    """Everything that one `algo` preset chooses."""

    order: Order
    slots: Slots
    loss: losses.Loss
    reward_kl: Callable[..., torch.Tensor] | None  # the estimator, where the KL term stands in the reward
    uses_reference: bool
    reference: Choice
    compares: bool = False  # the loss compares completions, whoever wrote them
    asks_confidence: bool = False
    spoken: Callable[[list[str]], list[str]] = list  # what is scored of completions


def build_method(algo: AlgoConfig, objectives: Objectives, scales: dict[str, str], max_tokens: int) -> Method:
    """The functions of a preset. scales: objective -> absolute | relative, of the reward model's heads.

    Raises UserError for an unknown name or number, for slots that do not go together, and for a function that a made-up step shows to be unfit.
    """
    order = _named(algo.order, ORDERS, "algo.order")
    aggregation, name = _slot(algo.aggregation, AGGREGATIONS, "algo.aggregation", objectives.names)
    _check_aggregation(name, algo.order, objectives, scales)
    if name == "gated":
        _check_gate(algo.aggregation["objective"], objectives)
    limits = _limits(objectives, scales)
    if not limits and algo.constraint != "lagrangian":
        raise UserError(
            f"algo.constraint={_name(algo.constraint)}: no objective has a limit; give one, such as objectives.safety.limit.at_least=0.8"
        )
    if isinstance(algo.constraint, dict):
        for number in ("rate", "initial", "maximum", "window"):
            if number in algo.constraint and not algo.constraint[number] > 0:
                raise UserError(f"algo.constraint.{number}={algo.constraint[number]}: expected a number above 0")
    calibration, calibrated_by = _slot(algo.calibration, CALIBRATIONS, "algo.calibration")
    asks = calibrated_by != "none"
    if asks and (algo.order != "aggregate_first" or algo.resample_ties):
        raise UserError(
            f"algo.calibration={calibrated_by}: it changes the one reward of a completion, after ties were looked for; choose "
            "algo.order=aggregate_first and algo.resample_ties=0"
        )
    slots = Slots(
        aggregate=aggregation,
        normalize=_slot(algo.normalization, NORMALIZATIONS, "algo.normalization")[0],
        keep=_slot(algo.filter, FILTERS, "algo.filter")[0],
        constrain=_slot(algo.constraint, CONSTRAINTS, "algo.constraint")[0],
        whiten=whitened if algo.whiten else None,
        group_size=algo.group_size,
        tie_spread=algo.tie_spread,
        tau=[float(algo.tau)],
        limits=limits,
        calibrate=calibration,
    )
    if algo.whiten and algo.order != "normalize_first":
        raise UserError(
            "algo.whiten=true goes with algo.order=normalize_first; with aggregate_first choose algo.normalization=whitened"
        )
    loss = _loss(algo, max_tokens)
    if loss.gae is not None:
        _check_critic(algo, limits)
    if limits and loss.arrangement is not None:
        raise UserError(
            f"algo.loss={_name(algo.loss)}: it compares completions by their rewards, where a limit has no place; give its objective a weight "
            "instead, or choose a loss with advantages"
        )
    uses_reference = algo.kl_coef > 0 or "reference" in loss.needs
    if not uses_reference and algo.reference != "start":
        raise UserError(f"algo.reference={_name(algo.reference)}: nothing is measured against it; set algo.kl_coef above 0")
    reference = try_reference(_slot(algo.reference, REFERENCES, "algo.reference")[0], _shown(algo.reference))
    shown = {key: _shown(getattr(algo, key)) for key in ("aggregation", "calibration", "normalization", "constraint", "filter")}
    try_slots(order, slots, [objectives.weights_at(step, 2) for step in (1, 2)], shown)
    reward_kl = None if loss.gae else _reward_kl(algo)
    compares = _name(algo.loss) in COMPARING_LOSSES
    return Method(order, slots, loss, reward_kl, uses_reference, reference, compares, asks, unstated if asks else list)


def _loss(algo: AlgoConfig, max_tokens: int) -> losses.Loss:
    high = algo.clip_eps if algo.clip_eps_high is None else algo.clip_eps_high
    surrogates = {
        "clip": partial(losses.clip, algo.clip_eps, high),
        "gspo": partial(losses.gspo, algo.clip_eps, high),
        "cispo": losses.cispo,
        "ppo": partial(ppo, algo.clip_eps, algo.clip_eps_high, entropy_coef=algo.entropy_coef),
    }
    reductions = {
        "sequence_mean": losses.sequence_mean,
        "token_mean": losses.token_mean,
        "constant": losses.constant(max_tokens),
    }
    reduce = _named(algo.reduction, reductions, "algo.reduction")
    kl = _named(algo.kl_estimator, losses.KL_ESTIMATORS, "algo.kl_estimator")
    if algo.kl_coef and algo.kl_in == "loss" and algo.kl_estimator == "k1":
        raise UserError(
            "algo.kl_estimator=k1 with algo.kl_in=loss: its expected gradient is 0; choose k2 or k3, or algo.kl_in=reward"
        )
    factory, name = _slot(algo.loss, surrogates | COMPARING_LOSSES, "algo.loss")
    if name in COMPARING_LOSSES:
        _check_preference(algo, name)
        return called(factory, (), f"algo.loss={_shown(algo.loss)}", "numbers of another kind")  # type: ignore[no-any-return]
    if name == "gspo" and algo.reduction != "sequence_mean":
        raise UserError(
            f"algo.loss=gspo with algo.reduction={algo.reduction}: its ratio belongs to the whole completion; choose algo.reduction=sequence_mean"
        )
    if name == "ppo":
        return called(factory, (), f"algo.loss={_shown(algo.loss)}", "numbers of another kind")  # type: ignore[no-any-return]
    kl_coef = algo.kl_coef if algo.kl_in == "loss" else 0.0
    surrogate = try_loss(factory, _shown(algo.loss))
    function = losses.policy_gradient(surrogate, reduce, kl, kl_coef, algo.entropy_coef, algo.sampler_cap)
    advantage_only = name in surrogates and not kl_coef and not algo.entropy_coef
    return losses.Loss(function, "kept" if algo.entropy_coef else "detached", advantage_only=advantage_only)


def _check_critic(algo: AlgoConfig, limits: list[Limit]) -> None:
    """PPO's KL stands in the reward of each token; its advantages come from the critic, so what compares completions has no place."""
    if algo.kl_in != "reward" or algo.kl_estimator != "k1" or not algo.kl_coef:
        raise UserError(
            "algo.loss=ppo: its KL term stands in the reward of each token; set algo.kl_in=reward algo.kl_estimator=k1 and algo.kl_coef above 0"
        )
    if (
        limits
        or algo.filter != "everything"
        or algo.resample_ties
        or algo.sampler_cap is not None
        or algo.reduction != "token_mean"
    ):
        raise UserError(
            "algo.loss=ppo: its advantages come from a critic, token by token; leave out limits, algo.filter, algo.resample_ties and "
            "algo.sampler_cap, and set algo.reduction=token_mean"
        )


def _check_preference(algo: AlgoConfig, name: str) -> None:
    """What a loss that compares completions itself has no use for, and numbers that it divides by."""
    for number in ("beta", "gamma", "rate"):
        if isinstance(algo.loss, dict) and number in algo.loss and not (algo.loss[number] or 0) > 0:
            raise UserError(f"algo.loss.{number}={algo.loss[number]}: expected a number above 0")
    for key, unused in (
        ("kl_coef", 0.0),
        ("entropy_coef", 0.0),
        ("sampler_cap", None),
        ("clip_eps_high", None),
        ("filter", "everything"),
    ):
        if getattr(algo, key) != unused:
            raise UserError(
                f"algo.{key}={_name(getattr(algo, key))}: algo.loss={name} has no use for it; set algo.{key}={'null' if unused is None else unused}"
            )


def _reward_kl(algo: AlgoConfig) -> Callable[..., torch.Tensor] | None:
    return losses.KL_ESTIMATORS[algo.kl_estimator] if algo.kl_in == "reward" and algo.kl_coef else None


def _limits(objectives: Objectives, scales: dict[str, str]) -> list[Limit]:
    relative = [name for name in objectives.limits if scales.get(name) == "relative"]
    if relative:
        raise UserError(
            f"objectives.{relative[0]}.limit: this head was fitted on pairs only, its scale is relative and has no threshold; "
            "a limit needs a head with labels"
        )
    return [Limit(objectives.names.index(name), o.at_least, o.confidence) for name, o in objectives.limits.items()]


def _check_aggregation(name: str, order: str, objectives: Objectives, scales: dict[str, str]) -> None:
    if name not in AGGREGATIONS:
        return  # the user's own
    ends = [(w, objectives.moving.get(n, w)) for n, w in zip(objectives.names, objectives.weights, strict=True)]
    if name not in SIGNED and any(min(both) < 0 for both in ends):
        negative, first = next((n, both[0]) for n, both in zip(objectives.names, ends, strict=True) if min(both) < 0)
        raise UserError(
            f"algo.aggregation={name} with objectives.{negative}.{'weight' if first < 0 else 'weight_end'} below 0: "
            "it has no meaning there; choose linear"
        )
    if name in RAW_ONLY and order == "normalize_first":
        raise UserError(f"algo.aggregation={name} works on raw scores; choose algo.order=aggregate_first")
    relative = [n for n, both in zip(objectives.names, ends, strict=True) if any(both) and scales.get(n) == "relative"]
    if name in RAW_ONLY and relative:
        raise UserError(
            f"algo.aggregation={name}: {relative[0]} was fitted on pairs only and has a relative scale; choose linear, or give it weight 0"
        )


def _check_gate(gate: str, objectives: Objectives) -> None:
    """Only a score with a weight is missed: without one, a missing score of the gate would pass for 0."""
    weight = objectives.weights[objectives.names.index(gate)]
    if not weight or not objectives.moving.get(gate, weight):
        raise UserError(f"algo.aggregation=gated with objectives.{gate}.weight=0: its gate needs a weight, whatever its size")


def _slot(value: Any, table: dict[str, Any], key: str, names: list[str] | None = None) -> tuple[Callable[..., Any], str]:
    """The function of a slot with its numbers bound, and its name. `objective: NAME` becomes the objective's column."""
    if isinstance(value, dict) and "name" not in value:
        raise UserError(f"{key}={value}: no name; expected {{name: NAME, number: ...}}")
    name, numbers = _name(value), {k: v for k, v in value.items() if k != "name"} if isinstance(value, dict) else {}
    function = table.get(name) or (import_function(name, key) if "." in name else None)
    if function is None:
        raise UserError(f"{key}={name}: expected one of {', '.join(table)}, or the import path of a function")
    parameters = _parameters(function, f"{key}={name}")
    given = {p.name for f in table.values() for p in inspect.signature(f).parameters.values() if p.default is p.empty}
    given = given - {"objective"} | {"state"}  # what the run hands over itself
    for number in numbers:
        if number not in parameters or number in given:
            known = [
                p.name for p in parameters.values() if (p.default is not p.empty or p.name == "objective") and p.name not in given
            ]
            raise UserError(f"{key}.{number}: {name} has no such number; it has {', '.join(known) or 'none'}")
        if _is_number(parameters[number].default) and not (numbers[number] is None or _is_number(numbers[number])):
            raise UserError(
                f"{key}.{number}={numbers[number]}: expected a number, as its default {parameters[number].default} is"
            )
    if "objective" in parameters and names is not None:
        if numbers.get("objective") not in names:
            raise UserError(f"{key}.objective={numbers.get('objective')}: expected one of {', '.join(names)}")
        numbers["objective"] = names.index(numbers["objective"])
    return partial(function, **numbers), name


def _parameters(function: Callable[..., Any], where: str) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:  # a builtin that tells no signature
        raise UserError(f"{where}: its arguments cannot be told ({error}); expected a function written in Python") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A slot as a message shows it: the name, and the numbers that the config sets."""
    numbers = {k: v for k, v in value.items() if k != "name"} if isinstance(value, dict) else {}
    return _name(value) + "".join(f", {k}={v}" for k, v in numbers.items())


def _name(value: Any) -> str:
    return str(value["name"]) if isinstance(value, dict) and "name" in value else str(value)


def _named(name: str, table: dict[str, Any], key: str) -> Any:
    if name not in table:
        raise UserError(f"{key}={name}: expected one of {', '.join(table)}")
    return table[name]
