"""Policy losses. Each takes what one forward gave, the batch and the denominators, and returns (loss, sums to be logged).

A policy-gradient loss is put together from parts chosen once: a surrogate per token, a KL term, and how tokens are averaged. Denominators count
over all processes and micro-batches, so that the gradient does not depend on how a batch was cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from grpo_safe.records import PolicyOutputs, TrainBatch

LossFn = Callable[[PolicyOutputs, TrainBatch, "Denominators"], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Denominators:
    """Counts of one minibatch over all processes."""

    sequences: float  # completions, also those that the loss leaves out
    tokens: float  # completion tokens that the loss counts


@dataclass(frozen=True)
class Loss:
    """A loss and what it asks for."""

    function: LossFn
    entropy: str = "detached"  # no | detached: to log | kept: with gradient
    arrangement: Callable[..., Any] | None = None  # which completions of a group, and in which order; None: all, as they are
    unit: int | None = 1  # neighbours that a micro-batch must not part; None: the whole group
    advantage_only: bool = False  # a completion with advantage 0 leaves no gradient
    needs: frozenset[str] = (
        frozenset()
    )  # reference: its log-probs, whatever kl_coef is | values: a critic | ref_kl: over the vocabulary | eos
    gae: tuple[float, float] | None = None  # gamma, lambda: advantages come from the critic
    eos_temperature: float | None = None  # of the reference's end token, where `needs` has eos
    kinds_rate: float | None = (
        None  # how fast the weights of prompt kinds follow their losses; None: every prompt counts the same
    )


# --- surrogates: (logps, old_logps, advantages [n, 1] or [n, C], mask) -> what a token loses, whether the clip acted, its ratio ----------


class Surrogate(NamedTuple):
    """Per token, [n, C]."""

    loss: torch.Tensor
    clipped: torch.Tensor
    ratio: torch.Tensor


def clip(eps_low: float = 0.2, eps_high: float = 0.2, delta: float | None = None) -> Callable[..., Surrogate]:
    """-min(rho A, clip(rho, 1 - eps_low, 1 + eps_high) A) (PPO, arXiv 1707.06347, eq. 7; clip-higher, arXiv 2503.14476).

    delta caps the ratio of the unclipped side (two-sided clipping, arXiv 2505.07291).
    """

    def surrogate(logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Surrogate:
        ratio = (logps - old_logps).exp()
        inner = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
        outer = (ratio if delta is None else ratio.clamp(max=delta)) * advantages
        return Surrogate(-torch.minimum(outer, inner), (inner < ratio * advantages).to(logps.dtype), ratio)

    return surrogate


def gspo(eps_low: float = 3e-4, eps_high: float = 4e-4) -> Callable[..., Surrogate]:
    """The clip on one ratio per completion, s = exp(mean over tokens of log rho) (GSPO, arXiv 2507.18071, eq. 5 to 7)."""

    def surrogate(logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Surrogate:
        log_ratio = ((logps - old_logps) * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
        ratio = log_ratio.exp().expand_as(logps)
        inner = ratio.clamp(1 - eps_low, 1 + eps_high) * advantages
        return Surrogate(-torch.minimum(ratio * advantages, inner), (inner < ratio * advantages).to(logps.dtype), ratio)

    return surrogate


def cispo(eps_max: float = 5.0) -> Callable[..., Surrogate]:
    """-sg(min(rho, eps_max)) A log pi: the ratio weighs, every token keeps its gradient (CISPO, arXiv 2506.13585)."""

    def surrogate(logps: torch.Tensor, old_logps: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Surrogate:
        ratio = (logps - old_logps).exp().detach()
        return Surrogate(-ratio.clamp(max=eps_max) * advantages * logps, (ratio > eps_max).to(logps.dtype), ratio)

    return surrogate


# --- reductions: (per token [n, C], mask, denominators) -> the micro-batch's share of the loss -------------------------------------------


def sequence_mean(per_token: torch.Tensor, mask: torch.Tensor, denominators: Denominators) -> torch.Tensor:
    """The mean over completions of the mean over tokens (GRPO)."""
    return ((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).sum() / denominators.sequences


def token_mean(per_token: torch.Tensor, mask: torch.Tensor, denominators: Denominators) -> torch.Tensor:
    """The mean over all tokens of the minibatch (DAPO, BNPO): long completions weigh more."""
    return (per_token * mask).sum() / denominators.tokens


def constant(max_tokens: int) -> Callable[..., torch.Tensor]:
    """The sum over completions x max_tokens: no completion's length changes its weight (Dr. GRPO, arXiv 2503.20783)."""

    def reduce(per_token: torch.Tensor, mask: torch.Tensor, denominators: Denominators) -> torch.Tensor:
        return (per_token * mask).sum() / (denominators.sequences * max_tokens)

    return reduce


