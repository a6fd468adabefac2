"""Time and peak memory of our step as G, prompt length, completion length and K grow, beside what theory says.

    HF_HUB_OFFLINE=1 python scripts/measure_growth.py growth --figure docs/figures/growth.png --page docs/growth_measured.md

Each point is a process of its own: grpo_safe.stages.train_policy.run, LoRA, one axis away from the standard step (2 prompts of 40 tokens, G = 8,
64 new tokens, K = 4), one step of warm-up and two timed. OUT/growth.json takes each point as it ends; points that it has are kept.

Theory counts as the package does. Time: multiplications and memory traffic of each phase (runtime/profile.py), each phase at the share of the
machine's measured peak that it has in the standard step. Memory: models/memory.py, with the tokens of the largest micro-batch, and one
constant (the libraries, the packed copy of the weights) that makes it meet the standard point. No constant is fitted to an axis: how a line
climbs is theory alone.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmark import STANDARD, alternate
from benchmark_report import AXES, Kept
from benchmark_systems import Job, publish_reward_model
from measure_packing import batch_of

from grpo_safe import models
from grpo_safe.forward import PackedForward
from grpo_safe.models import memory
from grpo_safe.records import Rollout
from grpo_safe.runtime import profile

POINTS = {
    "prompt_tokens": [40, 128, 256, 512, 1024],
    "new_tokens": [16, 32, 64, 128, 256],
    "group_size": [2, 4, 8, 16, 32],
    "objectives": [1, 4, 16],
}
PROMPTS, BUDGET, SAMPLING_ROWS = 2, 4096, 128  # per step; train.micro_batch_tokens and sampling.batch_size as conf/ has them
SCORED = 512  # tokens at most that the reward model reads of a row


def measured(work: dict[str, Any], root: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Medians over the timed steps of a fresh process."""
    store = root / f"store-{work['objectives']}"
    if not store.exists():
        publish_reward_model(store, args.backbone, work["objectives"])
    folder = Path(tempfile.mkdtemp(dir=root))
    job = Job(folder / "job", store, args.policy, prompts=PROMPTS, steps=args.steps, trl_rewards="callable", **work)
    steps = alternate({"ours": job}, None)[0]["ours"]
    if not steps:
        sys.exit(f"{work}: no memory was left for it")
    timed = steps[args.warm_up :]
    parts = {phase: statistics.median(s["parts"].get(phase, 0.0) for s in timed) for phase in profile.PHASES}
    seconds = [s["seconds"] for s in timed]
    return {
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "parts": parts,
        "peak_gb": steps[-1]["peak_gb"],
    }


