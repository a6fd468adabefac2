"""What 7B on 8 GPUs, 14B on 16 and 70B on 128 would take: memory, arithmetic, bytes and seconds a step, all derived from shapes, none measured.

    python scripts/derive_scale.py

Memory: models/memory.py. Multiplications and the memory traffic of decoding: runtime/profile.py. Bytes between GPUs: the formulas
that scripts/measure_bytes.py holds against what is really sent, of weights in bfloat16. The machine is an assumption, stated in `Cluster`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from measure_bytes import PARTS, Sizes, expected

from grpo_safe.models.memory import QWEN2_5, ModelShape, PolicyMemory, fits, lora_parameters, policy_memory
from grpo_safe.records import Rollout
from grpo_safe.runtime.profile import Machine, floors

LLAMA_70B = ModelShape(80, 8192, 28_672, 64, 8, 128, 128_256, tied=False, qkv_bias=False)
REWARD_MODEL, REWARD_MODEL_GB = 494e6, 2.0  # weights; held in float32


@dataclass(frozen=True)
class Cluster:
    """Nominal rates of an H100 SXM machine with one 400 Gb/s card per GPU, and what share of them is assumed to be reached."""

    flops: float = 989e12 * 0.4  # bfloat16, dense
    memory: float = 3.35e12 * 0.6
    nvlink: float = 450e9 * 0.7  # one way, inside a machine of 8
    network: float = 50e9 * 0.7  # one way, per GPU, between machines
    device_gb: float = 80.0


@dataclass(frozen=True)
class Run:
    """A launch on `gpus` devices."""

    name: str
    shape: ModelShape
    gpus: int
    lora: bool
    strategy: str
    micro_batch_tokens: int = 8192
    rows_at_once: int = 64


GROUP, PROMPTS_PER_GPU, PROMPT, NEW, RANK = 8, 8, 512, 512, 16
RUNS = [
    Run(f"{name} x {gpus}, {'LoRA' if lora else 'all weights'}", shape, gpus, lora, strategy)
    for name, shape, gpus in (("7B", QWEN2_5["7b"], 8), ("14B", QWEN2_5["14b"], 16), ("70B", LLAMA_70B, 128))
    for lora, strategy in ((True, "zero2"), (True, "zero3"), (False, "zero3"))
    if not (name != "70B" and lora and strategy == "zero3")
]


def memory_of(run: Run) -> PolicyMemory:
    """Of one device."""
    return policy_memory(
        run.shape, lora_rank=RANK if run.lora else None, strategy=run.strategy, processes=run.gpus, weight_bytes=2,
        gradient_checkpointing=True, micro_batch_tokens=run.micro_batch_tokens, rows_at_once=run.rows_at_once, prompt_tokens=PROMPT,
        new_tokens=NEW, kl=True, reward_model_gb=REWARD_MODEL_GB, packed=True,
    )  # fmt: skip


def phases(run: Run, machine: Machine) -> dict[str, float]:
    """Seconds of each phase of one device's share; machine: Machine(1, inf) counts multiplications instead."""
    rows = PROMPTS_PER_GPU * GROUP
    prompts, new = torch.ones(rows, PROMPT, dtype=torch.long), torch.ones(rows, NEW, dtype=torch.long)
    rollout = Rollout([], prompts, prompts, new, new, torch.zeros(rows, NEW), torch.zeros(rows).bool(), [])
    found = floors(
        run.shape, rollout, GROUP, machine, 2, run.lora, True, 1, int(REWARD_MODEL), rows * (PROMPT + NEW), run.rows_at_once
    )
    recomputed = (2 if run.lora else 3) + 1  # gradient checkpointing: one forward more
    return found | {"update": found["update"] * recomputed / (recomputed - 1)}


