"""Losses that compare the completions of a group directly, over the same batch: DPO and its cousins, best-of-group, A-LoL.

Each names the arrangement it works on: which completions of a group it gets, and in which order. A pair is the best and the worst of a group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from grpo_safe.algorithm.advantages import group_spread
from grpo_safe.algorithm.losses import Denominators, Loss, Surrogate, k3, policy_gradient, token_mean
from grpo_safe.records import PolicyOutputs, TrainBatch

Sums = dict[str, torch.Tensor]


class Arranged(NamedTuple):
    """Rows of a batch in units of neighbours, and what multiplies them: 0 where a unit has nothing to compare."""

    rows: list[int]
    factors: torch.Tensor  # [rows]


# --- arrangements: (rewards [n], valid [n], group_size, tie_spread) -> Arranged ------------------------------------------------------


def pairs(rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tie_spread: float = 0.0) -> Arranged:
    """Best and worst of each group, in that order; groups without a difference, or with a std below tie_spread, have factor 0.

    Example: rewards [.2, .9, .5] of one group -> rows [1, 0]
    """
    first, high, low = _grouped(rewards, valid, group_size)
    best, worst = high.argmax(1), low.argmin(1)
    differs = (high.gather(1, best[:, None]) > low.gather(1, worst[:, None]))[:, 0]
    differs &= group_spread(rewards, valid, group_size) >= tie_spread
    rows = torch.stack([first + best, first + worst], 1).reshape(-1)
    return Arranged(rows.tolist(), differs.float().repeat_interleave(2))


def ranked(rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tie_spread: float = 0.0) -> Arranged:
    """Each group from best to worst; what is not valid comes last, with factor 0, as has all of a group whose std is below tie_spread."""
    first, high, _ = _grouped(rewards, valid, group_size)
    tied = (group_spread(rewards, valid, group_size) < tie_spread).repeat_interleave(group_size)
    order = high.sort(dim=1, descending=True, stable=True).indices
    rows = (first[:, None] + order).reshape(-1)
    return Arranged(rows.tolist(), (valid & ~tied)[rows].float())


def best(rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tie_spread: float = 0.0) -> Arranged:
    """The best of each group; factor 0 where none is valid. Of a tied group any is the best: it is not pushed against the others."""
    first, high, _ = _grouped(rewards, valid, group_size)
    rows = first + high.argmax(1)
    return Arranged(rows.tolist(), valid[rows].float())


# --- losses --------------------------------------------------------------------------------------------------------------------------


def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Loss:
    """-log sigmoid(beta u), u = log pi(w)/ref(w) - log pi(l)/ref(l), sums over tokens (DPO, arXiv 2305.18290, eq. 7).

    label_smoothing: the share of pairs that are thought to be the wrong way round (conservative DPO).
    """

    def loss_fn(outputs: PolicyOutputs, batch: TrainBatch, denominators: Denominators) -> tuple[torch.Tensor, Sums]:
        gaps = log_ratios(outputs, batch).view(-1, 2)
        u = beta * (gaps[:, 0] - gaps[:, 1])
        counts = batch.advantages.to(u.dtype).view(-1, 2)[:, 0]
        each = smoothed(u, label_smoothing)
        loss = (each * counts).sum() / (denominators.sequences / 2)
        sums = {"pair_accuracy": ((u > 0) * counts).sum(), "pairs": counts.sum(), "kl": kl_sum(outputs, batch)}
        return loss, detached(sums)

    return Loss(loss_fn, "no", arrangement=pairs, unit=2, needs=frozenset({"reference"}))


def pro(sft_coef: float = 0.05) -> Loss:
    """Each completion against all that rank below it, a gap in reward as the temperature (PRO, arXiv 2306.17492, eq. 9 and 10).

    L = -sum_k log [ e^(p_k T_k^k) / (e^(p_k T_k^k) + sum_{i>k} e^(p_i T_k^i)) ] + sft_coef (n - 1)^2 NLL(best), p the mean log-prob of a
    completion, T_k^i = r_k - r_i, T_k^k = max_i T_k^i.
    """

    def loss_fn(outputs: PolicyOutputs, batch: TrainBatch, denominators: Denominators) -> tuple[torch.Tensor, Sums]:
        assert batch.rewards is not None
        mask = batch.completion_mask.to(outputs.logps.dtype)
        p = (outputs.logps.masked_fill(mask == 0, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)).view(-1, batch.unit)  # [B, G]
        r = batch.rewards.to(p.dtype).view(-1, batch.unit)
        here = batch.advantages.view(-1, batch.unit) > 0
        loss = torch.zeros((), dtype=p.dtype, device=p.device)
        for k in range(batch.unit - 1):
            gaps = (r[:, k, None] - r[:, k + 1 :]).masked_fill(~here[:, k + 1 :], -torch.inf)  # [B, G - k - 1]
            own = gaps.amax(1)
            counts = here[:, k] & here[:, k + 1 :].any(1)
            others = (p[:, k + 1 :] * gaps.clamp(min=0)).masked_fill(~here[:, k + 1 :], -torch.inf)
            mine = p[:, k] * own.clamp(min=0)
            loss = loss + torch.where(counts, torch.logsumexp(torch.cat([mine[:, None], others], 1), 1) - mine, 0.0).sum()
        n = here.sum(1)
        loss = loss - sft_coef * ((n - 1).clamp(min=0) ** 2 * torch.where(here[:, 0], p[:, 0], 0.0)).sum()
        return loss / (denominators.sequences / batch.unit), {}

    return Loss(loss_fn, "no", arrangement=ranked, unit=None)


def best_of_group(kl_coef: float = 0.23) -> Loss:
    """One supervised step on the best completion, held by KL(reference || policy) (SuperHF, arXiv 2310.16763), the KL by its k3 estimate."""

    def supervised(logps: torch.Tensor, old_logps: torch.Tensor, factors: torch.Tensor, mask: torch.Tensor) -> Surrogate:
        return Surrogate(-factors * logps, torch.zeros_like(logps), torch.ones_like(logps))

    needs = frozenset({"reference"}) if kl_coef else frozenset()
    return Loss(policy_gradient(supervised, token_mean, k3, kl_coef, 0.0), "no", arrangement=best, unit=1, needs=needs)


def a_lol(eps: float = 0.9) -> Loss:
    """A clip(pi(y) / ref(y), 1 - eps, 1 + eps) log pi(y) for A > 0, the ratio detached (A-LoL, arXiv 2305.14718); the group's mean is V_ref."""

    def loss_fn(outputs: PolicyOutputs, batch: TrainBatch, denominators: Denominators) -> tuple[torch.Tensor, Sums]:
        mask = batch.completion_mask.to(outputs.logps.dtype)
        weight = log_ratios(outputs, batch).detach().exp().clamp(1 - eps, 1 + eps) * batch.advantages.to(mask.dtype).clamp(min=0)
        loss = -(weight * outputs.logps.masked_fill(mask == 0, 0.0).sum(-1)).sum() / denominators.sequences
        return loss, detached({"kl": kl_sum(outputs, batch)})

    return Loss(loss_fn, "no", needs=frozenset({"reference"}))


