"""Advantages -> gradients: minibatches, micro-batches, denominators that count all ranks."""

from __future__ import annotations

import math
from typing import Any

import torch

from grpo_safe.algorithm.losses import Denominators, Loss
from grpo_safe.algorithm.mismatch import mismatch
from grpo_safe.algorithm.order import derived_seed
from grpo_safe.algorithm.schedule import learning_rate
from grpo_safe.config import TrainPolicyConfig
from grpo_safe.forward import micro_batches, policy_outputs
from grpo_safe.records import TrainBatch
from grpo_safe.runtime import Runtime
from grpo_safe.stages.train_policy.setup import Setup


def update(cfg: TrainPolicyConfig, s: Setup, batch: TrainBatch, loss: Loss, step: int) -> tuple[dict[str, float], float, float]:
    """updates_per_rollout passes over the batch in minibatches; returns summed figures, the last gradient norm and rate."""
    rt, algo = s.rt, cfg.algo
    per_step = algo.updates_per_rollout * algo.minibatches
    totals: dict[str, torch.Tensor] = {}
    grad_norm = lr = 0.0
    skipped = 0
    largest_gap = torch.zeros(())
    s.trainable.model.train()
    for number in range(per_step):
        order = list(range(len(batch)))
        if algo.minibatches > 1:  # whole groups, in an order that follows from (seed, step, update)
            order = minibatch_rows(cfg, rt, len(batch), step, number, algo.group_size if loss.arrangement is None else batch.unit)
        denominators = count(rt, batch, order)
        silent = rows_without_gradient(batch, order, loss)
        for part, learns in ((sorted(silent), False), ([i for i in order if i not in silent], True)):
            micros = micro_batches(s.trainable.model, batch, part, cfg.train.micro_batch_tokens)
            for i in range(rounds := max(int(learns), rt.maximum(len(micros)))):
                rows = batch.rows(micros[i] if i < len(micros) else torch.arange(batch.unit, device=rt.device))
                real = float(i < len(micros))  # a filler keeps the ranks in step and weighs nothing
                with torch.set_grad_enabled(learns):
                    outputs = policy_outputs(s.trainable.model, rows, cfg.sampling.temperature, loss.entropy, s.extras)
                    value, sums = loss.function(outputs, rows, denominators)
                old_logps = outputs.logps.detach() if rows.old_logps is None else rows.old_logps
                apart, gap = mismatch(old_logps, rows.sampler_logps, rows.completion_mask, algo.sampler_cap)
                sums |= {"loss": value.detach(), **apart}
                largest_gap = torch.maximum(largest_gap, real * gap.float().cpu())
                if learns:
                    s.trainable.backward(value * real, last=i == rounds - 1)
                for name, figure in sums.items():
                    totals[name] = totals.get(name, torch.zeros(())) + real * figure.float().cpu()
        optimizer_step = (step - 1) * per_step + number + 1
        o = cfg.optim
        lr = learning_rate(optimizer_step, cfg.train.steps * per_step, o.lr, o.schedule, o.warmup, o.min_lr)
        grad_norm = s.trainable.step(lr)
        skipped += not math.isfinite(grad_norm)
    totals["tokens"] = batch.completion_mask.sum().float().cpu() * algo.updates_per_rollout
    totals["sequences"] = (batch.completion_mask.sum(1) > 0).sum().float().cpu() * algo.updates_per_rollout
    totals["passes"] = torch.tensor(float(per_step)) / rt.world_size
    summed = rt.sum(torch.stack([totals[name] for name in sorted(totals)]))
    figures = dict(zip(sorted(totals), summed.tolist(), strict=True)) | {
        "sampler_gap_max": max(rt.gather(float(largest_gap))), "skipped_updates": float(skipped),
    }  # fmt: skip
    return figures, grad_norm, lr


def rows_without_gradient(batch: TrainBatch, rows: list[int], loss: Loss) -> set[int]:
    """Those whose completion has advantage 0 under a loss that asks for nothing else: only their figures are wanted."""
    if not loss.advantage_only:
        return set()
    live = (batch.advantages.view(len(batch), -1) != 0).any(1).tolist()
    return {i for i in rows if not live[i]}


def minibatch_rows(cfg: TrainPolicyConfig, rt: Runtime, rows: int, step: int, number: int, per_group: int) -> list[int]:
    """This rank's rows of the number-th optimizer step: a share of all ranks' groups (per_group rows each), each group once per update.

    The order follows from (seed, step, update) over the whole batch, so a minibatch holds the same groups on any number of ranks (none of them
    may be this rank's).
    """
    mine = rows // per_group
    groups = mine * rt.world_size
    round_, part = divmod(number, cfg.algo.minibatches)
    generator = torch.Generator().manual_seed(derived_seed(cfg.seed, step, round_))
    order = torch.randperm(groups, generator=generator).tolist()
    chosen = order[groups * part // cfg.algo.minibatches : groups * (part + 1) // cfg.algo.minibatches]
    local = sorted(g - rt.rank * mine for g in chosen if g // mine == rt.rank)
    return [g * per_group + i for g in local for i in range(per_group)]


def count(rt: Runtime, batch: TrainBatch, rows: Any) -> Denominators:
    """Completions and tokens of a minibatch over all ranks."""
    index = torch.tensor(list(rows), dtype=torch.long, device=batch.lengths.device)
    local = torch.tensor([float(len(index)), float(batch.completion_mask[index].sum())])
    sequences, tokens = rt.sum(local).tolist()
    return Denominators(max(1.0, sequences), max(1.0, tokens))
