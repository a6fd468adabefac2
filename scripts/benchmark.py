"""grpo-safe and TRL in turn on the same work: ratios of step time, tokens per second and peak memory.

    python scripts/benchmark.py                                 # LoRA and full, 40- and 256-token prompts
    python scripts/benchmark.py --tuning lora --prompt-tokens 40 --trl-rewards models
    python scripts/benchmark.py --grid --out OUT                # one axis at a time: prompt, completion, G, K, LoRA and full
    python scripts/benchmark.py --grid --out OUT --cells G K    # a part of the grid; cells that OUT has are kept
    python scripts/benchmark.py --list                          # the cells of the grid

Each system trains in a process of its own (so that peak memory is its own), and waits while the other makes its step. Ours is
grpo_safe.stages.train_policy.run, as the command runs it; TRL's is GRPOTrainer.train in the fastest settings known for a CPU. Before anything
is timed, both make the same updates on the same stored completions and must agree on advantages, loss and gradient norm (scripts/
benchmark_systems.py). End tokens are forbidden, so both sample exactly --new-tokens tokens.

On a CPU each process may hold --memory-gb. Where TRL needs more for all of a step's completions at once, it gets half as many in each of twice
as many micro-batches, until it fits; that is recorded. OUT/grid.json takes each cell as it ends; OUT/grid.md and OUT/grid.png show what it has.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import resource
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import benchmark_report as report
import torch
from benchmark_systems import Job, ours, publish_reward_model, theirs

CHECK_TOKENS, CHECK_STEPS = 8, 3
SYSTEMS = {"ours": ours, "trl": theirs}
OURS = {"lora": (), "full": ("policy.gradient_checkpointing=selective",)}  # the aim is half of TRL's time in .6 of its memory
STANDARD = {"tuning": "lora", "prompt_tokens": 40, "new_tokens": 64, "group_size": 8, "objectives": 4}
GRID: dict[str, dict[str, Any]] = {  # name -> what differs from the standard cell
    "standard": {},
    **{f"prompt={n}": {"prompt_tokens": n} for n in (256, 1024)},
    "new=256": {"new_tokens": 256},
    **{f"G={n}": {"group_size": n} for n in (4, 16, 32)},
    **{f"K={n}": {"objectives": n} for n in (1, 16)},
    "full": {"tuning": "full"},
    "full,prompt=256": {"tuning": "full", "prompt_tokens": 256},
}


class Worker:
    """One system in its process, one step at a time."""

    def __init__(self, system: Callable[[Job, Any], None], job: Job, memory_gb: float | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(target=_work, args=(system, job, end, memory_gb), daemon=True)
        self.process.start()
        end.close()

    def step(self) -> dict[str, Any] | None:
        """Let it make one step; what it says of it, None where memory did not suffice."""
        try:
            self.pipe.send("go")
            said = self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            if self.process.exitcode == -signal.SIGKILL:  # how the kernel ends a process for which no memory is left
                return None
            sys.exit("a benchmark process ended before its last step; its own error stands above")
        return None if said == "out of memory" else said

    def close(self) -> None:
        self.process.join()
        if self.process.exitcode not in (0, -signal.SIGKILL):
            sys.exit(f"a benchmark process failed with exit code {self.process.exitcode}")


def _work(system: Callable[[Job, Any], None], job: Job, pipe: Connection, memory_gb: float | None) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    os.chdir(job.folder)
    if memory_gb is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(memory_gb * 1e9),) * 2)
    try:
        system(job, pipe)
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError where malloc fails
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in ("can't allocate memory", "out of memory")):
            raise
        pipe.send("out of memory")


def alternate(jobs: dict[str, Job], memory_gb: float | None) -> tuple[dict[str, list[dict[str, Any]]], list[int]]:
    """Steps of each system in turn (empty where its memory did not suffice); TRL's micro-batch sizes in rows, the last the one that fitted."""
    workers = {name: Worker(SYSTEMS[name], job, memory_gb) for name, job in jobs.items()}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    tried = [jobs["trl"].trl_rows or jobs["trl"].rows] if "trl" in jobs else []
    while workers:
        for name, worker in list(workers.items()):
            if (said := worker.step()) is not None:
                rows[name].append(said)
                if len(rows[name]) < jobs[name].steps:
                    continue
            worker.close()
            del workers[name]
            if said is None:
                rows[name] = []
                if name == "trl" and tried[-1] > 1:
                    tried.append(next(n for n in range(tried[-1] // 2, 0, -1) if jobs[name].rows % n == 0))
                    workers[name] = Worker(theirs, replace(jobs[name], trl_rows=tried[-1]), memory_gb)
    return rows, tried


def check(job: Job, memory_gb: float | None) -> list[str]:
    """Both systems on the same stored completions; what was compared. Exits with the figures where they part."""
    job = replace(job, new_tokens=CHECK_TOKENS, steps=CHECK_STEPS, trl_rewards="callable", folder=job.folder / "check")
    mine = alternate({"ours": job}, memory_gb)[0]["ours"]  # stores what it sampled, TRL replays it
    other = alternate({"trl": replace(job, replay=True)}, memory_gb)[0]["trl"]
    if not mine or not other:
        sys.exit("no check: memory does not suffice for it; --no-check goes on without")
    lines = []
    for step, (a, b) in enumerate(zip(mine, other, strict=True), start=1):
        apart = max(abs(x - y) for x, y in zip(a["advantages"], b["advantages"], strict=True))
        lines.append(
            f"  check, update {step}: advantages differ by {apart:.1e}; loss {a['loss']:.6f} and {b['loss']:.6f}; "
            f"gradient norm {a['grad_norm']:.5f} and {b['grad_norm']:.5f}"
        )
        print(lines[-1], flush=True)
        same_norm = abs(a["grad_norm"] - b["grad_norm"]) <= 0.01 * b["grad_norm"]
        if apart > 2e-3 or abs(a["loss"] - b["loss"]) > 1e-3 or not same_norm or b["grad_norm"] == 0:
            sys.exit("the two systems do not do the same work")
    return lines


def measure(job: Job, warm_up: int, memory_gb: float | None) -> dict[str, Any]:
    """Alternating steps; medians and spread over those after the warm-up. A system that does not fit is {"out_of_memory": True}."""
    rows, tried = alternate({"ours": job, "trl": job}, memory_gb)
    found: dict[str, Any] = {name: figures(job, steps, warm_up) for name, steps in rows.items()}
    found["trl"] |= {"micro_batch_rows": tried[-1], "too_large": tried[:-1]}
    if rows["ours"]:
        parts = rows["ours"][-1]["parts"]
        found["seconds_in"] = {k: statistics.median(s["parts"][k] for s in rows["ours"][warm_up:]) for k in parts}
    if rows["ours"] and rows["trl"]:
        found["ratio"] = {
            k: found["ours"][k] / found["trl"][k] for k in ("step_seconds", "cpu_seconds", "tokens_per_second", "peak_gb")
        }
    return found


def figures(job: Job, steps: list[dict[str, Any]], warm_up: int) -> dict[str, Any]:
    """What one system's steps say."""
    if not steps:
        return {"out_of_memory": True}
    seconds = [s["seconds"] for s in steps[warm_up:]]
    return {
        "step_seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "cpu_seconds": statistics.median(s["cpu_seconds"] for s in steps[warm_up:]),
        "tokens_per_second": job.rows * job.new_tokens / statistics.median(seconds),
        "peak_gb": steps[-1]["peak_gb"],
    }


def cells_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The work of each cell: tuning, prompt_tokens, new_tokens, group_size, objectives, trl_rewards, and its name in the grid."""
    if args.grid:
        chosen = {name: own for name, own in GRID.items() if report.wanted(name, args.cells)}
        return [{"cell": n, **STANDARD, **own, "trl_rewards": r} for n, own in chosen.items() for r in args.trl_rewards]
    axes = (args.tuning, args.prompt_tokens, args.new_tokens, args.group_size, args.objectives, args.trl_rewards)
    return [{"cell": "", **dict(zip([*STANDARD, "trl_rewards"], values, strict=True))} for values in itertools.product(*axes)]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuning", nargs="+", default=["lora", "full"], choices=["lora", "full"])
    parser.add_argument("--prompt-tokens", nargs="+", type=int, default=[40, 256])
    parser.add_argument("--new-tokens", nargs="+", type=int, default=[64])
    parser.add_argument("--group-size", nargs="+", type=int, default=[8])
    parser.add_argument("--objectives", nargs="+", type=int, default=[4], help="heads of the reward model")
    parser.add_argument("--trl-rewards", nargs="+", default=["callable"], choices=["callable", "models"])
    parser.add_argument("--grid", action="store_true", help="the cells that --list shows, instead of the five lists above")
    parser.add_argument("--cells", nargs="+", default=[], help="of the grid: names (G=32), or their beginnings (G, full)")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--prompts", type=int, default=2, help="prompts per step")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--policy", default="embedded:SmolLM2-135M-Instruct")
    parser.add_argument("--backbone", default="embedded:all-MiniLM-L6-v2")
    parser.add_argument("--memory-gb", type=float, help="of each process on a CPU; default: 80%% of the machine's")
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--out", type=Path, help="a folder for grid.json, grid.md and grid.png; finished cells are kept")
    args = parser.parse_args()
    if args.steps <= args.warm_up:
        parser.error("--steps must be more than --warm-up")
    if unknown := [c for c in args.cells if not any(report.wanted(name, [c]) for name in GRID)]:
        parser.error(f"--cells {' '.join(unknown)}: no cell begins so; expected some of {', '.join(GRID)}")
    if args.cells and not args.grid:
        parser.error("--cells chooses among the cells of --grid")
    if min(args.objectives) < 1:
        parser.error("--objectives must be 1 or more")
    return args


def main() -> None:
    args = arguments()
    if args.list:
        print("\n".join(GRID))
        return
    memory_gb = None if torch.cuda.is_available() else args.memory_gb or 0.8 * report.memory_gb()
    kept = report.Kept.open(args.out and args.out / "grid.json")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number, cell in enumerate(cells_of(args)):
            work = {k: v for k, v in cell.items() if k != "cell"}
            work |= {"policy": args.policy, "prompts": args.prompts, "steps": args.steps}
            settings = work | {"warm_up": args.warm_up, "backbone": args.backbone, "memory_gb": memory_gb}
            if (found := kept.find(settings)) is None:
                store = root / f"store-{work['objectives']}"
                if not store.exists():
                    publish_reward_model(store, args.backbone, work["objectives"])
                job = Job(folder=root / str(number), store=store, ours=OURS[work["tuning"]], **work)
                checked = [] if args.no_check else check(job, memory_gb)
                found = settings | {"check": checked} | measure(job, args.warm_up, memory_gb)
                kept.add(found)
            report.show(found)
    if args.out:
        (args.out / "grid.md").write_text(f"Machine: {kept.machine}.\n\n{report.table(kept.cells)}")
        report.figure(kept.cells, args.out / "grid.png")


if __name__ == "__main__":
    main()
