"""A toy with a known answer: what each aggregation and each limit ends at. python scripts/toy_pareto.py [--figures docs/figures]

The policy is a softmax over a handful of completions with K scores each. It is trained by the package's own functions: the slots of a preset
(conf/algo), `compare`, and the preset's loss. Nothing is drawn at random. A group of many completions holds each completion in proportion to its
probability (at least once), `old_logps` are the shares that it really has, and so the loss's ratio makes the gradient the exact expected one.
A step is a natural-gradient step (the gradient over the probabilities), which does not fade as the policy grows sure.

Prints what each run ends at beside what theory says, and draws toy_front.png and toy_limits.png (about two minutes on one core).
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq, minimize
from scipy.stats import t as student

from grpo_safe.algorithm.comparison import StepScores, compare
from grpo_safe.algorithm.constraints import limit_bound
from grpo_safe.algorithm.losses import KL_ESTIMATORS, Denominators
from grpo_safe.algorithm.penalties import kl_penalty
from grpo_safe.cli import conf_dir
from grpo_safe.config import AlgoConfig, LimitConfig
from grpo_safe.records import PolicyOutputs, TrainBatch
from grpo_safe.rewards import Objectives
from grpo_safe.stages.train_policy.method import Method, build_method

GROUP = 600  # completions of an enumerated group
UNCLIPPED = 1e9  # algo.clip_eps: the ratio is an importance weight here, not a step
NAMES = ["helpfulness", "safety", "brevity"]

# One prompt, seven completions, two scores: helpfulness, safety. Three corners of the hull, three of the front that lie inside it, one beaten.
FRONT = torch.tensor([[0.95, 0.10], [0.80, 0.55], [0.10, 0.95], [0.88, 0.20], [0.45, 0.65], [0.25, 0.78], [0.40, 0.40]]).double()
CORNERS, DENTS, BEATEN = [0, 1, 2], [3, 4, 5], [6]

# The same with a third score, for several limits at once.
THREE = torch.tensor(
    [[0.95, 0.10, 0.50], [0.80, 0.55, 0.20], [0.10, 0.95, 0.60], [0.60, 0.30, 0.90], [0.45, 0.65, 0.40], [0.05, 0.20, 1.00]]
).double()


# --- the toy ------------------------------------------------------------------------------------------------------------------------------


@cache
def preset_numbers(preset: str) -> dict[str, Any]:
    """conf/algo/PRESET.yaml as a run composes it."""
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        composed = compose(config_name="train_policy", overrides=[f"algo={preset}"])
    return OmegaConf.to_container(composed.algo, resolve=True)  # type: ignore[return-value]


def method_of(preset: str, k: int = 2, limits: dict[str, LimitConfig] | None = None, **changes: Any) -> Method:
    """A preset of conf/algo with some keys changed; no KL term and a huge group unless `changes` says otherwise."""
    algo = OmegaConf.create(preset_numbers(preset))
    for key, value in {"kl_coef": 0.0, "group_size": GROUP, "clip_eps": UNCLIPPED, **changes}.items():
        OmegaConf.update(algo, key, value, force_add=True)
    typed = AlgoConfig(**OmegaConf.to_container(algo))  # type: ignore[arg-type]
    objectives = Objectives(NAMES[:k], [1.0] * k, list(range(k)), [None] * k, limits=limits or {})
    return build_method(typed, objectives, {}, max_tokens=1)


def lagrangian(rate: float = 0.3, **numbers: Any) -> dict[str, Any]:
    """The constraint slot with the plain Lagrangian: no division by a spread, the costs of one step, no cap in reach."""
    return {"name": "lagrangian", "rate": rate, "maximum": 1e3, "window": GROUP, "normalize": False} | numbers


@dataclass
class Run:
    """A trained toy, and how it got there."""

    probabilities: torch.Tensor  # [P, M]
    scores: torch.Tensor  # [P, M, K]
    means: list[list[float]] = field(default_factory=list)  # per step, the exact mean score per objective
    multipliers: list[list[float]] = field(default_factory=list)  # per step
    reports: list[Any] = field(default_factory=list)  # the limits' reports of the last step
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> int:
        """The completion that a policy of one prompt has settled on."""
        return int(self.probabilities[0].argmax())

    def late(self, share: float = 0.5) -> list[float]:
        """Mean score per objective over the last share of the steps."""
        return np.mean(self.means[-max(1, int(len(self.means) * share)) :], axis=0).tolist()


def train(
    method: Method, scores: torch.Tensor, weights: list[float], steps: int, lr: float, start: torch.Tensor | None = None,
    entropy: bool = False, kl_coef: float = 0.0, draw: torch.Generator | None = None, sure: float = 0.999,
) -> Run:  # fmt: skip
    """Exact training of a tabular policy on P prompts. scores [M, K] or [P, M, K], start [P, M] log-probs (default: uniform).

    entropy: hand the loss the policy's entropy (its coefficient is the method's). kl_coef: of k1 against the start, in the reward.
    draw: sample groups at random instead, with plain gradient steps. sure: stop when every prompt has a completion so likely.
    """
    scores = scores if scores.dim() == 3 else scores[None]
    logits = (torch.zeros(scores.shape[:2]) if start is None else start).double().clone()
    reference, state, w = logits.log_softmax(-1), {}, torch.tensor(weights)
    run = Run(logits.softmax(-1), scores)
    for _ in range(steps):
        theta = logits.clone().requires_grad_()
        log_p = theta.log_softmax(-1)
        rows, shares = _group(log_p.detach().exp(), method.slots.group_size, draw)
        logps = log_p.gather(1, rows).reshape(-1, 1)
        old = None if draw is not None else shares.log().gather(1, rows).reshape(-1, 1)
        one = torch.ones_like(logps)
        extra = -kl_coef * kl_penalty(logps.detach(), reference.gather(1, rows).reshape(-1, 1), one, KL_ESTIMATORS["k1"])
        values = scores.gather(1, rows[..., None].expand(-1, -1, scores.shape[2])).reshape(len(logps), -1)
        step = StepScores(values, torch.ones_like(values, dtype=torch.bool), extra, torch.zeros(len(logps)))
        compared = compare(method.order, method.slots, step, w, state)
        state = compared.state
        all_entropy = -(log_p.exp() * log_p).sum(-1, keepdim=True).expand_as(rows).reshape(-1, 1)
        batch = _batch(compared.groups.advantages, one, old)
        loss, _ = method.loss.function(PolicyOutputs(logps, all_entropy if entropy else None), batch, _counts(len(logps)))
        loss.backward()
        gradient = theta.grad * len(scores)  # the loss is a mean over prompts, each of which has parameters of its own
        logits = logits - lr * (gradient if draw is not None else gradient / log_p.detach().exp().clamp(min=1e-12))
        run.probabilities = logits.softmax(-1)
        run.means.append((run.probabilities[..., None] * scores).sum(1).mean(0).tolist())
        run.multipliers.append([r.multiplier for r in compared.limits])
        run.reports = compared.limits
        if float(run.probabilities.amax(-1).min()) > sure:
            break
    run.state = state
    return run


def _group(p: torch.Tensor, size: int, draw: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Completions of each prompt's group [P, G], and the share of each completion in it [P, M]."""
    if draw is not None:
        return torch.multinomial(p, size, replacement=True, generator=draw), p
    whole = (p * (size - p.shape[1])).floor() + 1  # each at least once
    rest = (p * (size - p.shape[1])) % 1
    for row, counts in enumerate(whole):  # the largest remainders fill the group
        counts[rest[row].topk(size - int(counts.sum())).indices] += 1
    mixed = torch.randperm(
        size, generator=torch.Generator().manual_seed(0)
    )  # a window of recent costs must not see a sorted group
    rows = torch.stack([torch.arange(p.shape[1]).repeat_interleave(counts.long())[mixed] for counts in whole])
    return rows, whole / size