def micro_batches(run: Run) -> int:
    """Of a step, per device: whole groups of one prompt and G completions in the budget."""
    per_group = PROMPT + GROUP * NEW
    return -(-PROMPTS_PER_GPU // max(1, run.micro_batch_tokens // per_group))


def sent(run: Run) -> dict[str, float]:
    """Bytes of whole messages in a step, by part. Under gradient checkpointing ZeRO-3 gathers the layers a third time, to recompute them."""
    adapters = lora_parameters(run.shape, RANK) if run.lora else 0
    whole = run.shape.parameters + adapters
    size = Sizes(whole, adapters or whole, run.shape.vocab * run.shape.hidden, run.shape.tied)
    found: dict[str, float] = dict(expected(run.strategy, size, 2, micro_batches(run)))
    if run.strategy == "zero3":
        tables = size.table * (1 if size.tied else 2)
        found["update: weights"] += 2 * (size.whole - tables) * micro_batches(run)
    return found


def seconds_on_the_wire(run: Run, size: float, cluster: Cluster) -> float:
    """A ring over all devices moves (p - 1) / p of each message through the slowest link."""
    rate = cluster.nvlink if run.gpus <= 8 else cluster.network
    return size * (run.gpus - 1) / run.gpus / rate


def main() -> None:
    cluster = Cluster()
    machine = Machine(cluster.flops, cluster.memory)
    print(
        f"{PROMPTS_PER_GPU} prompts of {PROMPT} tokens a GPU and step, G = {GROUP}, {NEW} new tokens, {RUNS[0].micro_batch_tokens} tokens a micro-batch, "
        f"{RUNS[0].rows_at_once} rows decoded at once, gradient checkpointing, bfloat16, LoRA r = {RANK}, a KL term.\n"
    )
    print("Memory of a device, GB:\n")
    columns = (
        "weights | reference | optimizer, gradients | gathered to sample | KV cache, decoding | activations, logits, buffers"
    )
    print(f"| | strategy | {columns} | sampling | update | fits {cluster.device_gb:.0f} GB |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for run in RUNS:
        m = memory_of(run)
        sums = (
            m.weights, m.reference, m.optimizer + m.gradients, m.gathered, m.kv_cache + m.decoding, m.activations + m.logits + m.buffers,
            m.sampling, m.update,
        )  # fmt: skip
        verdict = "yes" if fits(m, cluster.device_gb) else "no: " + ("sampling" if m.sampling > m.update else "update")
        print(f"| {run.name} | {run.strategy} | " + " | ".join(f"{x:.1f}" for x in sums) + f" | {verdict} |")
    print("\nArithmetic of a device and step, and seconds at the assumed rates:\n")
    print(
        "| | strategy | PFLOP: sampling, reference, update | s: sampling | scoring | reference | update | on the wire | together | completions/s |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for run in RUNS:
        work, took = phases(run, Machine(1.0, float("inf"))), phases(run, machine)
        wire = seconds_on_the_wire(run, sum(sent(run).values()), cluster)
        whole = sum(took.values()) + wire
        pflop = ", ".join(f"{work[p] / 1e15:.2f}" for p in ("sampling", "reference", "update"))
        times = [*(took[p] for p in ("sampling", "scoring", "reference", "update")), wire, whole]
        speed = PROMPTS_PER_GPU * GROUP * run.gpus / whole
        print(f"| {run.name} | {run.strategy} | {pflop} | " + " | ".join(f"{t:.1f}" for t in times) + f" | {speed:.0f} |")
    print("\nGB of whole messages in a step; micro-batches a device:\n")
    print("| | strategy | micro-batches | " + " | ".join(PARTS) + " | link |")
    print("|---|---|---|---|---|---|---|---|")
    for run in RUNS:
        link = "NVLink" if run.gpus <= 8 else "network"
        parts = " | ".join(f"{sent(run)[p] / 1e9:.2f}" for p in PARTS)
        print(f"| {run.name} | {run.strategy} | {micro_batches(run)} | {parts} | {link} |")


if __name__ == "__main__":
    main()
