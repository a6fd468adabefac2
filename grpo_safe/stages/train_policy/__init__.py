"""Stage 2: prompts + a reward model -> a policy, by GRPO over K objectives (arXiv 2503.21819).

One step: sample G completions of each prompt, score them on every objective in one forward, sum the scores by their weights, compare within
each group, and push the policy towards what stood out, held near its start by a KL term.

What is left out, against PPO: no critic (the group's mean is the baseline), no reward per token, no reuse of old rollouts by default.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from grpo_safe.algorithm.comparison import State
from grpo_safe.config import TrainPolicyConfig
from grpo_safe.errors import StageError
from grpo_safe.records import Rollout
from grpo_safe.runtime.peak import peak_memory_gb
from grpo_safe.stages.train_policy.collecting import add_fixed_logps, add_reference_hidden, collector, own_rows, train_batch
from grpo_safe.stages.train_policy.comparing import arranged, compare_all, confidence_metrics, followed
from grpo_safe.stages.train_policy.finishing import keep_best, publish, restore_best, validate
from grpo_safe.stages.train_policy.metrics import refuse_unscored, sample_rows, step_metrics
from grpo_safe.stages.train_policy.profiling import Profiler
from grpo_safe.stages.train_policy.setup import set_up
from grpo_safe.stages.train_policy.updating import update
from grpo_safe.tracking import Stopwatch
from grpo_safe.versions import resume


@dataclass
class LoopState:
    """What a step hands to the next one besides weights, and a resumed run goes on with."""

    first_means: dict[str, float] = field(
        default_factory=dict
    )  # objective -> mean score of the first step: gains are measured against it
    metrics: dict[str, Any] = field(default_factory=dict)  # of the last step
    method: State = field(default_factory=dict)  # multipliers, running moments, weights of kinds
    best: dict[str, Any] = field(default_factory=dict)  # the best evaluated step of a run with limits
    skipped: int = 0  # optimizer steps that were left out, as their gradient was not finite
    skipped_in_a_row: int = 0  # steps at the end of which that happened

    def count_skipped(self, step: int, skipped: int, bound: int) -> None:
        """Raises StageError where `bound` steps in a row were left out."""
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
        if self.skipped_in_a_row >= bound:
            raise StageError(
                f"step {step}: the gradient was not finite in {bound} steps in a row (train.max_skipped); nothing was published. Lower optim.lr, or look at "
                "the loss and the scores in metrics.jsonl; resume from the last state with other settings"
            )


def run(cfg: TrainPolicyConfig, run_dir: Path) -> None:
    """GRPO with K objectives. One step: sample, score, compare within groups, update."""
    s = set_up(cfg, run_dir)
    rt, tracker = s.rt, s.tracker
    collect = collector(cfg.rollout.engine)
    resumed = resume.load(run_dir, s.trainable) if cfg.resume else resume.Resumed(0, {}, {})
    resume.refuse_finished(run_dir, resumed.step, cfg.train.steps)
    resume.rewind_logs(run_dir, resumed.step, rt)
    if s.moving is not None and resumed.beside:
        s.moving.weights = resumed.beside
    carried = LoopState(**resumed.record)
    rollout: Rollout | None = None
    profiler = Profiler.start(cfg, s) if cfg.train.profile else None
    tracker.start(cfg.train.steps, resumed.step, "train-policy")
    for step in range(resumed.step + 1, cfg.train.steps + 1):
        began, watch = time.perf_counter(), Stopwatch(profiler.memory_of if profiler else None)
        weights = s.objectives.weights_at(step, cfg.train.steps)
        rollout, scores, rounds = collect(cfg, s, step, weights, carried.method, watch)
        batch = train_batch(cfg, rt, rollout)
        if s.method.loss.arrangement is None:
            with watch("reference"):
                add_fixed_logps(cfg, s, batch)
        found = compare_all(cfg, s, rollout, scores, batch, step, weights, carried.method)
        advantages = own_rows(rt, found.groups.advantages, len(batch))
        batch = arranged(cfg, s, rollout, batch, found)
        with watch("reference"):
            if s.method.loss.arrangement is not None:  # of what is compared, not of whole groups
                add_fixed_logps(cfg, s, batch)
            add_reference_hidden(cfg, s, batch)
        with watch("update"):
            update_sums, grad_norm, lr = update(cfg, s, batch, s.method.loss, step)
        carried.method = followed(s, found.state, update_sums)
        carried.count_skipped(step, int(update_sums["skipped_updates"]), cfg.train.max_skipped)
        if s.moving is not None:
            s.moving.follow(s.trainable, step)

        metrics = step_metrics(rt, rollout, scores, s.objectives, found, update_sums, cfg.algo.group_size, carried.first_means)
        if step == 1:
            refuse_unscored(s.objectives, metrics, step)
        metrics |= {"grad_norm": grad_norm, "lr": lr, **{f"seconds/{k}": v for k, v in watch.seconds.items()}}
        metrics |= {"seconds/step": time.perf_counter() - began, "peak_memory_gb": peak_memory_gb(rt.device)}
        metrics |= confidence_metrics(s, rollout)
        metrics |= {f"kind_weight/{name}": weight for name, weight in carried.method.get("kinds", {}).items()}
        metrics |= {"sampling_rounds": rounds} if cfg.algo.resample_ties else {}
        metrics["tokens_per_second"] = metrics["completion_tokens"] / metrics["seconds/step"]
        if profiler is not None:
            metrics |= profiler.step(rollout, watch)
        if cfg.train.eval_every and (step % cfg.train.eval_every == 0 or step == cfg.train.steps):
            judged = validate(cfg, s)
            metrics |= judged
            carried.best = keep_best(s, run_dir, step, judged, carried.best)
        carried.metrics = metrics
        tracker.log(step, metrics)
        tracker.samples(step, sample_rows(rollout, scores, advantages, cfg.tracking.sample_count, rt))
        tracker.advance(f"reward {metrics['reward/mean']:.3f} kl {metrics.get('kl', 0.0):.4f}")
        if cfg.train.save_every and (step % cfg.train.save_every == 0 or step == cfg.train.steps):
            optimizer_steps = step * cfg.algo.updates_per_rollout * cfg.algo.minibatches - carried.skipped
            beside = {} if s.moving is None else s.moving.weights
            resume.save(run_dir, step, s.trainable, rt, asdict(carried), cfg.train.keep_states, optimizer_steps, beside)

    if profiler is not None and rt.is_main:
        profiler.show()
    metrics = restore_best(s, run_dir, carried.best, carried.metrics)
    with s.trainable.gathered() as policy:
        if rt.is_main:
            resume.mark_published(run_dir, publish(cfg, s, policy, metrics, rollout))
    rt.barrier()
    tracker.close()
