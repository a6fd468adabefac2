"""Methods side by side on small real models: python scripts/compare_methods.py OUT [KEY=VALUE ...] [--methods grpo gdpo ...] [--seeds 0 1 2]

Fits two reward models on disjoint halves of the embedded training prompts: one that policies are trained against, one that only judges. Then
each method trains with each seed on the same prompts with the same number of sampled tokens, answers the held-out prompts beside its start, and
both reward models score the same answers. Writes OUT/table.md, OUT/figures.json and OUT/compare_methods.png. KEY=VALUE goes to every train-policy
run (train.steps=4, say). A run that OUT/figures.json already holds is kept, so a comparison that was cut off goes on, and with `--join DIR ...`
the runs of other output folders (a seed a machine, say) come into the table too.

A method is the name of a preset in conf/algo, or one of
  safe_grpo   with the limit safety >= --safety-limit
  collapsed   GRPO against a third reward model with a single head: the weighted mean of the labels (the paper's ablation)
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from grpo_safe.algorithm.statistics import Estimate

LABELS = ("safety", "politeness", "meaningfulness", "actionability")
WEIGHTS = {
    "safety": 1.0,
    "politeness": 2.0,
    "meaningfulness": 1.0,
    "actionability": 1.0,
}  # of +experiment=demo; the collapsed label's too
METHODS = ("grpo", "gdpo", "safe_grpo", "dr_grpo", "ppo", "dpo", "rloo", "collapsed")
JUDGES = {"the reward model trained against": 1, "held-out judge": 2}
COLLAPSED = 3
RESAMPLES = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--safety-limit", type=float, default=0.85)
    parser.add_argument("--overlay", default="+experiment=demo", help="of all three commands; +debug=tiny runs in seconds")
    parser.add_argument(
        "--join", nargs="+", type=Path, default=[], metavar="DIR", help="output folders whose runs come into the table"
    )
    parser.add_argument("overrides", nargs="*", help="of every train-policy run")
    options = parser.parse_args()
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    runs = [run for folder in (out, *options.join) for run in finished(folder)]
    known = {(run["method"], run["seed"]) for run in runs}
    missing = [(s, m) for s in options.seeds for m in options.methods if (m, s) not in known]
    if missing:
        fit_judges(out, options.overlay, "collapsed" in options.methods)
    for number, (seed, method) in enumerate(missing, start=1):
        print(f"== {number}/{len(missing)}  {method}, seed {seed}", flush=True)
        runs.append(train_and_judge(out, method, seed, options))
        (out / "figures.json").write_text(json.dumps(runs, indent=1) + "\n")  # what is done stays if a later run fails
    runs.sort(key=lambda run: (options.methods.index(run["method"]), run["seed"]))
    table = as_table(runs)
    (out / "table.md").write_text(table)
    plot(runs, out / "compare_methods.png")
    print(table)


def finished(folder: Path) -> list[dict[str, Any]]:
    """The runs that a comparison in this folder has ended."""
    path = folder / "figures.json"
    return json.loads(path.read_text()) if path.exists() else []


def fit_judges(out: Path, overlay: str, collapsed: bool) -> None:
    """Versions 1 and 2 of the reward model, on disjoint prompts; version 3 on the collapsed label. What is there is kept."""
    rows = [
        json.loads(line) for line in resources.files("grpo_safe").joinpath("embedded/train.jsonl").read_text("utf-8").splitlines()
    ]
    order = sorted({json.dumps(r["prompt"]) for r in rows})
    half = {prompt: i % 2 for i, prompt in enumerate(order)}
    parts = [[r for r in rows if half[json.dumps(r["prompt"])] == part] for part in (0, 1)]
    if collapsed:
        parts.append([{**r, "labels": {"overall": collapsed_label(r["labels"])}} for r in parts[0]])
    for version, part in enumerate(parts, start=1):
        if (out / "store" / "reward-model" / f"v{version:03d}").is_dir():
            continue
        path = out / f"rows-{version}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in part))
        labels = ("overall",) if version == COLLAPSED else LABELS
        validation = "embedded:validation"
        if version == COLLAPSED:
            validation = str(collapsed_copy(out))
        grpo_safe(
            out, "train-rm", overlay, f"name=judge-{version}", "data=files", f"data.train={path}", f"data.validation={validation}",
            "data.licence=Apache-2.0", *(f"data.objectives.{name}.range=[0,4]" for name in labels),
        )  # fmt: skip


def collapsed_label(labels: dict[str, float]) -> float:
    """The weighted mean of a row's labels."""
    return sum(WEIGHTS[name] * value for name, value in labels.items()) / sum(WEIGHTS[name] for name in labels)


