"""Validation, the best step of a run with limits, and what is published."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from grpo_safe import models
from grpo_safe.algorithm.aggregation import known_scores
from grpo_safe.algorithm.constraints import limit_bound
from grpo_safe.config import TrainPolicyConfig
from grpo_safe.errors import StageError
from grpo_safe.records import Rollout
from grpo_safe.rewards import score
from grpo_safe.rollout import sample
from grpo_safe.stages.train_policy.setup import Setup
from grpo_safe.versions import checkpoint, resume
from grpo_safe.versions.policy_card import write_policy_card

PROBES = 8  # rows on which an export is compared with what was trained
PROBE_TOKENS = 64  # at most so many tokens of each are compared


def validate(cfg: TrainPolicyConfig, s: Setup) -> dict[str, float]:
    """Mean score per objective of one completion per validation prompt, always with the same noise, and their mean reward."""
    mine = s.rt.share(list(range(len(s.read.validation))))
    with s.trainable.gathered() as policy:
        rollout = sample(
            s.engine, policy, s.tokenizer, [s.read.validation[i] for i in mine], [s.read.validation_ids[i] for i in mine], 1, cfg.sampling, cfg.seed, 0
        ) if mine else None  # fmt: skip
    parts = torch.zeros(0, len(s.objectives.names))
    if rollout is not None:
        scores = score(
            s.objectives, s.reward_model, rollout.prompts, s.method.spoken(rollout.texts), cfg.train.score_batch_tokens
        )
        parts = scores.values.masked_fill(~scores.mask, torch.nan)
    values = s.rt.gather_rows(parts)
    columns = [column[column.isfinite()] for column in values.T]  # what could be scored
    found = {f"validation/{name}": float(column.mean()) for name, column in zip(s.objectives.names, columns, strict=True)}
    found["validation/reward"] = validation_reward(s, values)
    for limit in s.method.slots.limits:
        name = s.objectives.names[limit.objective]
        mean, low = limit_bound(columns[limit.objective], limit.confidence or 0.95)
        found[f"validation/limit/{name}/low"] = low
        found[f"validation/limit/{name}/holds"] = float((mean if limit.confidence is None else low) >= limit.at_least)
    return found


def keep_best(s: Setup, run_dir: Path, step: int, judged: dict[str, float], best: dict[str, Any]) -> dict[str, Any]:
    """Where the run has limits: keep the weights of the step with the best validation reward among those where every limit holds.

    Chosen on data.validation, so it is the best step seen, and no guarantee.
    """
    if not s.objectives.limits:
        return {}
    reward = judged["validation/reward"]
    holds = all(judged[f"validation/limit/{name}/holds"] for name in s.objectives.limits)
    if not holds or not math.isfinite(reward) or (best and reward <= best["reward"]):
        return best
    resume.save(run_dir / "best", step, s.trainable, s.rt, {}, keep=1, also=resume.best_steps(run_dir))
    return {"step": step, "reward": reward, "validation": judged}


def validation_reward(s: Setup, scores: torch.Tensor) -> float:
    """Mean over completions of what the run's aggregation makes of their scores [n, K], at the weights of the first step; nan where none knows them all.

    An aggregation that learns as it goes starts from nothing here, so that all steps are judged alike; one that adds up normalized scores adds up scores.
    """
    weights = torch.tensor(s.objectives.weights)
    values, valid = known_scores(scores, scores.isfinite(), weights)
    return float(s.method.slots.aggregate(values, valid, weights, {}).rewards[valid].mean())


def restore_best(s: Setup, run_dir: Path, best: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Put the best step's weights back before publishing; the metrics say which step it was, or that no limit ever held."""
    if not s.objectives.limits:
        return metrics
    if not best:
        s.tracker.say("no evaluated step held every limit on data.validation; the last step is published")
        return metrics | {"limits/held": 0.0}
    resume.load(run_dir / "best", s.trainable, best["step"])
    s.tracker.say(f"step {best['step']} is published: the best validation reward among the steps that hold every limit")
    return metrics | best["validation"] | {"limits/held": 1.0, "limits/step": best["step"]}


def publish(cfg: TrainPolicyConfig, s: Setup, policy: Any, metrics: dict[str, Any], last: Rollout | None) -> str:
    """Write the policy as a version whose parents are named; returns where it lies. last: the last rollout, where this process saw one."""
    refuse_non_finite(policy)
    parents = [s.reward_version.link]
    manifest: dict[str, Any] = {
        "command": cfg.command,
        "config": asdict(cfg),
        "objectives": [{"name": n, "weight": w} for n, w in zip(s.objectives.names, s.objectives.weights, strict=True)],
        "metrics": {k: v for k, v in metrics.items() if k.startswith(("score/", "reward/mean", "kl", "validation/", "limit"))},
        "parents": parents + parent_policy(s.start),
        "base": {"start": s.start.name, "revision": s.start.options.get("revision")},
        "system_prompt": s.read.system_prompt,
        "states_confidence": s.method.asks_confidence,
        "data": {"name": cfg.data.name, "licence": cfg.data.licence, "files": s.read.fingerprints},
        "layout": {},
    }

    def write(folder: Path) -> None:
        manifest["layout"] = models.save_policy(policy, s.tokenizer, s.start, folder, cfg.policy, cfg.export, probe_rows(s, last))
        write_policy_card(folder / "README.md", manifest)

    found = checkpoint.publish(Path(cfg.store), "policy", write, manifest)
    s.tracker.say(f"published {found.path}")
    return str(found.path)


def probe_rows(s: Setup, last: Rollout | None) -> list[tuple[list[int], int]]:
    """(token ids, how many are known) of a few prompts with completions, on which an export is compared with what was trained.

    A run that is resumed only to publish has no completions any more: then the prompts' own tokens.
    """
    if last is None:
        return [(ids[:PROBE_TOKENS], 1) for ids in s.read.prompt_ids[:PROBES] if len(ids) > 1]
    rows = []
    for i in range(0, len(last), max(1, len(last) // PROBES)):
        prompt = last.prompt_ids[i][last.prompt_mask[i].bool()].tolist()
        completion = last.completion_ids[i][last.completion_mask[i].bool()].tolist()
        if prompt and completion:
            rows.append((prompt + completion[:PROBE_TOKENS], len(prompt)))
    return rows[:PROBES] or probe_rows(s, None)


def refuse_non_finite(model: torch.nn.Module) -> None:
    """Raises StageError where a weight is no number: what was trained cannot be published."""
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise StageError(
            f"{broken[0]} and {len(broken) - 1} other weights are not finite; nothing was published. Lower optim.lr, and start anew"
        )


def parent_policy(start: models.Start) -> list[dict[str, Any]]:
    """A policy that training went on from is a parent too."""
    if not (Path(start.folder) / checkpoint.MANIFEST).is_file():
        return []
    return [checkpoint.locate(Path(), "policy", start.folder, "policy.start").link]