PREFERENCE_LOSSES: dict[str, Callable[..., Loss]] = {f.__name__: f for f in (dpo, pro, best_of_group, a_lol)}


def smoothed(u: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """-(1 - eps) log sigmoid(u) - eps log sigmoid(-u)."""
    return -(1 - label_smoothing) * F.logsigmoid(u) - label_smoothing * F.logsigmoid(-u)


def log_ratios(outputs: PolicyOutputs, batch: TrainBatch) -> torch.Tensor:
    """log pi(y) / ref(y) of each completion [n]."""
    assert batch.ref_logps is not None
    outside = batch.completion_mask == 0
    return (outputs.logps - batch.ref_logps.to(outputs.logps.dtype)).masked_fill(outside, 0.0).sum(-1)


def kl_sum(outputs: PolicyOutputs, batch: TrainBatch) -> torch.Tensor:
    assert batch.ref_logps is not None
    outside = batch.completion_mask == 0
    return k3(outputs.logps.masked_fill(outside, 0.0), batch.ref_logps.to(outputs.logps.dtype).masked_fill(outside, 0.0)).sum()


def detached(sums: Sums) -> Sums:
    return {name: value.detach() for name, value in sums.items()}


def _grouped(rewards: torch.Tensor, valid: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First row of each group [B]; rewards [B, G] with what is not valid at -inf, and at +inf."""
    inside, r = valid.view(-1, group_size), rewards.view(-1, group_size)
    first = torch.arange(len(r), device=r.device) * group_size
    return first, r.masked_fill(~inside, -torch.inf), r.masked_fill(~inside, torch.inf)
