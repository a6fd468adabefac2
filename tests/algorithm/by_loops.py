"""The slots of a method once more, as loops over Python floats written from the formulas of the papers: what the tests compare with.

Nothing here is shared with grpo_safe. A stateful method gets the whole history and no state: history is a list of steps, and the last
step's result is returned.
"""

from __future__ import annotations

import math

from scipy.stats import t as student

Rows = list[list[float]]


def average(numbers: list[float]) -> float:
    return math.fsum(numbers) / len(numbers) if numbers else 0.0


def spread(numbers: list[float]) -> float:
    """Unbiased std; 0 for fewer than two."""
    if len(numbers) < 2:
        return 0.0
    middle = average(numbers)
    return math.sqrt(math.fsum((x - middle) ** 2 for x in numbers) / (len(numbers) - 1))


def kept(numbers: list[float], valid: list[bool]) -> list[float]:
    return [x for x, v in zip(numbers, valid, strict=True) if v]


def groups(n: int, size: int) -> list[range]:
    return [range(first, first + size) for first in range(0, n, size)]


# --- aggregations: (history of (values, valid), weights, numbers) -> rewards of the last step (methods.md 2.D.8) ---


def shares(weights: list[float]) -> dict[int, float]:
    positive = {k: w for k, w in enumerate(weights) if w > 0}
    return {k: w / sum(positive.values()) for k, w in positive.items()}


def linear(history, weights):
    return [sum(w * s for w, s in zip(weights, row, strict=True)) / sum(abs(w) for w in weights) for row in history[-1][0]]


def total(history, weights):
    return [sum(w * s for w, s in zip(weights, row, strict=True)) for row in history[-1][0]]


def chebyshev(history, weights, ideal=1.0, rho=0.01):
    rewards = []
    for row in history[-1][0]:
        distances = [w * (ideal - row[k]) for k, w in shares(weights).items()]
        rewards.append(-max(distances) - rho * sum(distances))
    return rewards


def smooth_chebyshev(history, weights, ideal=1.0, mu=0.1):
    return [
        -mu * math.log(sum(math.exp(w * (ideal - row[k]) / mu) for k, w in shares(weights).items())) for row in history[-1][0]
    ]


def soft_min(history, weights, sharpness=4.0):
    return [
        -math.log(sum(w * math.exp(-sharpness * row[k]) for k, w in shares(weights).items())) / sharpness
        for row in history[-1][0]
    ]


def geometric(history, weights, floor=0.01):
    return [math.prod(max(row[k], floor) ** w for k, w in shares(weights).items()) for row in history[-1][0]]


def gated(history, weights, objective=0, at_least=0.5, bonus=1.0, penalty=0.0):
    others = {k: w for k, w in enumerate(weights) if k != objective and w}
    rewards = []
    for row in history[-1][0]:
        rest = sum(w * row[k] for k, w in others.items()) / sum(others.values()) if others else 0.0
        rewards.append(rest + bonus if row[objective] >= at_least else row[objective] - penalty)
    return rewards


def step_means(history, k):
    return [average([row[k] for row, v in zip(values, valid, strict=True) if v]) for values, valid in history]


def worst_head(history, weights, ema=0.9):
    """m_T = ema^(T-1) m_1 + sum_{t>1} (1 - ema) ema^(T-t) mean_t."""
    running = {}
    for k, w in enumerate(weights):
        if w:
            means, last = step_means(history, k), len(history) - 1
            running[k] = sum((ema**last if t == 0 else (1 - ema) * ema ** (last - t)) * m for t, m in enumerate(means))
    worst = min(running, key=lambda k: running[k])
    return [row[worst] for row in history[-1][0]]


def max_min(history, weights, rate=0.5, target=1.0):
    """a_k proportional to w_k exp(rate x the shortfall summed over the steps)."""
    raised = [w * math.exp(rate * sum(target - m for m in step_means(history, k))) for k, w in enumerate(weights)]
    return [sum(a * s for a, s in zip(raised, row, strict=True)) / sum(raised) for row in history[-1][0]]


AGGREGATIONS = {
    f.__name__: f for f in (linear, total, chebyshev, smooth_chebyshev, soft_min, geometric, gated, worst_head, max_min)
}


# --- normalizations: (history of (rewards, valid), group size, tau, tie spread, numbers) -> advantages of the last step ---


def per_group(rewards, valid, size, of):
    """of(reward, the group's valid rewards) for every valid completion of a group with at least two, 0 elsewhere."""
    found = [0.0] * len(rewards)
    for group in groups(len(rewards), size):
        members = [rewards[i] for i in group if valid[i]]
        for i in group:
            if valid[i] and len(members) > 1:
                found[i] = of(rewards[i], members)
    return found


def group_std(history, size, tau, tie_spread):
    def of(r, members):
        std = spread(members)
        return 0.0 if std < tie_spread else (r - average(members)) / (math.hypot(std, tau) + 1e-4)

    return per_group(*history[-1], size, of)


def centred(history, size, tau, tie_spread):
    return per_group(*history[-1], size, lambda r, members: r - average(members))


def leave_one_out(history, size, tau, tie_spread):
    return per_group(*history[-1], size, lambda r, members: r - (math.fsum(members) - r) / (len(members) - 1))


