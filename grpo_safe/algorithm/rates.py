"""Rates of events among prompts: exact intervals, paired differences, many tests at once. The unit is the prompt. numpy in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import binomtest, norm

from grpo_safe.algorithm.statistics import Array, Estimate


def rate(events: Array, confidence: float = 0.95) -> Estimate:
    """Share of prompts with an event [P] in {0, 1}, with the exact interval of Clopper and Pearson (Biometrika 26, 1934).

    It covers at least its confidence at every true rate: 0 of 40 is [0, .088].
    """
    n, k = len(events), int(np.sum(events))
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    found = binomtest(k, n).proportion_ci(confidence, method="exact")
    return Estimate(k / n, float(found.low), float(found.high))


def rate_at_most(events: Array, confidence: float) -> float:
    """The one-sided exact upper bound of the rate: above it lies the true one with probability 1 - confidence at most."""
    n, k = len(events), int(np.sum(events))
    return float(binomtest(k, n, alternative="less").proportion_ci(confidence, method="exact").high) if n else 1.0


def rate_at_least(events: Array, confidence: float) -> float:
    """The one-sided exact lower bound."""
    n, k = len(events), int(np.sum(events))
    return float(binomtest(k, n, alternative="greater").proportion_ci(confidence, method="exact").low) if n else 0.0


def rate_difference(before: Array, after: Array, confidence: float = 0.95) -> Estimate:
    """after - before of two rates on the same prompts, both [P] in {0, 1}: the wider ends of Newcombe's and of Tango's interval.

    Each alone falls to .92 in some cells of a simulation (one discordant side empty; tests/algorithm/test_rates.py), and not in the same ones. Without a
    single discordant prompt the interval still has a width.
    """
    if len(before) == 0:
        return Estimate(float("nan"), float("nan"), float("nan"))
    b, a = before.astype(bool), after.astype(bool)
    both, gained, lost, neither = (int(cell.sum()) for cell in (a & b, a & ~b, ~a & b, ~a & ~b))
    z = float(norm.ppf(0.5 + confidence / 2))
    one, two = newcombe(both, gained, lost, neither, z), tango(gained, lost, len(b), z)
    return Estimate((gained - lost) / len(b), min(one[0], two[0]), max(one[1], two[1]))


def newcombe(both: int, gained: int, lost: int, neither: int, z: float) -> tuple[float, float]:
    """Limits of (gained - lost) / n (Newcombe, Statistics in Medicine 17, 1998, method 10): Wilson's limits of both rates, put together by their
    correlation with a continuity correction.
    """
    n = both + gained + lost + neither
    p, q = (both + gained) / n, (both + lost) / n
    (p_low, p_high), (q_low, q_high) = _wilson(both + gained, n, z), _wilson(both + lost, n, z)
    product = float(both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    excess = float(both * neither - gained * lost)
    if excess > 0:
        excess = max(0.0, excess - n / 2)
    phi = excess / math.sqrt(product) if product else 0.0

    def distance(x: float, y: float) -> float:
        return math.sqrt(max(0.0, x * x - 2 * phi * x * y + y * y))

    return max(-1.0, p - q - distance(p - p_low, q_high - q)), min(1.0, p - q + distance(p_high - p, q - q_low))


def tango(gained: int, lost: int, n: int, z: float) -> tuple[float, float]:
    """Limits of (gained - lost) / n: the differences that a score test at z does not reject (Tango, Statistics in Medicine 17, 1998)."""

    def score(difference: float) -> float:
        b = -gained - lost + (2 * n - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        least = (math.sqrt(max(0.0, b * b - 8 * n * c)) - b) / (4 * n)  # the most likely share lost, under this difference
        variance = n * (2 * least + difference * (1 - difference))
        distance = gained - lost - n * difference
        return distance / math.sqrt(variance) if variance > 1e-15 else math.copysign(math.inf, distance) if distance else 0.0

    def root(target: float, low: float, high: float) -> float:
        return float(brentq(lambda d: max(-1e6, min(1e6, score(d) - target)), low, high, xtol=1e-12))

    found, edge = (gained - lost) / n, 1.0 - 1e-12
    return (-1.0 if score(-edge) <= z else root(z, -edge, found)), (1.0 if score(edge) >= -z else root(-z, found, edge))


def mcnemar(before: Array, after: Array) -> float:
    """Two-sided exact p that two rates on the same prompts are equal: the discordant prompts are a fair coin's (McNemar, Psychometrika 12, 1947)."""
    discordant = int((before != after).sum())
    return float(binomtest(int((before < after).sum()), discordant, 0.5).pvalue) if discordant else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p of a family of tests, in the order given: the chance of one wrong finding or more stays below alpha (Holm, Scand. J. Statist. 6, 1979)."""
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = running
    return adjusted


def _wilson(k: int, n: int, z: float) -> tuple[float, float]:
    """Wilson's score limits without a correction (JASA 22, 1927)."""
    center, spread = (2 * k + z * z) / (2 * (n + z * z)), z * math.sqrt(z * z + 4 * k * (n - k) / n) / (2 * (n + z * z))
    return max(0.0, center - spread), min(1.0, center + spread)
