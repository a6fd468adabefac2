"""Completions, their scores, and the log-probs that stay fixed during a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch

from grpo_safe import models
from grpo_safe.algorithm.comparison import State, StepScores
from grpo_safe.algorithm.order import derived_seed, occurrences, rows_of_step
from grpo_safe.config import TrainPolicyConfig
from grpo_safe.forward import micro_batches, policy_outputs
from grpo_safe.models import reference
from grpo_safe.records import Extras, PolicyOutputs, Rollout, Scores, TrainBatch, join_scores
from grpo_safe.rewards import score, score_labels
from grpo_safe.rollout import answer_end, sample
from grpo_safe.rollout.dataset import given
from grpo_safe.rollout.rollouts import join, select
from grpo_safe.runtime import Runtime
from grpo_safe.stages.train_policy.setup import Setup
from grpo_safe.tracking import Stopwatch


def collect(
    cfg: TrainPolicyConfig, s: Setup, step: int, weights: torch.Tensor, state: State, watch: Stopwatch
) -> tuple[Rollout, Scores, int]:
    """This rank's completions of the step, scored. Under algo.resample_ties groups without a difference make room for others of new prompts.

    Every rank sees every score, so all agree which groups stay; what the last round leaves open is filled with tied groups.
    """
    rollouts: list[Rollout] = []
    parts: list[Scores] = []
    for round_ in range(cfg.algo.resample_ties + 1):
        seed = cfg.seed if round_ == 0 else derived_seed(cfg.seed, round_)
        rows = rows_of_step(len(s.read.prompts), cfg.train.prompts_per_step, step, seed)
        mine, repeats = s.rt.share(rows), s.rt.share(occurrences([s.read.prompts[i].id for i in rows]))
        with watch("sampling"), s.trainable.gathered() as policy:
            drawn = sample(
                s.engine, policy, s.tokenizer, [s.read.prompts[i] for i in mine], [s.read.prompt_ids[i] for i in mine],
                cfg.algo.group_size, cfg.sampling, seed, step, repeats,
            )  # fmt: skip
        with watch("scoring"):
            texts = s.method.spoken(drawn.texts)
            parts.append(score(s.objectives, s.reward_model, drawn.prompts, texts, cfg.train.score_batch_tokens))
        rollouts.append(drawn)
        if not cfg.algo.resample_ties:
            return rollouts[0], parts[0], 1
        rollout, scores = join(rollouts, s.tokenizer.pad_token_id), join_scores(parts)
        kept = untied(cfg, s, scores, weights, state)
        wanted = cfg.train.prompts_per_step // s.rt.world_size
        if s.rt.maximum(wanted - sum(kept)) <= 0:
            break
    order = sorted(range(len(kept)), key=lambda g: (not kept[g], g))[:wanted]
    rows = [g * cfg.algo.group_size + i for g in sorted(order) for i in range(cfg.algo.group_size)]
    return select(rollout, rows), scores.rows(rows), round_ + 1


def collect_given(
    cfg: TrainPolicyConfig, s: Setup, step: int, weights: torch.Tensor, state: State, watch: Stopwatch
) -> tuple[Rollout, Scores, int]:
    """This rank's answers of the step, from the data set, scored by the reward model or by their labels."""
    assert s.read.given is not None
    numbers = rows_of_step(len(s.read.prompts), cfg.train.prompts_per_step, step, cfg.seed)
    mine, repeats = s.rt.share(numbers), s.rt.share(occurrences(numbers))
    with watch("sampling"):
        rollout, rows = given(
            s.tokenizer, [s.read.given.answers[i] for i in mine], [s.read.prompt_ids[i] for i in mine], cfg.algo.group_size,
            cfg.sampling.max_new_tokens, cfg.seed, step, answer_end(s.trainable.module, s.tokenizer), repeats,
        )  # fmt: skip
    with watch("scoring"):
        if cfg.train.scores == "labels":
            return rollout, score_labels(s.objectives, rows), 1
        return rollout, score(s.objectives, s.reward_model, rollout.prompts, rollout.texts, cfg.train.score_batch_tokens), 1


def collector(engine: str) -> Any:
    """How a step's completions come about under this rollout engine."""
    return collect_given if engine == "dataset" else collect