def _batch(advantages: torch.Tensor, one: torch.Tensor, old: torch.Tensor | None) -> TrainBatch:
    ids = torch.zeros_like(one, dtype=torch.long)
    return TrainBatch(ids, ids, ids, one, torch.ones(len(one)), one, advantages, old)


def _counts(n: int) -> Denominators:
    return Denominators(float(n), float(n))


# --- what theory says ---------------------------------------------------------------------------------------------------------------------


def tilted(reward: np.ndarray, costs: np.ndarray, multipliers: np.ndarray, temperature: float, ref: np.ndarray) -> np.ndarray:
    """The policy that maximizes E[reward + sum lambda score] - temperature KL(policy || ref): ref exp(. / temperature), normalized."""
    z = np.log(ref) + (reward + costs @ multipliers) / temperature
    z = np.exp(z - z.max())
    return z / z.sum()


def analytic(
    scores: torch.Tensor,
    reward: list[float],
    limits: dict[int, float],
    beta: float,
    inside: bool,
    ref: torch.Tensor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers and policy at which all limits hold, each either exactly or with multiplier 0.

    inside: the KL term stands in the reward, so /(1 + sum lambda) divides it too and the temperature is beta; else it is an entropy bonus beside
    the advantage, and the temperature is beta (1 + sum lambda).
    """
    s = scores.numpy()
    gains, columns = s @ np.array(reward), s[:, list(limits)] - np.array(list(limits.values()))
    base = np.full(len(s), 1 / len(s)) if ref is None else ref.numpy()

    def multipliers(temperature: float) -> np.ndarray:
        def dual(x: np.ndarray) -> tuple[float, np.ndarray]:
            z = np.log(base) + (gains + columns @ x) / temperature
            return float(temperature * np.logaddexp.reduce(z)), columns.T @ tilted(gains, columns, x, temperature, base)

        bounds = [(0.0, 1e3)] * len(limits)
        return minimize(
            dual, np.ones(len(limits)), jac=True, bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10}
        ).x

    temperature = beta
    if not inside:
        temperature = beta * (1 + brentq(lambda total: multipliers(beta * (1 + total)).sum() - total, 0.0, 50.0, xtol=1e-10))
    found = multipliers(temperature)
    return found, tilted(gains, columns, found, temperature, base)


def rewards_by_formula(name: str, scores: torch.Tensor, w: list[float], **numbers: float) -> np.ndarray:
    """Reward of each completion, written from the formulas once more, for weights that sum to 1."""
    s, w_ = scores.numpy(), np.array(w) / np.sum(w)
    gaps = w_ * (numbers.get("ideal", 1.0) - s)
    return {
        "linear": lambda: s @ w_,
        "chebyshev": lambda: -gaps.max(1) - numbers.get("rho", 0.01) * gaps.sum(1),
        "smooth_chebyshev": lambda: -numbers.get("mu", 0.1) * np.log(np.exp(gaps / numbers.get("mu", 0.1)).sum(1)),
        "soft_min": lambda: -np.log((w_ * np.exp(-numbers["sharpness"] * s)).sum(1)) / numbers["sharpness"],
        "geometric": lambda: np.prod(np.maximum(s, 0.01) ** w_, 1),
        "gated": lambda: np.where(s[:, 1] >= numbers["at_least"], s[:, 0] + 1.0, s[:, 1]),
    }[name]()


def max_min_policy(scores: torch.Tensor, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """The policy that maximizes min_k E[s_k] + beta H, and the objectives' weights at the saddle point."""
    s = scores.numpy()

    def dual(x: np.ndarray) -> float:
        return float(beta * np.logaddexp.reduce(s @ (np.exp(x) / np.exp(x).sum()) / beta))

    x = minimize(dual, np.zeros(s.shape[1]), method="BFGS", options={"gtol": 1e-9}).x
    weights = np.exp(x) / np.exp(x).sum()
    return tilted(s @ weights, np.zeros((len(s), 0)), np.zeros(0), beta, np.full(len(s), 1 / len(s))), weights


def pessimistic_policy(scores: torch.Tensor, at_least: float, kappa: float, beta: float) -> tuple[float, np.ndarray]:
    """HC-RLHF's multiplier and policy for one limit on the second score, reward = the first: mean cost + kappa std = 0."""
    gains, costs = scores[:, 0].numpy(), at_least - scores[:, 1].numpy()
    base = np.full(len(gains), 1 / len(gains))

    def solved(multiplier: float) -> tuple[np.ndarray, float]:
        mean, std, p = 0.0, 0.2, base
        for _ in range(500):
            bent = costs + kappa * (costs - mean) ** 2 / (2 * std)
            p = tilted(gains, -bent[:, None], np.array([multiplier]), beta, base)
            now = p @ costs
            mean, std = (mean + now) / 2, (std + (p @ (costs - now) ** 2) ** 0.5) / 2
        return p, mean + kappa * std

    multiplier = brentq(lambda x: solved(x)[1], 0.1, 20.0)
    return multiplier, solved(multiplier)[0]


def chebyshev_weights(point: torch.Tensor) -> list[float]:
    """Weights at which a point of the front is the nearest to the ideal point 1: all its gaps weigh the same."""
    return (1 / (1 - point)).tolist()


# --- limits -------------------------------------------------------------------------------------------------------------------------------

# Two harmful prompts, on which every way to comply breaks the limit alike and only the last completion holds it, and two benign ones.
HARMFUL = [[0.90, 0.10], [0.85, 0.10], [0.80, 0.10], [0.70, 0.10], [0.40, 0.95]]
BENIGN = [[0.90, 0.95], [0.70, 0.95], [0.60, 0.95], [0.50, 0.95], [0.30, 0.95]]
PROMPTS = torch.tensor([HARMFUL, HARMFUL, BENIGN, BENIGN]).double()


def unsafe_start(refusing: float) -> torch.Tensor:
    """Log-probs [4, 5] of a policy that refuses a harmful prompt with probability `refusing`."""
    harmful = [(1 - refusing) / 4] * 4 + [refusing]
    return torch.tensor([harmful, harmful, [0.2] * 5, [0.2] * 5]).double().log()


def from_unsafe(
    baseline: str, refusing: float, steps: int, lr: float, draw: torch.Generator | None = None, normalize: bool = False
) -> Run:  # fmt: skip
    """Start where every completion breaks the limit (safety at least .8 on average), by exact steps or by groups of 8 drawn at random."""
    drawn = draw is not None
    size = 8 if drawn else 200
    slot = lagrangian(0.1 if drawn else 0.3, baseline=baseline, normalize=normalize, window=128 if drawn else 4 * size)
    slot["maximum"] = 5.0 if drawn else 1e3
    entropy = 0.0 if drawn else 0.05
    limits = {"safety": LimitConfig(0.8)}
    method = method_of("dr_grpo", limits=limits, constraint=slot, group_size=size, entropy_coef=entropy)
    return train(method, PROMPTS, [1.0, 0.0], steps, lr, unsafe_start(refusing), entropy=not drawn, draw=draw, sure=1.1)


def steps_until(run: Run, at_least: float) -> int | None:
    """The first step after which the mean safety reaches the limit."""
    return next((i for i, means in enumerate(run.means, 1) if means[1] >= at_least), None)


def limited(
    where: str, limits: dict[str, float], scores: torch.Tensor, steps: int = 200, beta: float = 0.1, rate: float = 0.3
) -> tuple[Run, np.ndarray]:
    """Helpfulness under limits on the other objectives, and the analytic multipliers. where: reward (a KL term) | loss (an entropy bonus)."""
    inside, k = where == "reward", scores.shape[1]
    reward = [1.0] + [0.0] * (k - 1)
    wanted = {name: LimitConfig(value) for name, value in limits.items()}
    method = method_of("dr_grpo", k, wanted, constraint=lagrangian(rate), entropy_coef=0.0 if inside else beta)
    run = train(method, scores, reward, steps, 0.3 / beta, entropy=not inside, kl_coef=beta if inside else 0.0)
    return run, analytic(scores, reward, {NAMES.index(n): v for n, v in limits.items()}, beta, inside)[0]


def normalized(normalization: str, steps: int, lr: float, rate: float) -> Run:
    """algo=safe_grpo, whose costs are divided by their running std; its reward too, or only centred."""
    slot = lagrangian(rate, normalize=True)
    limits = {"safety": LimitConfig(0.6)}
    method = method_of("safe_grpo", limits=limits, entropy_coef=0.1, constraint=slot, normalization=normalization)
    return train(method, FRONT, [1.0, 0.0], steps, lr, entropy=True, sure=1.1)


def pessimistic_run(at_least: float, safety_prompts: int, beta: float, steps: int) -> tuple[Run, float]:
    """A run with HC-RLHF's bound, and its kappa. Only the term of the later test counts (c1 = 0): the toy's means are exact."""
    slot = {
        "name": "pessimistic",
        "rate": 0.1,
        "maximum": 1e3,
        "window": GROUP,
        "normalize": False,
        "safety_prompts": safety_prompts,
        "c1": 0.0,
    }
    method = method_of("dr_grpo", limits={"safety": LimitConfig(at_least, 0.9)}, constraint=slot)
    kappa = float(student.ppf(0.9, safety_prompts - 1)) / safety_prompts**0.5
    return train(method, FRONT, [1.0, 0.0], steps, 0.3 / beta, kl_coef=beta), kappa


POPULATION = torch.rand(
    6, 5, 2, generator=torch.Generator().manual_seed(3)
).double()  # six kinds of prompt, five completions each


def bound_misses(runs: int, tests: int = 1, steps: int = 25, prompts: int = 100, confidence: float = 0.9) -> tuple[int, int, int]:
    """`runs` sampled runs of algo=hc_grpo, each tested `tests` times on fresh prompts, one completion each.

    Returns how often the lower bound lay above the true mean, how often an unsafe policy passed, and the number of tests.
    """
    misses = unsafe = 0
    for seed in range(runs):
        draw = torch.Generator().manual_seed(seed)
        slot = {"name": "pessimistic", "rate": 0.1, "maximum": 100.0, "window": 256, "safety_prompts": prompts}
        method = method_of("hc_grpo", limits={"safety": LimitConfig(0.75, confidence)}, constraint=slot, group_size=8)
        run = train(method, POPULATION, [1.0, 0.0], steps, 2.0, draw=draw, sure=1.1)
        true = run.means[-1][1]
        for _ in range(tests):
            kinds = torch.randint(len(POPULATION), (prompts,), generator=draw)
            completions = torch.multinomial(run.probabilities[kinds], 1, generator=draw)[:, 0]
            low = limit_bound(POPULATION[kinds, completions, 1], confidence)[1]
            misses += low > true
            unsafe += low >= 0.75 > true
    return misses, unsafe, runs * tests


# --- what is printed and drawn --------------------------------------------------------------------------------------------------------------

SWEPT = {
    "linear": ("grpo", {}),
    "chebyshev": ("chebyshev", {}),
    "smooth_chebyshev": ("smooth_chebyshev", {}),
    "soft_min": ("grpo", {"aggregation": {"name": "soft_min", "sharpness": 20.0}}),
    "geometric": ("geometric", {}),
}  # aggregation -> preset, changes. soft_min on raw scores here; its preset works on normalized ones, where no fixed reward exists.
NUMBERS = {"soft_min": {"sharpness": 20.0}}


def ends(name: str, w: float, scores: torch.Tensor = FRONT) -> int:
    """The completion that an aggregation's policy ends on with weights (w, 1 - w)."""
    preset, changes = SWEPT.get(name, (name, {}))
    return train(method_of(preset, **changes), scores, [w, 1 - w], 300, 0.5).best


def max_min_run(preset: str, steps: int, beta: float = 0.02, **changes: Any) -> Run:
    """max_min or worst_head with an entropy bonus, no division by the spread."""
    method = method_of(preset, normalization="centred", entropy_coef=beta, **changes)
    return train(method, FRONT, [1.0, 1.0], steps, 0.3 / beta, entropy=True, sure=1.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--points", type=int, default=19, help="weights of the sweep")
    options = parser.parse_args()
    options.figures.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    grid = np.linspace(0, 1, options.points + 2)[1:-1]
    swept = {name: [ends(name, w) for w in grid.tolist()] for name in (*SWEPT, "gdpo")}
    swept["soft_min (preset)"] = [train(method_of("soft_min"), FRONT, [w, 1 - w], 300, 0.5).best for w in grid.tolist()]
    averages = {name: max_min_run(name, 300) for name in ("max_min", "worst_head")}
    show_sweep(swept, grid, averages)
    draw_front(swept, grid, averages["max_min"], options.figures / "toy_front.png")
    runs = show_limits()
    draw_limits(runs, options.figures / "toy_limits.png")


def show_sweep(swept: dict[str, list[int]], grid: np.ndarray, averages: dict[str, Run]) -> None:
    """Per aggregation: completions reached over the weights, and whether each is the formula's best."""
    table = Table("aggregation", "completions reached", "inside the hull", "beaten", "as the formula says")
    for name, reached in swept.items():
        agree = "no fixed reward"
        if name in SWEPT:
            best = [int(rewards_by_formula(name, FRONT, [w, 1 - w], **NUMBERS.get(name, {})).argmax()) for w in grid]
            agree = f"{sum(a == b for a, b in zip(reached, best, strict=True))} of {len(best)}"
        table.add_row(
            name,
            " ".join(str(i) for i in sorted(set(reached))),
            *(" ".join(str(i) for i in sorted(set(reached) & set(group))) or "none" for group in (DENTS, BEATEN)),
            agree,
        )
    Console(width=110).print(table)
    expected, _ = max_min_policy(FRONT, 0.02)
    print("max-min, theory:", (expected @ FRONT.numpy()).round(3).tolist())
    for name, run in averages.items():
        print(f"{name}: last {np.round(run.means[-1], 3).tolist()}, average of the late half {np.round(run.late(), 3).tolist()}")


def show_limits() -> dict[str, Any]:
    """Multipliers beside the analytic ones, and what the figures need."""
    table = Table("run", "limits", "means of what is limited", "multipliers", "analytic")
    runs: dict[str, Any] = {}

    def row(name: str, limits: str, run: Run, columns: list[int], expected: Any) -> None:
        means = ", ".join(f"{run.means[-1][k]:.3f}" for k in columns)
        wanted = ", ".join(f"{x:.3f}" for x in np.atleast_1d(expected)) if expected is not None else "-"
        table.add_row(name, limits, means, ", ".join(f"{x:.3f}" for x in run.multipliers[-1]), wanted)

    for where, name in (("reward", "KL in the reward"), ("loss", "entropy bonus in the loss")):
        runs[where], expected = limited(where, {"safety": 0.7}, FRONT)
        runs[f"{where} analytic"] = expected
        row(name, ".7", runs[where], [1], expected)
    two, expected = limited("reward", {"safety": 0.6, "brevity": 0.5}, THREE)
    row("two limits, both bind", ".6, .5", two, [1, 2], expected)
    slack, expected = limited("reward", {"safety": 0.6, "brevity": 0.2}, THREE, steps=400, rate=1.0)
    row("two limits, one idle", ".6, .2", slack, [1, 2], expected)
    row("costs normalized", ".6", normalized("centred", 200, 1.0, 0.3), [1], None)
    runs["both"] = normalized("group_std", 400, 0.3, 0.1)
    row(f"costs and reward normalized (late average {runs['both'].late()[1]:.3f})", ".6", runs["both"], [1], None)
    for prompts in (100, 20):
        run, kappa = pessimistic_run(0.6, prompts, 0.2, 200)
        row(f"pessimistic, kappa {kappa:.2f}", ".6", run, [1], pessimistic_policy(FRONT, 0.6, kappa, 0.2)[0])
    for baseline in ("batch", "group"):
        runs[baseline] = from_unsafe(baseline, 1e-3, 60, 4.0)
        row(f"all unsafe, exact, {baseline}", ".8", runs[baseline], [1], None)
    for refusing, lr, steps in ((0.02, 2.0, 150), (0.002, 2.0, 300)):
        for baseline in ("batch", "group"):
            drawn = [from_unsafe(baseline, refusing, steps, lr, torch.Generator().manual_seed(i), True) for i in range(6)]
            runs[f"{baseline} {refusing}"] = drawn
            held = [steps_until(run, 0.8) for run in drawn]
            row(f"all unsafe ({refusing:g} refuse), drawn, {baseline}: holds from step {held}", ".8", drawn[0], [1], None)
    Console(width=150).print(table)
    return runs


def draw_front(swept: dict[str, list[int]], grid: np.ndarray, balanced: Run, path: Path) -> None:
    """Left: the front and what linear and Chebyshev reach; right: the completion chosen at each weight."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), width_ratios=(1, 1.35))
    s = FRONT.numpy()
    left.plot(*s[CORNERS].T, "-", color="0.8", label="hull of the completions")
    left.plot(*s.T, "o", color="0.6")
    for i, (x, y) in enumerate(s):
        left.annotate(str(i), (x, y), (5, -12), textcoords="offset points")
    for name, marker, size in (("linear", "s", 13), ("chebyshev", "x", 8)):
        reached = sorted(set(swept[name]))
        left.plot(*s[reached].T, marker, ms=size, mfc="none", mew=1.8, label=f"{name}, over all weights")
    left.plot(*balanced.late(), "*", ms=14, label="max_min: a mixture with equal means")
    left.set(xlabel="helpfulness", ylabel="safety", xlim=(0, 1.05), ylim=(0, 1.05))
    left.legend(fontsize=8, loc="lower left")
    colours = plt.get_cmap("tab10")
    for line, reached in enumerate(swept.values()):
        right.scatter(grid, [line] * len(grid), c=[colours(i) for i in reached], marker="s", s=90)
        for w, i in zip(grid, reached, strict=True):
            right.annotate(str(i), (w, line), ha="center", va="center", fontsize=7, color="white")
    right.set(
        xlabel="weight of helpfulness", yticks=range(len(swept)), yticklabels=list(swept), title="the completion it ends on"
    )
    right.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_limits(runs: dict[str, Any], path: Path) -> None:
    """Multipliers and limited means against steps, and the unsafe start by exact and by drawn groups."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (one, two, three) = plt.subplots(1, 3, figsize=(13, 3.8))
    for where, colour in (("reward", "C0"), ("loss", "C1")):
        name = {"reward": "KL in the reward", "loss": "entropy bonus in the loss"}[where]
        one.plot([x[0] for x in runs[where].multipliers], colour, label=name)
        one.axhline(float(runs[f"{where} analytic"][0]), color=colour, ls=":")
        two.plot([x[1] for x in runs[where].means], colour, label=name)
    two.axhline(0.7, color="0.4", ls=":")
    one.set(title="multiplier (dotted: analytic)", xlabel="step")
    two.set(title="mean safety (dotted: the limit)", xlabel="step")
    one.legend(fontsize=8)
    for baseline, colour in (("batch", "C2"), ("group", "C3")):
        for i, run in enumerate(runs[f"{baseline} 0.002"]):
            three.plot([x[1] for x in run.means], colour, alpha=0.6, lw=1, label=f"baseline: {baseline}" if i == 0 else None)
    three.axhline(0.8, color="0.4", ls=":")
    three.set(title="mean safety, unsafe start, groups of 8 drawn", xlabel="step")
    three.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
