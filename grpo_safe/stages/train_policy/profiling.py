"""train.profile=true: times and peak memory of this rank's steps, the times beside their floors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from grpo_safe import models
from grpo_safe.config import TrainPolicyConfig
from grpo_safe.models import memory
from grpo_safe.models.reward_model import tokens_to_score
from grpo_safe.records import Rollout
from grpo_safe.runtime import profile
from grpo_safe.runtime.peak import phases_measurable
from grpo_safe.stages.train_policy.setup import Setup
from grpo_safe.tracking import Stopwatch


@dataclass
class Profiler:
    """This rank's times, floors and peaks of memory, step by step."""

    cfg: TrainPolicyConfig
    s: Setup
    machine: profile.Machine
    memory_of: torch.device | None  # None where a phase's peak cannot be told from the run's
    seconds: list[dict[str, float]] = field(default_factory=list)
    floor: list[dict[str, float]] = field(default_factory=list)
    peaks: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def start(cfg: TrainPolicyConfig, s: Setup) -> Profiler:
        machine = profile.measure(s.rt.device, models.DTYPES[cfg.policy.dtype])
        return Profiler(cfg, s, machine, s.rt.device if phases_measurable(s.rt.device) else None)

    def step(self, rollout: Rollout, watch: Stopwatch) -> dict[str, float]:
        """Figures of the step: floor and peak memory of each phase, and the floors' sum over the time taken."""
        cfg, s = self.cfg, self.s
        reward_model = s.reward_model.model
        tables = sum(m.weight.numel() for m in reward_model.modules() if isinstance(m, nn.Embedding))
        floor = profile.floors(
            memory.shape_of(s.policy_config), rollout, cfg.algo.group_size, self.machine, 2 if cfg.policy.dtype == "bfloat16" else 4,
            cfg.policy.lora.enabled, s.method.uses_reference, cfg.algo.updates_per_rollout,
            sum(p.numel() for p in reward_model.parameters()) - tables, tokens_to_score(s.reward_model, rollout.prompts, rollout.texts),
            cfg.sampling.batch_size,
        )  # fmt: skip
        self.seconds.append({phase: watch.seconds.get(phase, 0.0) for phase in profile.PHASES})
        self.floor.append(floor)
        self.peaks.append(watch.peaks)
        found = {f"floor/{phase}": value for phase, value in floor.items()}
        if watch.peaks:  # a phase's peak starts the run's anew
            found |= {f"peak_memory_gb/{phase}": value for phase, value in watch.peaks.items()}
            found["peak_memory_gb"] = max(value for peaks in self.peaks for value in peaks.values())
        return found | {"fraction_of_peak": sum(floor.values()) / sum(self.seconds[-1].values())}

    def show(self) -> None:
        profile.show(self.seconds, self.floor, self.peaks, self.machine)