def untied(cfg: TrainPolicyConfig, s: Setup, scores: Scores, weights: torch.Tensor, state: State) -> list[bool]:
    """Which of this rank's groups have a difference to learn from; a reward that depends on the batch's means sees all ranks."""
    values, mask = s.rt.gather_rows(scores.values), s.rt.gather_rows(scores.mask)
    n = len(values)
    plain = StepScores(values, mask, torch.zeros(n), torch.zeros(n))
    tied = s.method.order(s.method.slots, plain, weights, state)[2].tied
    return (~own_rows(s.rt, tied, len(scores) // cfg.algo.group_size)).tolist()


def own_rows(rt: Runtime, rows: torch.Tensor, count: int) -> torch.Tensor:
    """This rank's part of what is known of all ranks' rows."""
    first = sum(rt.gather(count)[: rt.rank])
    return rows[first : first + count]


def train_batch(cfg: TrainPolicyConfig, rt: Runtime, rollout: Rollout) -> TrainBatch:
    """The rollout on the device, no advantages yet; under algo.truncated=mask a truncated completion is left out of the loss."""
    loss_mask = rollout.completion_mask
    if cfg.algo.truncated == "mask":
        loss_mask = loss_mask * (~rollout.truncated).to(loss_mask.dtype)[:, None]
    tensors: dict[str, Any] = {
        "prompt_ids": rollout.prompt_ids, "prompt_mask": rollout.prompt_mask, "completion_ids": rollout.completion_ids,
        "completion_mask": loss_mask, "lengths": rollout.completion_mask.sum(1), "sampler_logps": rollout.sampler_logps,
        "advantages": torch.zeros(len(rollout)),
    }  # fmt: skip
    return TrainBatch(**{name: tensor.to(rt.device) for name, tensor in tensors.items()})


def add_fixed_logps(cfg: TrainPolicyConfig, s: Setup, batch: TrainBatch) -> None:
    """Log-probs that stay fixed during the step: the reference's if there is a KL term, the policy's own if it is updated several times."""
    if s.method.uses_reference:
        wanted = Extras(s.extras.eos, s.method.loss.eos_temperature)
        with reference_forward(s) as model:
            found = fixed_outputs(cfg, s.rt, model, batch, wanted)
        batch.ref_logps, batch.ref_eos_logps = found.logps, found.eos_logps
    several = cfg.algo.updates_per_rollout * cfg.algo.minibatches > 1
    exact = (
        s.engine.exact and cfg.policy.dtype == "float32"
    )  # in bfloat16 the engine's log-probs are some hundredths of a nat away
    if "values" in s.method.loss.needs or several or (s.method.reward_kl is not None and not exact):
        found = fixed_outputs(cfg, s.rt, s.trainable.model, batch, Extras())
        batch.old_logps, batch.values = found.logps, found.values


def add_reference_hidden(cfg: TrainPolicyConfig, s: Setup, batch: TrainBatch) -> None:
    """What the reference's LM head reads, for a KL over the vocabulary: its logits would be V / h times as large. Only of the rows that train."""
    if "ref_kl" in s.method.loss.needs:
        with reference_forward(s) as model:
            batch.ref_hidden = fixed_outputs(cfg, s.rt, model, batch, Extras(hidden=True)).hidden


@contextmanager
def reference_forward(s: Setup) -> Iterator[Any]:
    """The forward of the reference: a model of its own, the policy with earlier weights, or with its adapter off."""
    if s.reference is not None:
        yield s.reference
    elif s.moving is not None:
        with reference.put_in(s.trainable, s.moving.weights):
            yield s.forward
    else:
        with models.adapter_off(s.trainable.module):
            yield s.trainable.model


def fixed_outputs(cfg: TrainPolicyConfig, rt: Runtime, model: Any, batch: TrainBatch, extras: Extras) -> PolicyOutputs:
    """What a forward gives for the whole batch, without gradient, zeros beyond a completion, in micro-batches; every rank runs as many."""
    whole: dict[str, torch.Tensor] = {}
    micros = micro_batches(model, batch, range(len(batch)), cfg.train.micro_batch_tokens)
    with torch.no_grad():
        for i in range(rt.maximum(len(micros))):
            index = micros[i] if i < len(micros) else micros[0]
            rows = batch.rows(index)
            found = policy_outputs(model, rows, cfg.sampling.temperature, "no", extras)
            outside = torch.arange(found.logps.shape[1], device=index.device) >= rows.lengths[:, None]
            for name in (f.name for f in fields(found) if getattr(found, f.name) is not None):
                part = getattr(found, name)
                part = part.masked_fill(outside.view(*outside.shape, *[1] * (part.dim() - 2)), 0.0)
                if name not in whole:
                    kept = part.dtype if name == "hidden" else batch.sampler_logps.dtype
                    whole[name] = part.new_zeros(*batch.sampler_logps.shape, *part.shape[2:], dtype=kept)
                whole[name][index, : part.shape[1]] = part.to(whole[name].dtype)
    return PolicyOutputs(**whole)
