"""Limits: an objective's mean score must reach a threshold. One multiplier per limit, learned beside the policy.

Costs are c = at_least - score, so a limit holds where the mean cost is not above 0. The multipliers rise by dual ascent on a window of
recent costs and mix the advantages: A = (A_reward - sum lambda A_cost) / (1 + sum lambda) (Safe RLHF, arXiv 2310.12773, without critics).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.stats import t as student

from grpo_safe.algorithm.advantages import EPS, State


@dataclass(frozen=True)
class Limit:
    """One limit: the column of its objective, the threshold, and how sure one wants to be (None: the mean decides)."""

    objective: int
    at_least: float
    confidence: float | None = None


@dataclass(frozen=True)
class LimitReport:
    """How one limit stands after a step."""

    mean: float  # of the score over this step's prompts
    low: float  # one-sided lower bound of that mean (Student's t over prompts)
    holds: bool  # the bound, or without a confidence the mean, reaches at_least
    multiplier: float
    no_spread: bool  # violated, and all completions cost the same: the multiplier has nothing to push on


@dataclass(frozen=True)
class Constrained:
    """Advantages with the limits worked in."""

    advantages: torch.Tensor  # [N]
    reports: list[LimitReport]
    state: State


@dataclass(frozen=True)
class _Dual:
    """Dual ascent on log lambda: rate, where it starts and ends, steps before the first update, completions in the window (a step's at least)."""

    rate: float
    initial: float
    maximum: float
    window: int
    delay: int
    baseline: str
    normalize: bool


def lagrangian(
    advantages: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor, group_size: int, limits: list[Limit], state: State,
    rate: float = 0.1, initial: float = 1.0, maximum: float = 5.0, window: int = 128, delay: int = 0, baseline: str = "batch",
    normalize: bool = True,
) -> Constrained:  # fmt: skip
    """Multipliers follow the mean cost (arXiv 2310.12773, settings of its code).

    advantages [N] of the reward, scores [N, K]. baseline: what a cost is compared with, the batch's mean (so that a group that breaks the limit
    as a whole still pushes) or its group's; normalize: divide by the costs' running std (False: the plain Lagrangian).
    """
    dual = _Dual(rate, initial, maximum, window, delay, baseline, normalize)
    return _constrain(advantages, scores, valid, group_size, limits, state, dual, lambda limit, prompts: 0.0, 1.0)


def pessimistic(
    advantages: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor, group_size: int, limits: list[Limit], state: State,
    rate: float = 0.01, initial: float = 1.0, maximum: float = 1.0e6, window: int = 256, delay: int = 0, baseline: str = "batch",
    normalize: bool = True, safety_prompts: int = 1000, c1: float = 1.0, c2: float = 1.0, floor: float = 0.01,
) -> Constrained:  # fmt: skip
    """Multipliers follow an upper confidence bound of the cost, mean + kappa std (HC-RLHF, arXiv 2506.08266).

    kappa = c1 t(1 - delta, n - 1) / sqrt(n) + c2 t(1 - delta, m - 1) / sqrt(m): n prompts in the window, m = safety_prompts of the later test. The
    policy is pushed by C + kappa (C - mean)^2 / (2 max(std, floor)), whose score function is the gradient of that bound.
    """

    def kappa(limit: Limit, prompts: int) -> float:
        return c1 * _t(limit.confidence or 0.9, prompts) + c2 * _t(limit.confidence or 0.9, safety_prompts)

    dual = _Dual(rate, initial, maximum, window, delay, baseline, normalize)
    return _constrain(advantages, scores, valid, group_size, limits, state, dual, kappa, floor)


def _constrain(
    advantages: torch.Tensor, scores: torch.Tensor, valid: torch.Tensor, group_size: int, limits: list[Limit], state: State,
    dual: _Dual, kappa_of: Callable[[Limit, int], float], floor: float,
) -> Constrained:  # fmt: skip
    step = state.get("step", 0)
    before = zip(
        state.get("log_multipliers", [math.log(dual.initial)] * len(limits)),
        state.get("costs", [[] for _ in limits]),
        state.get("variance", [None] * len(limits)),
        strict=True,
    )
    new: State = {"step": step + 1, "log_multipliers": [], "costs": [], "variance": []}
    mixed, total, reports = advantages, 1.0, []
    for limit, (log, past, variance) in zip(limits, before, strict=True):
        known = valid & scores[:, limit.objective].isfinite()
        costs = torch.where(known, limit.at_least - scores[:, limit.objective], 0.0)
        recent = (past + costs[known].tolist())[-max(dual.window, int(known.sum())) :]  # a step counts whole
        mean, std = _mean_std(recent)
        kappa = kappa_of(limit, max(2, len(recent) // group_size))  # completions of one prompt are no independent sample
        if step >= dual.delay and recent:
            log = min(log + dual.rate * math.exp(log) * (mean + kappa * std), math.log(dual.maximum))
        if kappa:
            costs = costs + kappa * (costs - mean).square() / (2 * max(std, floor))
        variance = _running_variance(variance, costs[known])
        compared = _compare(costs, known, group_size, dual.baseline)
        if dual.normalize:
            compared = compared / (variance**0.5 + EPS)
        multiplier = math.exp(log)
        mixed, total = mixed - multiplier * compared, total + multiplier
        reports.append(_report(limit, scores[:, limit.objective], known, group_size, multiplier, compared))
        for name, value in (("log_multipliers", log), ("costs", recent), ("variance", variance)):
            new[name].append(value)
    return Constrained(mixed / total, reports, new)


def limit_bound(per_prompt: torch.Tensor, confidence: float) -> tuple[float, float]:
    """Mean of one number per prompt [P] and its one-sided lower bound, mean - t(confidence, P - 1) std / sqrt(P)."""
    n = per_prompt.numel()
    mean = float(per_prompt.mean()) if n else float("nan")
    if n < 2:
        return mean, -math.inf
    return mean, mean - _t(confidence, n) * float(per_prompt.std())


def _report(
    limit: Limit, scores: torch.Tensor, known: torch.Tensor, group_size: int, multiplier: float, compared: torch.Tensor
) -> LimitReport:
    m = known.view(-1, group_size).to(scores.dtype)
    sums = torch.where(known, scores, 0.0).view(-1, group_size).sum(-1)
    mean, low = limit_bound((sums / m.sum(-1).clamp(min=1))[m.sum(-1) > 0], limit.confidence or 0.95)
    holds = (mean if limit.confidence is None else low) >= limit.at_least
    return LimitReport(mean, low, holds, multiplier, not holds and bool((compared[known].abs() < 1e-6).all()))


def _compare(costs: torch.Tensor, known: torch.Tensor, group_size: int, baseline: str) -> torch.Tensor:
    """Costs [N] minus their baseline, 0 where not known."""
    if baseline == "group":
        m = known.view(-1, group_size).to(costs.dtype)
        means = (costs.view(-1, group_size) * m).sum(-1, keepdim=True) / m.sum(-1, keepdim=True).clamp(min=1)
        return ((costs.view(-1, group_size) - means) * m).reshape(-1)
    m = known.to(costs.dtype)
    return (costs - (costs * m).sum() / m.sum().clamp(min=1)) * m


def _running_variance(before: float | None, costs: torch.Tensor, decay: float = 0.9) -> float:
    """Exponential mean of the batch variance of the costs, never below 1e-6: a limit that everyone breaks has no spread."""
    now = max(float(costs.var()) if costs.numel() > 1 else 0.0, 1e-6)
    return now if before is None else decay * before + (1 - decay) * now


def _mean_std(values: list[float]) -> tuple[float, float]:
    n = len(values)
    mean = sum(values) / max(1, n)
    return mean, (sum((v - mean) ** 2 for v in values) / max(1, n - 1)) ** 0.5


def _t(confidence: float, n: int) -> float:
    """t(confidence, n - 1) / sqrt(n)."""
    return float(student.ppf(confidence, n - 1)) / math.sqrt(n)


CONSTRAINTS = {"lagrangian": lagrangian, "pessimistic": pessimistic}
