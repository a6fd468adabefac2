"""K scores of a completion -> one reward. Each function takes (values [N, K], valid [N], weights [K], state) and numbers of its own.

Values are clean: what is not valid, or has weight 0, is 0 and is not read. State is a plain record that a resumed run gets back. The
non-linear ones work on calibrated scores in [0, 1] before any normalization, soft_min also on per-objective advantages.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from grpo_safe.algorithm.advantages import State


class Aggregated(NamedTuple):
    """Rewards, and the state of the next step."""

    rewards: torch.Tensor  # [N]
    state: State


def known_scores(values: torch.Tensor, mask: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [N, K] with zeros for what is unknown, and which completions [N] know every score that has a weight.

    A sum over fewer objectives would not compare with its group, so such a completion has no reward.
    """
    known = mask & values.isfinite()
    return torch.where(known, values, 0.0), known[:, weights != 0].all(-1)


def linear(values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor, state: State) -> Aggregated:
    """r = sum_k w_k s_k / sum_k |w_k| (arXiv 2503.21819)."""
    return Aggregated(values @ weights / weights.abs().sum().clamp(min=1e-30), state)  # no weight, no reward


def total(values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor, state: State) -> Aggregated:
    """r = sum_k w_k s_k, as GDPO (arXiv 2601.05242) and MO-GRPO (arXiv 2509.22047) add normalized scores."""
    return Aggregated(values @ weights, state)


def chebyshev(
    values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor, state: State, ideal: float = 1.0, rho: float = 0.01
) -> Aggregated:
    """r = -max_k w_k (z - s_k) - rho sum_k w_k (z - s_k): the augmented distance from the ideal point z.

    Reaches any point of the Pareto front, also where it bends inward; rho > 0 keeps weakly dominated points out.
    """
    gaps, w = _gaps(values, weights, ideal)
    return Aggregated(-(w * gaps).amax(-1) - rho * (w * gaps).sum(-1), state)


def smooth_chebyshev(
    values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor, state: State, ideal: float = 1.0, mu: float = 0.1
) -> Aggregated:
    """r = -mu log sum_k exp(w_k (z - s_k) / mu); towards chebyshev as mu falls (arXiv 2402.19078)."""
    gaps, w = _gaps(values, weights, ideal)
    return Aggregated(-mu * torch.logsumexp(w * gaps / mu, -1), state)


def soft_min(
    values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor, state: State, sharpness: float = 4.0
) -> Aggregated:
    """r = -(1/k) log sum_j w_j exp(-k s_j) with weights that sum to 1: the mean as k -> 0, the minimum as k grows."""
    used, w = _positive(values, weights)
    return Aggregated(-torch.logsumexp(w.log() - sharpness * used, -1) / sharpness, state)


def geometric(values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor, state: State, floor: float = 0.01) -> Aggregated:
    """r = exp(sum_k w_k log max(s_k, floor) / sum_k w_k): a score near 0 cannot be bought back by the others."""
    used, w = _positive(values, weights)
    return Aggregated((used.clamp(min=floor).log() @ w).exp(), state)


def gated(
    values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor, state: State, objective: int, at_least: float = 0.5,
    bonus: float = 1.0, penalty: float = 0.0,
) -> Aggregated:  # fmt: skip
    """One objective first: below `at_least` only it counts (r = s - penalty), above it the weighted mean of the others + bonus."""
    others = weights.clone()
    others[objective] = 0.0
    first = values[:, objective]
    rest = values @ others / others.abs().sum().clamp(min=1e-12)
    return Aggregated(torch.where(first >= at_least, rest + bonus, first - penalty), state)


def worst_head(values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor, state: State, ema: float = 0.9) -> Aggregated:
    """r = s_k of the objective whose running mean is lowest (MaxMin-RLHF, arXiv 2402.08925, heads as its user groups)."""
    means = _means(values, valid)
    if "means" in state:
        means = ema * means.new_tensor(state["means"]) + (1 - ema) * means
    worst = int(torch.where(weights != 0, means, torch.inf).argmin())
    return Aggregated(values[:, worst], {"means": means.tolist(), "worst": worst})


def max_min(
    values: torch.Tensor, valid: torch.Tensor, weights: torch.Tensor, state: State, rate: float = 0.5, target: float = 1.0
) -> Aggregated:
    """r = sum_k a_k s_k, a_k <- a_k exp(rate (target - mean s_k)), renormalized: multiplicative weights on the shortfall."""
    before = values.new_tensor(state["weights"]) if "weights" in state else weights.to(values)
    raised = before * torch.exp(rate * (target - _means(values, valid)))
    adapted = raised / raised.sum()
    return Aggregated(values @ adapted, {"weights": adapted.tolist()})


def _gaps(values: torch.Tensor, weights: torch.Tensor, ideal: float) -> tuple[torch.Tensor, torch.Tensor]:
    used, w = _positive(values, weights)
    return ideal - used, w


def _positive(values: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns with a weight, and those weights over their sum."""
    inside = weights > 0
    return values[:, inside], weights[inside] / weights[inside].sum()


def _means(values: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Mean score per objective [K] over the valid completions."""
    m = valid.to(values.dtype)[:, None]
    return (values * m).sum(0) / m.sum().clamp(min=1)


AGGREGATIONS = {
    f.__name__: f for f in (linear, total, chebyshev, smooth_chebyshev, soft_min, geometric, gated, worst_head, max_min)
}
SIGNED = {"linear", "total"}  # the others have no meaning for a negative weight
