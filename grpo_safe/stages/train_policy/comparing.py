"""Scores -> advantages, over all ranks, and the batch as the loss wants it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from grpo_safe.algorithm.comparison import Comparison, State, StepScores, compare
from grpo_safe.algorithm.critic import gae, token_rewards
from grpo_safe.algorithm.order import derived_seed
from grpo_safe.algorithm.penalties import kl_penalty, soft_overlong
from grpo_safe.algorithm.robust import raised
from grpo_safe.algorithm.sampling import completion_noise
from grpo_safe.config import TrainPolicyConfig
from grpo_safe.records import Rollout, Scores, TrainBatch
from grpo_safe.rewards.confidence import STATED, confidences
from grpo_safe.stages.train_policy.collecting import own_rows
from grpo_safe.stages.train_policy.setup import Setup

# What algo.truncated adds to the reward of each completion [n].
LENGTH_PENALTIES: dict[str, Callable[[TrainPolicyConfig, Rollout], torch.Tensor]] = {
    "keep": lambda cfg, rollout: torch.zeros(len(rollout)),
    "mask": lambda cfg, rollout: torch.zeros(len(rollout)),
    "penalize": lambda cfg, rollout: -cfg.algo.truncation_penalty * rollout.truncated.float(),
    "soft_overlong": lambda cfg, rollout: cfg.algo.truncation_penalty * soft_overlong(
        rollout.completion_mask.sum(1), cfg.sampling.max_new_tokens, max(1, round(cfg.algo.overlong_share * cfg.sampling.max_new_tokens))
    ),
}  # fmt: skip


def compare_all(
    cfg: TrainPolicyConfig,
    s: Setup,
    rollout: Rollout,
    scores: Scores,
    batch: TrainBatch,
    step: int,
    weights: torch.Tensor,
    state: State,
) -> Comparison:
    """Rewards and advantages of the completions of all ranks, the same on each."""
    extra = LENGTH_PENALTIES[cfg.algo.truncated](cfg, rollout)
    if s.method.reward_kl is not None:
        assert batch.ref_logps is not None
        policy_logps = batch.sampler_logps if batch.old_logps is None else batch.old_logps
        extra = (
            extra - cfg.algo.kl_coef * kl_penalty(policy_logps, batch.ref_logps, batch.completion_mask, s.method.reward_kl).cpu()
        )
    per_group = range(cfg.algo.group_size)
    noise = [
        completion_noise(derived_seed(cfg.seed, step), step, p.id, g, 1)[0]
        for p in rollout.prompts[:: cfg.algo.group_size]
        for g in per_group
    ]
    columns = (scores.values, scores.mask, extra, torch.tensor(noise), confidences(rollout.texts))
    gathered = [s.rt.gather_rows(t) for t in columns[: 4 + s.method.asks_confidence]]
    found = compare(s.method.order, s.method.slots, StepScores(*gathered), weights, state)
    return replace(found, state={key: state[key] for key in ("kinds",) if key in state} | found.state)


def confidence_metrics(s: Setup, rollout: Rollout) -> dict[str, float]:
    """Mean confidence, and the share of completions that state one, where they are asked."""
    if not s.method.asks_confidence:
        return {}
    stated = torch.tensor([float(STATED.search(text) is not None) for text in rollout.texts])
    columns = {"confidence/mean": confidences(rollout.texts), "confidence/stated": stated}
    return {name: float(s.rt.gather_rows(column).mean()) for name, column in columns.items()}


def arranged(cfg: TrainPolicyConfig, s: Setup, rollout: Rollout, batch: TrainBatch, found: Comparison) -> TrainBatch:
    """This rank's batch with its part of the comparison, as the loss wants its completions arranged."""
    n, device, loss = len(batch), s.rt.device, s.method.loss
    rewards, valid, advantages = (own_rows(s.rt, t, n) for t in (found.rewards, found.valid, found.groups.advantages))
    batch.rewards, batch.advantages = rewards.to(device), advantages.to(device)
    batch.unit = loss.unit or s.method.slots.group_size
    if loss.gae is not None:
        add_critic_advantages(cfg, s, batch, valid, loss.gae)
    if loss.kinds_rate is not None:
        names = list(s.read.kinds)
        batch.kinds = torch.tensor([names.index(p.kind) for p in rollout.prompts], device=device)
        batch.kind_weights = tuple(
            w / share for w, share in zip(kind_weights(s, found.state), s.read.kinds.values(), strict=True)
        )
    if loss.arrangement is None:
        return batch
    seen = valid & (batch.completion_mask > 0).any(1).cpu()  # half a pair that algo.truncated=mask left would train alone
    chosen = loss.arrangement(rewards, seen, s.method.slots.group_size, s.method.slots.tie_spread)
    batch = batch.rows(torch.tensor(chosen.rows, device=device))
    batch.advantages = chosen.factors.to(device)
    return batch


def kind_weights(s: Setup, state: State) -> list[float]:
    """Weights of the prompt kinds, equal at first."""
    return [state.get("kinds", {}).get(name, 1 / len(s.read.kinds)) for name in s.read.kinds]


def followed(s: Setup, state: State, update_sums: dict[str, float]) -> State:
    """The state of the next step: weights of prompt kinds after what the update said of their losses."""
    if s.method.loss.kinds_rate is None:
        return state
    losses = [update_sums[f"kind/{g}"] / update_sums["passes"] for g in range(len(s.read.kinds))]
    weights = raised(kind_weights(s, state), losses, list(s.read.kinds.values()), s.method.loss.kinds_rate)
    return state | {"kinds": dict(zip(s.read.kinds, weights, strict=True))}


def add_critic_advantages(
    cfg: TrainPolicyConfig, s: Setup, batch: TrainBatch, valid: torch.Tensor, gae_numbers: tuple[float, float]
) -> None:
    """Advantages [n, C] by GAE, whitened over all tokens of all ranks, and the returns that the critic learns; no reward, no token."""
    assert batch.rewards is not None and batch.values is not None and batch.old_logps is not None and batch.ref_logps is not None
    batch.completion_mask = batch.completion_mask * valid.to(batch.completion_mask)[:, None]
    mask = batch.completion_mask
    rewards = token_rewards(batch.rewards, batch.old_logps, batch.ref_logps, mask, cfg.algo.kl_coef)
    found = gae(rewards, batch.values, mask, *gae_numbers)
    batch.returns = (found + batch.values) * mask
    count, first, second = s.rt.sum(torch.stack([mask.sum().float(), found.sum(), found.square().sum()]).cpu()).tolist()
    mean = first / max(1.0, count)
    std = max(0.0, second / max(1.0, count) - mean**2) ** 0.5
    batch.advantages = (found - mean) / (std + 1e-4) * mask