class Theory:
    """What a step of a shape must do, on this machine."""

    def __init__(self, policy: str, backbone: str, machine: profile.Machine) -> None:
        from transformers import AutoConfig

        found = [
            AutoConfig.from_pretrained(models.resolve_start(name, None, False, "a start").location) for name in (policy, backbone)
        ]
        self.shape, judge = memory.shape_of(found[0]), found[1]
        width, inner = judge.hidden_size, judge.intermediate_size
        self.judge_weights = judge.num_hidden_layers * (4 * width**2 + 2 * width * inner)
        self.judge_gb = 4 * (self.judge_weights + judge.vocab_size * width) / 1e9
        self.machine = machine

    def seconds(self, work: dict[str, Any]) -> dict[str, float]:
        """Each phase at the machine's peak."""
        rows, prompt, new = PROMPTS * work["group_size"], work["prompt_tokens"], work["new_tokens"]
        ones = torch.ones(rows, prompt, dtype=torch.long), torch.ones(rows, new, dtype=torch.long)
        rollout = Rollout([], ones[0], ones[0], ones[1], ones[1], torch.zeros(rows, new), torch.zeros(rows).bool(), [])
        return profile.floors(
            self.shape, rollout, work["group_size"], self.machine, 4, True, True, 1, self.judge_weights,
            rows * min(SCORED, prompt + new), SAMPLING_ROWS,
        )  # fmt: skip

    def peak_gb(self, work: dict[str, Any]) -> float:
        """What the step holds, all that grows with its shape, and the weights."""
        batch = batch_of(self.shape.vocab, PROMPTS, work["group_size"], work["prompt_tokens"], work["new_tokens"])
        tokens = max(
            len({int(i) // work["group_size"] for i in rows}) * work["prompt_tokens"] + len(rows) * work["new_tokens"]
            for rows in PackedForward.micro_batches(batch, range(len(batch)), BUDGET)
        )
        found = memory.policy_memory(
            self.shape, lora_rank=16, strategy="single", processes=1, weight_bytes=4, gradient_checkpointing=False,
            micro_batch_tokens=tokens, rows_at_once=min(SAMPLING_ROWS, len(batch)), prompt_tokens=work["prompt_tokens"],
            new_tokens=work["new_tokens"], kl=True, reward_model_gb=self.judge_gb, packed=True,
        )  # fmt: skip
        return found.peak - found.overhead


def with_theory(points: list[dict[str, Any]], theory: Theory) -> list[dict[str, Any]]:
    """Each point with theory_parts, theory_seconds and theory_gb, which meet the standard point."""
    base = next(p for p in points if all(p[k] == v for k, v in STANDARD.items()))
    floor, held = theory.seconds(base), theory.peak_gb(base)
    rest = base["seconds"] - sum(base["parts"].values())
    found = []
    for p in points:
        own = theory.seconds(p)
        parts = {phase: base["parts"][phase] * own[phase] / floor[phase] for phase in profile.PHASES}
        gb = base["peak_gb"] - held + theory.peak_gb(p)
        found.append(p | {"theory_parts": parts, "theory_seconds": rest + sum(parts.values()), "theory_gb": gb})
    return found


def along(points: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """The points that differ from the standard one along `axis` only, in order."""
    own = [p for p in points if all(p[k] == v for k, v in STANDARD.items() if k != axis)]
    return sorted(own, key=lambda p: p[axis])


def table(points: list[dict[str, Any]]) -> str:
    """Markdown: a row a point, measured and by theory."""
    rows = [
        "| axis | at | seconds a step (spread) | theory | sampling | theory | reference | theory | update | theory | peak GB | theory |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for label, axis in AXES.items():
        for p in along(points, axis):
            low, high = p["spread"]
            cells = [label, str(p[axis]), f"{p['seconds']:.2f} ({low:.2f}-{high:.2f})", f"{p['theory_seconds']:.2f}"]
            cells += [
                f"{p[kind][phase]:.2f}" for phase in ("sampling", "reference", "update") for kind in ("parts", "theory_parts")
            ]
            rows.append("| " + " | ".join([*cells, f"{p['peak_gb']:.2f}", f"{p['theory_gb']:.2f}"]) + " |")
    return "\n".join(rows) + "\n"


def page(points: list[dict[str, Any]], machine: str, drawing: Path, where: Path) -> str:
    """The table and the figure as a page that stands alone."""
    p = points[0]
    return (
        f"# Growth, measured\n\nMachine: {machine}. Written, with its figure, by\n\n    HF_HUB_OFFLINE=1 python scripts/measure_growth.py "
        f"{shlex.join(sys.argv[1:])}\n\nOne step of `train_policy.run`, LoRA of rank 16 on {p['policy']}, float32: "
        f"{PROMPTS} prompts of {STANDARD['prompt_tokens']} tokens, G = {STANDARD['group_size']}, {STANDARD['new_tokens']} new tokens, "
        f"K = {STANDARD['objectives']}, and one of these varied at a time. Each point is a process of its own: median of {p['steps'] - p['warm_up']} after "
        f"{p['warm_up']} of warm-up. Theory is fixed at the standard point alone (each phase's share of the machine's measured peak, and one "
        "constant of memory); how it climbs is counted: multiplications and memory traffic as `train.profile` counts them, memory as "
        f"`models/memory.py` does.\n\n![Dots measured, lines theory]({os.path.relpath(drawing, where.parent)})\n\n{table(points)}"
    )


def figure(points: list[dict[str, Any]], path: Path) -> None:
    """A column an axis: seconds above, memory below; dots measured, lines theory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    varied = {label: axis for label, axis in AXES.items() if len(along(points, axis)) > 1} or AXES
    drawn, panels = plt.subplots(2, len(varied), figsize=(3.5 * len(varied), 6), sharex="col", squeeze=False)
    for column, (label, axis) in zip(panels.T, varied.items(), strict=True):
        own = along(points, axis)
        at = [p[axis] for p in own]
        for name, color in (("step", "black"), ("sampling", "tab:blue"), ("update", "tab:orange"), ("reference", "tab:green")):
            seen = [p["seconds"] if name == "step" else p["parts"][name] for p in own]
            said = [p["theory_seconds"] if name == "step" else p["theory_parts"][name] for p in own]
            column[0].plot(at, seen, "o", color=color, label=name)
            column[0].plot(at, said, "-", color=color, alpha=0.6)
        column[1].plot(at, [p["peak_gb"] for p in own], "o", color="black", label="measured")
        column[1].plot(at, [p["theory_gb"] for p in own], "-", color="black", alpha=0.6, label="theory")
        column[1].set_xlabel(label)
        for panel in column:
            panel.set_ylim(0, 1.1 * panel.get_ylim()[1])
            panel.grid(alpha=0.3)
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("peak GB")
    panels[0, 0].legend(fontsize=8, title="dots measured, lines theory", title_fontsize=8)
    panels[1, 0].legend(fontsize=8)
    drawn.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130)
    plt.close(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for growth.json, growth.md and growth.png")
    parser.add_argument("--axes", nargs="+", default=list(POINTS), choices=POINTS)
    parser.add_argument("--at-most", type=int, default=10**9, help="leave out points beyond this (of every axis)")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--warm-up", type=int, default=1)
    parser.add_argument("--policy", default="embedded:SmolLM2-135M-Instruct")
    parser.add_argument("--backbone", default="embedded:all-MiniLM-L6-v2")
    parser.add_argument("--figure", type=Path, help="the figure here instead of OUT/growth.png")
    parser.add_argument("--page", type=Path, help="the page here instead of OUT/growth.md")
    args = parser.parse_args()
    if args.steps <= args.warm_up:
        parser.error("--steps must be more than --warm-up")
    if "OMP_NUM_THREADS" not in os.environ:  # as the stage itself does, so that the rates below are of the same threads
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    kept = Kept.open(args.out / "growth.json")
    works = [STANDARD] + [STANDARD | {a: n} for a in args.axes for n in POINTS[a] if n <= args.at_most and n != STANDARD[a]]
    points = []
    with tempfile.TemporaryDirectory() as folder:
        for work in works:
            settings = work | {"policy": args.policy, "backbone": args.backbone, "steps": args.steps, "warm_up": args.warm_up}
            if (found := kept.find(settings)) is None:
                found = settings | measured(work, Path(folder), args)
                kept.add(found)
            points.append(found)
            print(
                f"prompt {work['prompt_tokens']}, new {work['new_tokens']}, G={work['group_size']}, K={work['objectives']}: "
                f"{found['seconds']:.2f} s, {found['peak_gb']:.2f} GB",
                flush=True,
            )
    machine = profile.measure(torch.device("cpu"), torch.float32)
    points = with_theory(points, Theory(args.policy, args.backbone, machine))
    print(table(points))
    where, drawing = args.page or args.out / "growth.md", args.figure or args.out / "growth.png"
    where.parent.mkdir(parents=True, exist_ok=True)
    where.write_text(page(points, kept.machine, drawing, where))
    figure(points, drawing)


if __name__ == "__main__":
    main()
