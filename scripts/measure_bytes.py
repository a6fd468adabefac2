"""Bytes that ZeRO really sends in one training step of two processes, against the formula.

    python scripts/measure_bytes.py
    python scripts/measure_bytes.py policy.gradient_checkpointing=true --cases zero3/full

Starts train_policy on two gloo processes of this machine's CPU per case, with every collective of torch.distributed counted (the sizes of what
is handed to it, by phase of the step), in the second of two steps. A formula is written from the shapes alone: see `expected`. The model is
the tiny random one of +debug=tiny: the counts follow from the number of weights, not from what they are.

Bytes are those of whole messages: what all processes hold of it together once it is done, or before it is reduced. On a ring of p
processes each one sends (p - 1) / p of a gather or a scatter, twice that for an all-reduce.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROCESSES = 2
GRADIENT_OPS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")
CASES = [("zero1", "lora"), ("zero2", "lora"), ("zero3", "lora"), ("zero1", "full"), ("zero2", "full"), ("zero3", "full")]
PARTS = ("sampling", "reference", "update: weights", "update: gradients")


@dataclass(frozen=True)
class Case:
    """One launch. everything_let_go: ZeRO-3 keeps no gathered weight for later, as with a model of many times its limit of 1e9 live weights."""

    strategy: str
    tuning: str
    everything_let_go: bool = True


# --- in the ranks -----------------------------------------------------------------------------------------------------


def count_collectives(sent: list[tuple[str, str, int]], phase: list[str]) -> None:
    """Wrap torch.distributed: each call leaves (phase, operation, bytes of the whole message) in `sent`. Before DeepSpeed is imported."""
    import torch
    import torch.distributed as dist

    inside: list[str] = []  # a collective that is made of others counts once

    def bytes_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        def given(position: int, *names: str) -> Any:
            return next((kwargs[n] for n in names if n in kwargs), args[position] if position < len(args) else None)

        if name in ("all_gather_into_tensor", "broadcast", "all_reduce", "reduce"):
            value = given(0, "output_tensor", "tensor")
        elif name == "all_gather":
            value = given(0, "tensor_list")
        else:
            value = given(1, "input", "input_list")
        tensors = value if isinstance(value, (list, tuple)) else [value]
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))

    def wrapped(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not inside:
                sent.append((phase[-1] if phase else "between", name, bytes_of(name, args, kwargs)))
            inside.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                inside.pop()

        return call

    for name in (
        "all_reduce",
        "reduce",
        "broadcast",
        "all_gather",
        "all_gather_into_tensor",
        "reduce_scatter",
        "reduce_scatter_tensor",
    ):
        counted = wrapped(name, getattr(dist, name))
        for module in (dist, dist.distributed_c10d):
            setattr(module, name, counted)


def rank(config: Path, out: Path, everything_let_go: bool) -> None:
    """One process: the stage itself, its last step's messages written by rank 0."""
    sent: list[tuple[str, str, int]] = []
    phase: list[str] = []
    count_collectives(sent, phase)

    from grpo_safe import tracking
    from grpo_safe.checks import load_frozen, typed
    from grpo_safe.runtime import sharded
    from grpo_safe.stages import train_policy
    from grpo_safe.stages.train_policy import updating

    enter, leave = tracking.Stopwatch.__enter__, tracking.Stopwatch.__exit__

    def entered(watch: Any) -> None:
        phase.append(watch._open[-1][0])
        enter(watch)

    def left(watch: Any, *rest: object) -> None:
        phase.pop()
        leave(watch, *rest)

    tracking.Stopwatch.__enter__, tracking.Stopwatch.__exit__ = entered, left  # type: ignore[method-assign]
    if everything_let_go:
        plain = sharded.deepspeed_config

        def letting_go(*args: Any) -> dict[str, Any]:
            found = plain(*args)
            if found["zero_optimization"]["stage"] == 3:
                found["zero_optimization"] |= {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
            return found

        sharded.deepspeed_config = letting_go
    backwards: list[int] = []
    backward = sharded.ShardedTrainable.backward

    def counted_backward(self: Any, *args: Any, **kwargs: Any) -> None:
        backwards.append(1)
        backward(self, *args, **kwargs)

    sharded.ShardedTrainable.backward = counted_backward  # type: ignore[method-assign]
    pick, steps = train_policy.sample_rows, []

    def end_of_step(*args: Any) -> Any:
        steps.append({"sent": list(sent), "micro_batches": len(backwards)})
        sent.clear()
        backwards.clear()
        return pick(*args)

    train_policy.sample_rows = end_of_step  # type: ignore[assignment]
    assert updating.update is train_policy.update
    cfg = typed(load_frozen("train-policy", config))
    train_policy.run(cfg, Path(cfg.run_dir))
    if os.environ["RANK"] == "0":
        out.write_text(json.dumps(steps[-1]))


# --- outside ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """Weights of a policy."""

    whole: int  # N, a tied embedding once
    trained: int  # n
    table: int  # V h: the embedding, and the LM head's weight
    tied: bool

    @property
    def gathered(self) -> int:
        """What the modules of a forward gather: a tied table is fetched by the embedding and again by the head."""
        return self.whole + (self.table if self.tied else 0)


def expected(strategy: str, size: Sizes, weight_bytes: int, micro_batches: int) -> dict[str, int]:
    """Bytes of a step by part, from shapes alone.

    ZeRO-1: gradients n once, the updated weights n once. ZeRO-2: the same, the gradients once per micro-batch. ZeRO-3: N for the rollout; per
    micro-batch of the reference a forward's weights, adapters left out; per micro-batch of the update a forward's, a backward's (a frozen
    embedding has none) and gradients n. Nothing after the update: the next to need the weights gathers them.
    """
    lora = size.trained < size.whole
    if strategy != "zero3":
        found = (0, 0, size.trained, size.trained * (micro_batches if strategy == "zero2" else 1))
    else:
        reference = size.gathered - (size.trained if lora else 0)
        backward = size.gathered - (size.table if lora else 0)
        found = (
            size.whole,
            reference * micro_batches,
            (size.gathered + backward) * micro_batches,
            size.trained * micro_batches,
        )
    return {part: elements * weight_bytes for part, elements in zip(PARTS, found, strict=True)}


def by_part(sent: list[tuple[str, str, int]]) -> dict[str, int]:
    """The step's messages: sampling, reference, and of the update what gathers weights and what reduces gradients."""
    sums: Counter[str] = Counter()
    for phase, operation, size in sent:
        if phase == "update":
            phase = "update: gradients" if operation in GRADIENT_OPS else "update: weights"
        sums[phase if phase in PARTS else "scores and counts"] += size
    return {part: sums[part] for part in (*PARTS, "scores and counts")}


def measured(case: Case, folder: Path, store: Path, words: list[str]) -> dict[str, Any]:
    """The last step of a run on two processes; N and n of its policy."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from grpo_safe.checks import validated
    from grpo_safe.cli import STAGES, conf_dir, prepared_overrides

    run_dir, out = folder / "run", folder / "step.json"
    words = [
        "+debug=tiny", f"store={store}", "reward_model=v1", f"launch={case.strategy}", f"launch.processes={PROCESSES}", "launch.device=cpu",
        "train.save_every=null", "train.micro_batch_tokens=128", f"policy.lora.enabled={str(case.tuning == 'lora').lower()}", *words,
    ]  # fmt: skip
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose(config_name=STAGES["train-policy"], overrides=prepared_overrides("train-policy", words))
    OmegaConf.update(cfg, "run_dir", str(run_dir))
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(validated("train-policy", cfg)))
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_WAIT_POLICY": "PASSIVE",
        "DS_LOG_LEVEL": "error",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), __file__]
    command += ["--rank", str(run_dir / "config.yaml"), str(out), str(int(case.everything_let_go))]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        sys.exit(f"{case}: the run failed\n{done.stderr[-4000:]}")
    return json.loads(out.read_text())


def sizes(tuning: str, start: str) -> Sizes:
    """Of the policy as the runs load it."""
    from grpo_safe import models
    from grpo_safe.config import LoraConfig

    model: Any = models.load_causal_lm(models.resolve_start(start, None, False, "--start"), "float32")
    table, tied = model.get_input_embeddings().weight.numel(), model.config.tie_word_embeddings
    if tuning == "lora":
        model = models.add_lora(model, LoraConfig(), "CAUSAL_LM")
    whole, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or everything) for everything in (True, False))
    return Sizes(whole, trained, table, tied)


def compared(cases: list[Case], words: list[str]) -> list[dict[str, Any]]:
    """Measured and expected bytes of each case."""
    from benchmark_systems import publish_reward_model

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        publish_reward_model(root / "store", "embedded:tiny-bert", 4)
        for number, case in enumerate(cases):
            step = measured(case, root / str(number), root / "store", words)
            size = sizes(case.tuning, "embedded:tiny-llama")
            found = by_part([tuple(row) for row in step["sent"]])
            formula = expected(case.strategy, size, 4, step["micro_batches"])
            rows.append({"case": case, "size": size, "measured": found, "formula": formula, **step})
            print(row_of(rows[-1]), flush=True)
    return rows


HEADER = (
    "| strategy | trained | N | n | micro-batches | "
    + " | ".join(f"{p}: bytes, formula" for p in PARTS)
    + " | rest: bytes |\n|---|---|---|---|---|"
    + "---|" * (len(PARTS) + 1)
)


def row_of(found: dict[str, Any]) -> str:
    """A line of the table."""
    case: Case = found["case"]
    name = case.strategy + ("" if case.everything_let_go or case.strategy != "zero3" else ", weights kept")
    pairs = [f"{found['measured'][p]:,}, {found['formula'][p]:,}" for p in PARTS]
    shape = [name, case.tuning, f"{found['size'].whole:,}", f"{found['size'].trained:,}", str(found["micro_batches"])]
    return "| " + " | ".join([*shape, *pairs, f"{found['measured']['scores and counts']:,}"]) + " |"


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4] == "1")
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a file for the table")
    parser.add_argument("--cases", nargs="+", default=[f"{s}/{t}" for s, t in CASES], help="strategy/lora or strategy/full")
    parser.add_argument("--operations", action="store_true", help="also each operation with its number of calls")
    parser.add_argument("overrides", nargs="*", help="of every run: KEY=VALUE")
    args = parser.parse_args()
    if unknown := [c for c in args.cases if tuple(c.split("/")) not in CASES]:
        parser.error(f"--cases {' '.join(unknown)}: expected some of {' '.join(f'{s}/{t}' for s, t in CASES)}")
    cases = [Case(*c.split("/")) for c in args.cases]
    cases += [Case(c.strategy, c.tuning, False) for c in cases if c.strategy == "zero3"]
    print(HEADER, flush=True)
    rows = compared(cases, args.overrides)
    if args.operations:
        for found in rows:
            calls = Counter((phase, operation) for phase, operation, _ in found["sent"])
            print(found["case"], dict(calls))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join([HEADER, *map(row_of, rows)]) + "\n")


if __name__ == "__main__":
    main()