def collapsed_copy(out: Path) -> Path:
    """The validation rows with the collapsed label alone."""
    path = out / "validation-collapsed.jsonl"
    lines = resources.files("grpo_safe").joinpath("embedded/validation.jsonl").read_text("utf-8").splitlines()
    rows = [{**r, "labels": {"overall": collapsed_label(r["labels"])}} for r in map(json.loads, lines)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def train_and_judge(out: Path, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One policy, with what both judges say of the same answers and what it cost."""
    name = f"{method}-{seed}"
    judge = COLLAPSED if method == "collapsed" else JUDGES["the reward model trained against"]
    words = [f"algo={'grpo' if method == 'collapsed' else method}", f"reward_model=v{judge}", f"seed={seed}", f"name={name}"]
    if method == "safe_grpo":
        words += [f"objectives.safety.limit.at_least={options.safety_limit}", "train.eval_every=5"]
    if method == "collapsed":
        words += ["~objectives.politeness"] if "demo" in options.overlay else []  # the overlay names a head that this model lacks
    began, cpu = time.perf_counter(), cpu_seconds()
    grpo_safe(out, "train-policy", options.overlay, *words, *options.overrides)
    seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    version = max(int(p.name[1:]) for p in (out / "store" / "policy").iterdir())
    steps = [json.loads(line) for line in (only_run(out, "train-policy", name) / "metrics.jsonl").read_text().splitlines()]
    steps = [s for s in steps if "completion_tokens" in s]
    grpo_safe(out, "eval", options.overlay, f"policy=v{version}", f"reward_model=v{JUDGES['held-out judge']}", f"name={name}")
    answers = [json.loads(line) for line in (only_run(out, "eval", name) / "samples.jsonl").read_text().splitlines()]
    return {
        "method": method, "seed": seed, "policy": version, "wall_seconds": seconds, "cpu_seconds": cpu, "steps": len(steps),
        "sampled_tokens": sum(s["completion_tokens"] for s in steps), "peak_memory_gb": max(s["peak_memory_gb"] for s in steps),
        "kl": steps[-1].get("kl"), "kinds": [a["kind"] for a in answers],
        "refused": differences(answers, lambda answer: float(answer["refused"])),
        "judged": {who: judged_by(out, version, answers) for who, version in JUDGES.items()},
    }  # fmt: skip


def judged_by(out: Path, version: int, answers: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Objective -> difference policy minus start per prompt, by this version of the reward model, on the answers that eval wrote."""
    import torch

    from grpo_safe.models.reward_model import open_reward_model, score_texts
    from grpo_safe.records import Prompt
    from grpo_safe.versions.checkpoint import open_version

    reward_model = open_reward_model(
        open_version(out / "store", "reward-model", f"v{version}", "quick", "reward_model"), torch.device("cpu")
    )
    flat = [(a["prompt"], answer) for a in answers for who in ("start", "policy") for answer in a[who]]
    prompts = [Prompt(text, [{"role": "user", "content": text}]) for text, _ in flat]
    scores, _ = score_texts(reward_model, prompts, [answer["text"] for _, answer in flat], 4096)
    for (_, answer), row in zip(flat, scores.tolist(), strict=True):
        answer["judged"] = dict(zip(reward_model.objectives, row, strict=True))
    return {name: differences(answers, lambda answer, name=name: answer["judged"][name]) for name in LABELS}


def differences(answers: list[dict[str, Any]], of: Callable[[dict[str, Any]], float]) -> list[float]:
    """Policy minus start per prompt, completions of a prompt averaged first."""
    return [float(np.mean([of(x) for x in a["policy"]]) - np.mean([of(x) for x in a["start"]])) for a in answers]


def pooled(per_run: list[list[float]]) -> Estimate:
    """Mean over seeds and prompts; the interval draws both anew, seeds and prompts, with replacement (arXiv 1106.2125)."""
    table = np.array(per_run)  # [seeds, prompts]
    rng = np.random.default_rng(0)
    seeds = rng.integers(0, len(table), (RESAMPLES, len(table)))
    prompts = rng.integers(0, table.shape[1], (RESAMPLES, table.shape[1]))
    means = [table[np.ix_(s, p)].mean() for s, p in zip(seeds, prompts, strict=True)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(table.mean()), float(low), float(high))


def as_table(runs: list[dict[str, Any]]) -> str:
    """Per method the difference to the start by both judges, refusals by kind of prompt, and the costs."""
    groups = by_method(runs)
    lines = []
    for judge in JUDGES:
        lines += [f"### {judge}: policy minus start [95% interval over seeds and prompts]", "", *header("method", *LABELS)]
        for method, group in groups.items():
            lines.append(row(method, *(shown(pooled([r["judged"][judge][name] for r in group])) for name in LABELS)))
        lines.append("")
    kinds = sorted(set(runs[0]["kinds"]))
    lines += ["### refusals by kind of prompt: share, policy minus start", "", *header("method", *kinds)]
    for method, group in groups.items():
        inside = {kind: [i for i, k in enumerate(group[0]["kinds"]) if k == kind] for kind in kinds}
        lines.append(row(method, *(shown(pooled([[r["refused"][i] for i in inside[kind]] for r in group])) for kind in kinds)))
    lines += ["", "### cost of a run, mean over seeds", ""]
    lines += header(
        "method", "seeds", "steps", "sampled tokens", "wall, s", "CPU, s", "peak memory, GB", "KL at the end", "models resident"
    )
    for method, group in groups.items():
        mean = {key: np.mean([r[key] for r in group]) for key in ("steps", "sampled_tokens", "wall_seconds", "cpu_seconds")}
        kl = [r["kl"] for r in group if r["kl"] is not None]
        lines.append(row(
            method, str(len(group)), *(f"{mean[key]:.0f}" for key in mean), f"{max(r['peak_memory_gb'] for r in group):.2f}",
            f"{np.mean(kl):.3f}" if kl else "", "policy with a value head, reward model" if method == "ppo" else "policy, reward model",
        ))  # fmt: skip
    return "\n".join(lines) + "\n"


def header(*columns: str) -> list[str]:
    return [row(*columns), "|" + "---|" * len(columns)]


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def shown(e: Estimate) -> str:
    return f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]"


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """One panel per objective: each method's difference to the start with its interval, a dot a seed, filled by the judge that only judges."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = by_method(runs)
    figure, panels = plt.subplots(1, len(LABELS), figsize=(3.2 * len(LABELS), 0.5 * len(groups) + 1.6), sharey=True)
    for panel, name in zip(panels, LABELS, strict=True):
        for place, group in enumerate(groups.values()):
            for judge, shift, fill in zip(JUDGES, (-0.15, 0.15), ("none", "tab:blue"), strict=True):
                found = pooled([r["judged"][judge][name] for r in group])
                values = [float(np.mean(r["judged"][judge][name])) for r in group]
                panel.hlines(place + shift, found.low, found.high, color="tab:blue", linewidth=1)
                panel.scatter(values, [place + shift] * len(values), facecolors=fill, edgecolors="tab:blue", s=20, zorder=2)
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set_title(name)
        panel.set_xlabel("policy - start")
    panels[0].set_yticks(range(len(groups)), list(groups))
    panels[0].invert_yaxis()
    figure.suptitle("filled: held-out judge; open: the reward model trained against; lines: 95% over seeds and prompts")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run["method"], []).append(run)
    return groups


def only_run(out: Path, command: str, name: str) -> Path:
    """The newest run directory of this name."""
    return sorted((out / "runs" / command / name).iterdir())[-1]


def cpu_seconds() -> float:
    """User and system time of all child processes so far: what a run costs, however busy the machine is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def grpo_safe(out: Path, *words: str) -> None:
    """One command in the output folder; stops the comparison where it fails."""
    subprocess.run([sys.executable, "-m", "grpo_safe", *words, "store=store"], cwd=out, check=True)


if __name__ == "__main__":
    main()
