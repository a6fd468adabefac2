"""What a training step says of itself: over all ranks, per objective."""

from __future__ import annotations

from typing import Any

import torch

from grpo_safe.algorithm.comparison import Comparison
from grpo_safe.errors import UserError
from grpo_safe.records import Rollout, Scores
from grpo_safe.rewards import Objectives
from grpo_safe.runtime import Runtime


def step_metrics(
    rt: Runtime, rollout: Rollout, scores: Scores, objectives: Objectives, found: Comparison, update_sums: dict[str, float],
    group_size: int, first_means: dict[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Means, spreads and shares of one step; `found` is over all ranks. `first_means` is filled at the first step: gains are measured against it."""
    lengths = rt.gather_rows(rollout.completion_mask.sum(1)).float()
    truncated = rt.gather_rows(rollout.truncated).float()
    values, mask = rt.gather_rows(scores.values), rt.gather_rows(scores.mask)
    rewards = found.rewards[found.valid]
    metrics: dict[str, Any] = {
        "reward/mean": float(rewards.mean()), "reward/std": _std(rewards), "reward/group_std": float(found.groups.spread.mean()),
        "zero_spread_groups": float(found.groups.tied.float().mean()), "left_out": float((~found.valid).float().mean()),
        "length/mean": float(lengths.mean()), "length/max": float(lengths.max()),
        "truncated": float(truncated.mean()), "completion_tokens": int(lengths.sum()),
    }  # fmt: skip
    total_weight = sum(abs(w) for w in objectives.weights)
    for k, name in enumerate(objectives.names):
        usable = mask[:, k] & values[:, k].isfinite()
        known = values[usable, k]
        by_group = values[:, k].view(-1, group_size)
        mean = float(known.mean()) if known.numel() else float("nan")
        first_means.setdefault(name, mean)
        metrics |= {
            f"score/{name}": mean,
            f"score_std/{name}": _std(known),
            f"score_group_std/{name}": float(by_group.std(-1).mean()),
            f"gain/{name}": objectives.weights[k] / total_weight * (mean - first_means[name]),
            f"missing/{name}": float((~mask[:, k]).float().mean()),
            f"nan/{name}": float((mask[:, k] & ~values[:, k].isfinite()).float().mean()),
        }
    for name, report in zip(objectives.limits, found.limits, strict=True):
        metrics |= {
            f"limit/{name}/{figure}": float(getattr(report, figure))
            for figure in ("mean", "low", "holds", "multiplier", "no_spread")
        }
    tokens = max(1.0, update_sums["tokens"])
    metrics["skipped_updates"] = update_sums["skipped_updates"]
    metrics["loss"] = update_sums["loss"] / update_sums["passes"]
    for figure in ("kl", "ref_kl", "entropy", "ratio", "sampler_gap", "sampler_ratio", "sampler_weight", "sampler_cut"):
        if figure in update_sums and (rollout.sampled or not figure.startswith("sampler_")):
            metrics[figure] = update_sums[figure] / tokens
    if "sampler_gap_max" in update_sums and rollout.sampled:
        metrics["sampler_gap_max"] = update_sums["sampler_gap_max"]
        metrics["sampler_sequence_ratio"] = update_sums["sampler_sequence_ratio"] / max(1.0, update_sums["sequences"])
    if "clipped" in update_sums:
        metrics["clip_share"] = update_sums["clipped"] / tokens
    if "value_loss" in update_sums:
        variance = update_sums["return_sq"] / tokens - (update_sums["return"] / tokens) ** 2
        metrics["value_loss"] = update_sums["value_loss"] / tokens
        metrics["value_explained"] = 1.0 - 2 * metrics["value_loss"] / max(variance, 1e-12)
    if "pairs" in update_sums:
        metrics["pair_accuracy"] = update_sums["pair_accuracy"] / max(1.0, update_sums["pairs"])
    return metrics


def refuse_unscored(objectives: Objectives, metrics: dict[str, Any], step: int) -> None:
    """Raises UserError where an objective with a weight scored not one completion of the run's first step: nothing would be trained."""
    for name, weight in zip(objectives.names, objectives.weights, strict=True):
        if weight and metrics[f"missing/{name}"] == 1.0:
            raise UserError(
                f"objectives.{name}: it scored none of the completions of step {step} (None or NaN for each), so none has a reward; mend its function, or "
                f"set objectives.{name}.weight=0"
            )


def sample_rows(rollout: Rollout, scores: Scores, advantages: torch.Tensor, wanted: int, rt: Runtime) -> list[dict[str, Any]]:
    """A few completions of the main rank with their scores, spread over the groups."""
    if not rt.is_main:
        return []
    stride = max(1, len(rollout) // max(1, wanted))
    return [
        {
            "prompt": rollout.prompts[i].text, "kind": rollout.prompts[i].kind, "completion": rollout.texts[i],
            "scores": {n: round(float(scores.values[i, k]), 4) for k, n in enumerate(scores.objectives)},
            "advantage": round(float(advantages[i]), 4), "truncated": bool(rollout.truncated[i]),
        }
        for i in range(0, len(rollout), stride)
    ][:wanted]  # fmt: skip


def _std(values: torch.Tensor) -> float:
    return float(values.std()) if values.numel() > 1 else 0.0