def batch_std(history, size, tau, tie_spread):
    std = math.hypot(spread(kept(*history[-1])), tau) + 1e-4
    return per_group(*history[-1], size, lambda r, members: (r - average(members)) / std)


def whitened(history, size, tau, tie_spread):
    rewards, valid = history[-1]
    known = kept(rewards, valid)
    return [
        (r - average(known)) / (math.hypot(spread(known), tau) + 1e-4) if v else 0.0 for r, v in zip(rewards, valid, strict=True)
    ]


def group_whitened(history, size, tau, tie_spread):
    valid = history[-1][1]
    return whitened([(centred(history, size, tau, tie_spread), valid)], size, tau, tie_spread)


def running_clip(history, size, tau, tie_spread, clip=10.0):
    """Moments over every valid reward of every step so far; methods.md 2.B.1."""
    seen = [r for rewards, valid in history for r in kept(rewards, valid)]
    scale = math.hypot(spread(seen), tau) + 1e-4
    clipped = [max(-clip, min(clip, (r - average(seen)) / scale)) for r in history[-1][0]]
    return centred([(clipped, history[-1][1])], size, tau, tie_spread)


NORMALIZATIONS = {f.__name__: f for f in (group_std, centred, leave_one_out, batch_std, whitened, group_whitened, running_clip)}


# --- filters: (rewards, valid, group size, noise) -> factor per completion (methods.md 2.B.4) ---


def everything(rewards, valid, size, noise):
    return [1.0 if v else 0.0 for v in valid]


def chosen(rewards, valid, size, choose):
    factors = [0.0] * len(rewards)
    for group in groups(len(rewards), size):
        members = [i for i in group if valid[i]]
        if members:
            picked = set(choose(members))
            for i in picked:
                factors[i] = len(members) / len(picked)
    return factors


def best_worst(rewards, valid, size, noise):
    return chosen(rewards, valid, size, lambda m: (max(m, key=lambda i: rewards[i]), min(m, key=lambda i: rewards[i])))


def best_random(rewards, valid, size, noise):
    def choose(members):
        best = max(members, key=lambda i: rewards[i])
        others = [i for i in members if i != best]
        return [best, max(others, key=lambda i: noise[i])] if others else [best]

    return chosen(rewards, valid, size, choose)


FILTERS = {f.__name__: f for f in (everything, best_worst, best_random)}


# --- limits: history of (advantages, scores, valid) -> (advantages, multipliers, means, lows) of the last step (2.A.1, 2.A.2) ---


def constrained(
    history, size, limits, rate, initial, maximum, window, delay=0, baseline="batch", normalize=True,
    pessimism=False, safety_prompts=1000, c1=1.0, c2=1.0, floor=0.01,
):  # fmt: skip
    """limits: (objective, at_least, confidence). A plain multiplier: lambda <- min(max, lambda exp(rate lambda bound))."""
    mixed, total_lambda, multipliers, means, lows = list(history[-1][0]), 0.0, [], [], []
    for objective, at_least, confidence in limits:
        multiplier, seen, variances = initial, [], []
        for step, (_, scores, valid) in enumerate(history):
            known = [v and math.isfinite(row[objective]) for row, v in zip(scores, valid, strict=True)]
            costs = [at_least - row[objective] if ok else 0.0 for row, ok in zip(scores, known, strict=True)]
            seen += kept(costs, known)
            recent = seen[-max(window, sum(known)) :]
            mean, std = average(recent), spread(recent)
            kappa = 0.0
            if pessimism:
                delta, n = 1 - (confidence or 0.9), max(2, len(recent) // size)
                kappa = (
                    c1 * student.isf(delta, n - 1) / n**0.5 + c2 * student.isf(delta, safety_prompts - 1) / safety_prompts**0.5
                )
            if step >= delay and recent:
                multiplier = min(maximum, multiplier * math.exp(rate * multiplier * (mean + kappa * std)))
            costs = [c + kappa * (c - mean) ** 2 / (2 * max(std, floor)) for c in costs]
            variances.append(max(spread(kept(costs, known)) ** 2, 1e-6))
        last = len(variances) - 1
        variance = sum((0.9**last if t == 0 else 0.1 * 0.9 ** (last - t)) * v for t, v in enumerate(variances))
        for group in groups(len(costs), size):
            compared_with = [costs[i] for i in (group if baseline == "group" else range(len(costs))) if known[i]]
            for i in group:
                if known[i]:
                    push = costs[i] - average(compared_with)
                    mixed[i] -= multiplier * push / (math.sqrt(variance) + 1e-4 if normalize else 1.0)
        total_lambda += multiplier
        multipliers.append(multiplier)
        per_prompt = [
            average([scores[i][objective] for i in group if known[i]])
            for group in groups(len(costs), size)
            if any(known[i] for i in group)
        ]
        means.append(average(per_prompt) if per_prompt else math.nan)
        p = len(per_prompt)
        quantile = student.isf(1 - (confidence or 0.95), p - 1) if p > 1 else math.inf
        lows.append(means[-1] - quantile * spread(per_prompt) / p**0.5 if p > 1 else -math.inf)
    return [a / (1 + total_lambda) for a in mixed], multipliers, means, lows
