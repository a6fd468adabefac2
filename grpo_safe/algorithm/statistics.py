"""Figures with intervals: how well a head predicts its labels, how two policies differ. numpy in, numbers out.

The unit of resampling is the prompt: answers to one prompt are not independent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.stats import bootstrap as scipy_bootstrap
from scipy.stats import rankdata
from scipy.stats import t as student

Array = np.ndarray
COLLAPSED = 1e-5  # spread of predictions, as a share of the labels'


@dataclass(frozen=True)
class Estimate:
    """A figure with the 95% interval of a bootstrap over prompts.

    Example: Estimate(0.42, 0.31, 0.53)
    """

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def bootstrap(figure: Callable[..., float], clusters: Array, columns: tuple[Array, ...], resamples: int, seed: int) -> Estimate:
    """figure(*columns) [n rows each] with a percentile interval; whole clusters [n] are drawn with replacement.

    A resample on which the figure is undefined (one class only, no spread) is left out.
    """
    value = figure(*columns)
    _, inverse = np.unique(clusters, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(inverse.max() + 2))
    rows_of = [order[a:b] for a, b in pairwise(starts)]
    rng = np.random.default_rng(seed)
    figures = []
    for _ in range(resamples):
        drawn = np.concatenate([rows_of[c] for c in rng.integers(0, len(rows_of), len(rows_of))])
        figures.append(figure(*(column[drawn] for column in columns)))
    kept = np.array([f for f in figures if np.isfinite(f)])
    if not np.isfinite(value) or kept.size < max(1, resamples // 2):
        return Estimate(float(value), float("nan"), float("nan"))
    low, high = np.percentile(kept, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


def mse(predicted: Array, label: Array) -> float:
    return float(np.mean((predicted - label) ** 2))


def r2(predicted: Array, label: Array) -> float:
    """1 - MSE / variance: what is better than predicting the mean of these labels. nan without spread."""
    variance = float(np.var(label)) if np.ptp(label) > 0 else 0.0  # equal floats may have a variance of 1e-34
    return 1.0 - mse(predicted, label) / variance if variance > 0 else float("nan")


def pearson(a: Array, b: Array) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum() / norm) if norm > 0 else float("nan")


def spearman(a: Array, b: Array) -> float:
    """Rank correlation, ties at their mean rank."""
    return pearson(rankdata(a), rankdata(b))


def auc(predicted: Array, label: Array) -> float:
    """Probability that a positive (label > 0.5) outscores a negative; ties count half. nan with one class."""
    positive = label > 0.5
    n1, n0 = int(positive.sum()), int((~positive).sum())
    if n1 == 0 or n0 == 0:
        return float("nan")
    return float((rankdata(predicted)[positive].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def ece(predicted: Array, label: Array, bins: int = 10) -> float:
    """Expected calibration error over equal-width bins of the clipped prediction (arXiv 1706.04599, eq. 3)."""
    clipped = np.clip(predicted, 0.0, 1.0)
    which = np.minimum((clipped * bins).astype(int), bins - 1)
    gap = 0.0
    for b in range(bins):
        inside = which == b
        if inside.any():
            gap += inside.mean() * abs(clipped[inside].mean() - label[inside].mean())
    return float(gap)


def pair_accuracy(margin: Array) -> float:
    """Share of pairs with a positive margin; ties count half."""
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def collapsed(predicted: Array, label: Array) -> bool:
    """Whether predictions hardly differ where labels do: stretching them by 1 / COLLAPSED would show rounding noise as scores."""
    return float(np.std(predicted)) < COLLAPSED * float(np.std(label))


def affine_fit(predicted: Array, label: Array) -> tuple[float, float]:
    """Least-squares (slope, offset) of label on prediction, slope > 0; where the fit has none, slope 1 and the means made equal.

    Predictions that hardly differ (`collapsed`) have none either, which bounds the slope by 1 / COLLAPSED.
    A head that runs against its labels keeps its direction, for the gate to refuse: turning it round here would let noise pass.
    """
    usable = len(predicted) > 2 and np.ptp(predicted) > 0 and not collapsed(predicted, label)
    variance = float(np.var(predicted)) if usable else 0.0
    slope = float(np.mean((predicted - predicted.mean()) * (label - label.mean()))) / variance if variance > 0 else 0.0
    if slope <= 0:
        return 1.0, float(label.mean() - predicted.mean())
    return slope, float(label.mean() - slope * predicted.mean())


BOOTSTRAP_FROM = 100  # prompts; below, a bootstrap's intervals are too narrow


def mean_interval(per_prompt: Array, resamples: int, seed: int) -> Estimate:
    """Mean of one number per prompt with a 95% interval: Student's t below 100 prompts, a BCa bootstrap above. Of scores, not of rates.

    Without spread the interval is the point; of fewer than two prompts there is none (nan).
    """
    value, n = float(per_prompt.mean()) if per_prompt.size else float("nan"), per_prompt.size
    if n < 2:
        return Estimate(value, float("nan"), float("nan"))
    if float(np.ptp(per_prompt)) == 0.0:
        return Estimate(value, value, value)
    if n < BOOTSTRAP_FROM:
        half = float(student.ppf(0.975, n - 1)) * float(per_prompt.std(ddof=1)) / n**0.5
        return Estimate(value, value - half, value + half)
    found = scipy_bootstrap(
        (per_prompt,), np.mean, n_resamples=resamples, method="BCa", rng=np.random.default_rng(seed), vectorized=True
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high))
