"""Rewards -> advantages. Each function takes (rewards [N], valid [N], group_size, tau, tie_spread, state); rows of a group are neighbours.

tau softens every division by a spread, sqrt(std^2 + tau^2), for rewards that a model only estimates; tie_spread is the spread below which
a group's differences are rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

EPS = 1e-4  # beside every std, as in TRL and verl
State = dict[str, Any]


@dataclass(frozen=True)
class GroupAdvantages:
    """Advantages and what the groups looked like."""

    advantages: torch.Tensor  # [N], 0 where not valid
    spread: torch.Tensor  # [N / G] unbiased std of the rewards of each group
    tied: torch.Tensor  # [N / G] bool: no comparison possible
    state: State = field(default_factory=dict)  # of the next step


@dataclass(frozen=True)
class _Groups:
    centred: torch.Tensor  # [N / G, G] reward minus its group's mean, 0 where not valid
    mask: torch.Tensor  # [N / G, G]
    count: torch.Tensor  # [N / G, 1] valid completions
    std: torch.Tensor  # [N / G, 1] unbiased
    tied: torch.Tensor  # [N / G, 1] bool

    def result(self, advantages: torch.Tensor, state: State | None = None) -> GroupAdvantages:
        masked = torch.where(self.mask > 0, advantages.view(self.mask.shape), 0.0).reshape(-1)
        return GroupAdvantages(masked, self.std[:, 0], self.tied[:, 0], state or {})


def group_advantages(
    rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tau: float, tie_spread: float, state: State | None = None
) -> GroupAdvantages:
    """A_i = (r_i - mean) / (sqrt(std^2 + tau^2) + 1e-4) within each group (arXiv 2402.03300, eq. 4).

    Unbiased std over the valid completions; a group whose std is below `tie_spread`, or with fewer than two valid completions, gets 0:
    its differences are rounding, and dividing would blow them up.
    """
    g = _groups(rewards, valid, group_size, tie_spread)
    return g.result(torch.where(g.tied, 0.0, g.centred / ((g.std.square() + tau**2).sqrt() + EPS)))


def centred(
    rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tau: float, tie_spread: float, state: State | None = None
) -> GroupAdvantages:
    """A_i = r_i - mean of the group (Dr. GRPO, arXiv 2503.20783)."""
    g = _groups(rewards, valid, group_size, tie_spread)
    return g.result(torch.where(g.count < 2, 0.0, g.centred))


def leave_one_out(
    rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tau: float, tie_spread: float, state: State | None = None
) -> GroupAdvantages:
    """A_i = r_i - mean of the group's other completions (RLOO, arXiv 2402.14740) = n / (n - 1) (r_i - mean)."""
    g = _groups(rewards, valid, group_size, tie_spread)
    return g.result(torch.where(g.count < 2, 0.0, g.centred * g.count / (g.count - 1).clamp(min=1)))


def batch_std(
    rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tau: float, tie_spread: float, state: State | None = None
) -> GroupAdvantages:
    """A_i = (r_i - mean of the group) / (std of the whole batch + 1e-4): no group is blown up (Lite PPO, arXiv 2508.08221)."""
    g = _groups(rewards, valid, group_size, tie_spread)
    _, std = _moments(rewards, valid)
    return g.result(torch.where(g.count < 2, 0.0, g.centred / ((std.square() + tau**2).sqrt() + EPS)))


def whitened(
    rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tau: float, tie_spread: float, state: State | None = None
) -> GroupAdvantages:
    """A_i = (r_i - mean of the batch) / (std of the batch + 1e-4) (REINFORCE++, arXiv 2501.03262)."""
    g = _groups(rewards, valid, group_size, tie_spread)
    return g.result(_whiten(rewards, valid, tau))


def group_whitened(
    rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tau: float, tie_spread: float, state: State | None = None
) -> GroupAdvantages:
    """The group's mean taken off, then whitened over the batch (REINFORCE++-baseline, arXiv 2501.03262)."""
    g = _groups(rewards, valid, group_size, tie_spread)
    return g.result(_whiten(g.centred.reshape(-1), valid, tau))


def running_clip(
    rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tau: float, tie_spread: float, state: State | None = None,
    clip: float = 10.0,
) -> GroupAdvantages:  # fmt: skip
    """clip((r - mean) / std, -clip, clip) by the moments of all steps so far, minus the group's mean of it (PPO-max, arXiv 2307.04964)."""
    old = state or {"count": 0.0, "mean": 0.0, "m2": 0.0}
    known = rewards[valid].double()
    count = old["count"] + known.numel()
    batch_mean = float(known.mean()) if known.numel() else 0.0
    delta = batch_mean - old["mean"]
    mean = old["mean"] + delta * known.numel() / max(1.0, count)
    m2 = old["m2"] + float((known - batch_mean).square().sum()) + delta**2 * old["count"] * known.numel() / max(1.0, count)
    std = (m2 / max(1.0, count - 1)) ** 0.5
    scaled = ((rewards - mean) / ((std**2 + tau**2) ** 0.5 + EPS)).clamp(-clip, clip)
    g = _groups(scaled, valid, group_size, tie_spread)
    shape = _groups(rewards, valid, group_size, tie_spread)
    return shape.result(torch.where(g.count < 2, 0.0, g.centred), {"count": count, "mean": mean, "m2": m2})


def group_spread(rewards: torch.Tensor, valid: torch.Tensor, group_size: int) -> torch.Tensor:
    """Unbiased std of each group [N / G] over its valid completions, 0 with fewer than two of these."""
    return _groups(rewards, valid, group_size, 0.0).std[:, 0]


def _groups(rewards: torch.Tensor, valid: torch.Tensor, group_size: int, tie_spread: float) -> _Groups:
    r = rewards.masked_fill(~valid, 0.0).view(-1, group_size)
    m = valid.view(-1, group_size).to(r.dtype)
    n = m.sum(-1, keepdim=True)
    middle = (r - (r * m).sum(-1, keepdim=True) / n.clamp(min=1)) * m
    std = (middle.square().sum(-1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()
    return _Groups(middle, m, n, std, (std < tie_spread) | (n < 2))


def _moments(rewards: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased std of the valid rewards."""
    m = valid.to(rewards.dtype)
    r = rewards.masked_fill(~valid, 0.0)
    n = m.sum()
    mean = r.sum() / n.clamp(min=1)
    return mean, (((r - mean) * m).square().sum() / (n - 1).clamp(min=1)).sqrt()


def _whiten(rewards: torch.Tensor, valid: torch.Tensor, tau: float) -> torch.Tensor:
    mean, std = _moments(rewards, valid)
    return (rewards - mean) / ((std.square() + tau**2).sqrt() + EPS)


NORMALIZATIONS = {
    "group_std": group_advantages,
    **{f.__name__: f for f in (centred, leave_one_out, batch_std, whitened, group_whitened, running_clip)},
}