# --- KL estimators per token, of samples from the policy (http://joschu.net/blog/kl-approx.html) -----------------------------------------


def k1(policy_logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """log(pi / pi_ref): unbiased; as a loss its expected gradient is 0, so it belongs in the reward."""
    return policy_logps - ref_logps


def k2(policy_logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """(log(pi / pi_ref))^2 / 2: its gradient on-policy is that of KL(pi || pi_ref)."""
    return (policy_logps - ref_logps).square() / 2


def k3(policy_logps: torch.Tensor, ref_logps: torch.Tensor) -> torch.Tensor:
    """pi_ref / pi - log(pi_ref / pi) - 1 >= 0 per token (arXiv 2402.03300, eq. 4).

    Above a log-ratio of MOST_LOG_RATIO it goes on in a line, its gradient unchanged: a float32 overflows at 89.
    """
    log_ratio = ref_logps - policy_logps
    near, beyond = log_ratio.clamp(max=MOST_LOG_RATIO), (log_ratio - MOST_LOG_RATIO).clamp(min=0.0)
    return torch.expm1(near) - near + beyond * math.expm1(MOST_LOG_RATIO)


MOST_LOG_RATIO = 20.0

KL_ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


# --- the whole ----------------------------------------------------------------------------------------------------------------------------


def policy_gradient(
    surrogate: Callable[..., Surrogate], reduce: Callable[..., torch.Tensor], kl: Callable[..., torch.Tensor], kl_coef: float,
    entropy_coef: float, sampler_cap: float | None = None,
) -> LossFn:  # fmt: skip
    """Surrogate + kl_coef KL - entropy_coef H, reduced.

    sampler_cap: the surrogate is weighted by min(pi_old / pi_sampler, cap), detached, for an engine of another precision (truncated importance
    sampling). A reference is used where the batch has one.
    """

    def loss_fn(
        outputs: PolicyOutputs, batch: TrainBatch, denominators: Denominators
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        mask = batch.completion_mask.to(outputs.logps.dtype)  # [n, C]
        outside = mask == 0  # there exp() of a confident policy's pad token may be inf, and inf * 0 nan
        logps = outputs.logps.masked_fill(outside, 0.0)
        old_logps = logps.detach() if batch.old_logps is None else batch.old_logps.masked_fill(outside, 0.0)
        advantages = batch.advantages.to(logps.dtype)
        token = surrogate(logps, old_logps, advantages if advantages.dim() == 2 else advantages[:, None], mask)
        per_token = token.loss
        sums = {"clipped": (token.clipped * mask).sum(), "ratio": (token.ratio * mask).sum()}
        if sampler_cap is not None:
            weight = (old_logps - batch.sampler_logps.masked_fill(outside, 0.0)).exp().clamp(max=sampler_cap).detach()
            per_token = per_token * weight
            sums["sampler_weight"] = (weight * mask).sum()
        if batch.ref_logps is not None:
            term = kl(logps, batch.ref_logps.masked_fill(outside, 0.0))
            per_token = per_token + kl_coef * term
            sums["kl"] = (term * mask).sum()
        if outputs.entropy is not None:
            if entropy_coef:
                per_token = per_token - entropy_coef * outputs.entropy
            sums["entropy"] = (outputs.entropy * mask).sum()
        return reduce(per_token, mask, denominators), {name: value.detach() for name, value in sums.items()}

    return loss_fn
