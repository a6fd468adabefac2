"""Where a step's time and memory go, the time against the floor that the machine sets: train.profile=true.

The floor of a phase is the longer of its arithmetic (counted multiplications over the measured rate of a large matrix product) and its
memory traffic (counted bytes over the measured rate of a large sum). Attention's own products are counted, softmax and norms are not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from grpo_safe.models.memory import ModelShape
from grpo_safe.records import Rollout

PHASES = ("sampling", "scoring", "reference", "update")


@dataclass(frozen=True)
class Machine:
    """Measured rates of one process: of a matrix product in the run's dtype, and of reading memory."""

    flops_per_second: float
    bytes_per_second: float


@dataclass(frozen=True)
class Work:
    """What a phase must do at least."""

    flops: float
    bytes: float = 0.0

    def seconds(self, machine: Machine) -> float:
        return max(self.flops / machine.flops_per_second, self.bytes / machine.bytes_per_second)


def measure(device: torch.device, dtype: torch.dtype) -> Machine:
    """Medians of a few runs, about a second."""
    side, length = (8192, 2**28) if device.type == "cuda" else (1536, 2**26)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    long = torch.ones(length, device=device)
    product = _median_seconds(lambda: a @ b, device)
    reading = _median_seconds(long.sum, device)
    return Machine(2 * side**3 / product, long.nbytes / reading)


def floors(
    shape: ModelShape, rollout: Rollout, group_size: int, machine: Machine, weight_bytes: int, lora: bool, reference: bool,
    policy_passes: int, reward_weights: int, scored_tokens: int, sampling_rows: int,
) -> dict[str, float]:  # fmt: skip
    """Seconds per phase that this rank's rollout takes at least. reward_weights: of the reward model's layers."""
    prompts = rollout.prompt_mask[::group_size].sum(1).tolist()
    lengths = rollout.completion_mask.sum(1).tolist()
    contexts = rollout.prompt_mask.sum(1).tolist()
    layers = shape.layers * sum(i * o for i, o in shape.linears)
    head = shape.vocab * shape.hidden
    width = shape.heads * shape.head_dim
    pairs = sum(p * p / 2 for p in prompts) + sum(c * (p + c / 2) for p, c in zip(contexts, lengths, strict=True))
    forward = 2.0 * layers * (sum(prompts) + sum(lengths)) + 2.0 * head * sum(lengths) + 4.0 * shape.layers * width * pairs
    cache = 2 * shape.layers * shape.kv_heads * shape.head_dim * weight_bytes  # bytes of one token's keys and values
    sampling = Work(2.0 * layers * sum(prompts) + 2.0 * head * len(prompts)).seconds(machine)
    for first in range(0, len(lengths), sampling_rows):
        chunk = range(first, min(len(lengths), first + sampling_rows))
        for t in range(1, max(lengths[i] for i in chunk)):
            alive = [i for i in chunk if lengths[i] > t]
            flops = 2.0 * (layers + head) * len(alive)
            traffic = (layers + head) * weight_bytes + cache * sum(contexts[i] + t for i in alive)
            sampling += Work(flops, traffic).seconds(machine)
    return {
        "sampling": sampling,
        "scoring": Work(2.0 * reward_weights * scored_tokens).seconds(machine),
        "reference": Work(forward).seconds(machine) if reference else 0.0,
        "update": policy_passes
        * Work((2 if lora else 3) * forward).seconds(machine),  # frozen weights need no gradient of their own
    }


def show(seconds: list[dict[str, float]], floor: list[dict[str, float]], peaks: list[dict[str, float]], machine: Machine) -> None:
    """A table of medians over the steps; of memory the highest."""
    table = Table(
        title=f"a step against its floor: {machine.flops_per_second / 1e9:.0f} GFLOP/s, {machine.bytes_per_second / 1e9:.1f} GB/s measured"
    )
    for column in ("phase", "seconds", "share", "floor", "fraction of peak", "peak memory, GB"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    whole = median(sum(s.get(p, 0.0) for p in PHASES) for s in seconds)
    highest = {phase: max((p.get(phase, 0.0) for p in peaks), default=0.0) for phase in PHASES}

    def memory(gb: float) -> str:
        return f"{gb:.2f}" if gb else "-"

    for phase in PHASES:
        taken, least = median(s.get(phase, 0.0) for s in seconds), median(f[phase] for f in floor)
        table.add_row(
            phase,
            f"{taken:.2f}",
            f"{taken / whole:.0%}",
            f"{least:.2f}",
            f"{least / taken:.0%}" if taken else "-",
            memory(highest[phase]),
        )
    least = median(sum(f.values()) for f in floor)
    table.add_row("together", f"{whole:.2f}", "100%", f"{least:.2f}", f"{least / whole:.0%}", memory(max(highest.values())))
    Console(width=110).print(table)


def _median_seconds(run: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(6):
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return median(times[1:])
