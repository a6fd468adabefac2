"""Figures against scikit-learn and scipy, and intervals against what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from grpo_safe.algorithm.statistics import (
    affine_fit,
    auc,
    bootstrap,
    ece,
    mean_interval,
    mse,
    pair_accuracy,
    pearson,
    r2,
    spearman,
)


def data(seed: int, n: int, ties: bool):
    rng = np.random.default_rng(seed)
    label = rng.random(n)
    predicted = np.clip(label + 0.3 * rng.standard_normal(n), -0.2, 1.2)
    if ties:
        label, predicted = np.round(label * 4) / 4, np.round(predicted * 5) / 5
    return predicted, label


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_figures_equal_sklearn_and_scipy(seed, ties):
    predicted, label = data(seed, 30 + 17 * seed, ties)
    assert r2(predicted, label) == pytest.approx(metrics.r2_score(label, predicted), abs=1e-12)
    assert mse(predicted, label) == pytest.approx(metrics.mean_squared_error(label, predicted), abs=1e-12)
    assert auc(predicted, label) == pytest.approx(metrics.roc_auc_score(label > 0.5, predicted), abs=1e-12)
    assert spearman(predicted, label) == pytest.approx(stats.spearmanr(predicted, label).statistic, abs=1e-12)
    assert pearson(predicted, label) == pytest.approx(stats.pearsonr(predicted, label).statistic, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_ece_equals_the_loop_over_bins(seed):
    rng = np.random.default_rng(seed)
    predicted = np.concatenate([rng.uniform(-0.1, 1.1, 60), [0.0, 1.0, 0.5, -3.0, 3.0]])
    label = (rng.random(65) < 0.5).astype(float)
    expected = 0.0
    for b in range(10):
        rows = [i for i, p in enumerate(predicted) if min(int(min(max(p, 0.0), 1.0) * 10), 9) == b]
        if rows:
            confidence = sum(min(max(predicted[i], 0.0), 1.0) for i in rows) / len(rows)
            expected += len(rows) / 65 * abs(confidence - sum(label[i] for i in rows) / len(rows))
    assert ece(predicted, label) == pytest.approx(expected, abs=1e-12)
    assert ece(label, label) == 0.0
    assert ece(1 - label, label) == 1.0


def test_auc_counts_a_tie_half_and_is_undefined_with_one_class():
    assert auc(np.array([0.3, 0.3]), np.array([0.0, 1.0])) == 0.5
    assert auc(np.array([0.1, 0.2, 0.2, 0.3]), np.array([0, 0, 1, 1.0])) == 0.875
    assert math.isnan(auc(np.array([0.1, 0.2]), np.array([1.0, 1.0])))


@pytest.mark.parametrize("constant", [0.0, 0.1, 0.6, 0.7, 1.0])
@pytest.mark.parametrize("n", [3, 7, 10, 49])
def test_without_spread_a_figure_is_undefined_not_huge(constant, n):
    """The mean of n equal floats may differ from them in the last digit: a variance of 1e-34 is none."""
    flat, other = np.full(n, constant), np.linspace(0, 1, n)
    assert math.isnan(r2(other, flat))
    assert math.isnan(pearson(flat, other)) and math.isnan(pearson(other, flat)) and math.isnan(pearson(flat, flat))
    assert math.isnan(spearman(flat, other))
    assert affine_fit(flat, other) == (1.0, pytest.approx(0.5 - constant))


def test_pair_accuracy():
    assert pair_accuracy(np.array([0.2, -0.1, 0.0, 3.0])) == 0.625


@pytest.mark.parametrize("seed", range(4))
def test_affine_fit_is_least_squares(seed):
    predicted, label = data(seed, 40, False)
    expected = np.polyfit(predicted, label, 1)
    assert affine_fit(predicted, label) == pytest.approx(tuple(expected), abs=1e-10)
    slope, offset = affine_fit(predicted, label)
    again = affine_fit(slope * predicted + offset, label)
    assert again == pytest.approx((1.0, 0.0), abs=1e-10)


def test_affine_fit_never_turns_a_head_round():
    predicted = np.array([0.0, 1.0, 2.0, 3.0])
    slope, offset = affine_fit(predicted, -predicted)
    assert slope == 1.0
    assert offset == pytest.approx(-3.0)  # the means made equal
    assert r2(slope * predicted + offset, -predicted) < 0  # so the gate refuses it
    assert affine_fit(predicted[:2], predicted[:2] * 2)[0] == 1.0  # two points fit any line


def test_bootstrap_draws_clusters_not_rows():
    """Ten answers that say the same of one prompt are one answer's worth of evidence."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(40)
    clusters = np.array([f"p{i}" for i in range(40)])

    def mean(x):
        return float(np.mean(x))

    def width(found):
        return found.high - found.low

    once = bootstrap(mean, clusters, (values,), 400, 1)
    tenfold = bootstrap(mean, np.repeat(clusters, 10), (np.repeat(values, 10),), 400, 1)
    as_rows = bootstrap(mean, np.arange(400), (np.repeat(values, 10),), 400, 1)
    assert tenfold.value == pytest.approx(once.value)
    assert width(tenfold) == pytest.approx(width(once), rel=0.02)
    assert width(as_rows) < 0.5 * width(once)
    assert width(once) == pytest.approx(2 * 1.96 * values.std() / math.sqrt(40), rel=0.15)


def test_bootstrap_keeps_the_rows_of_columns_together_in_any_order():
    predicted, label = data(3, 60, False)
    clusters = np.repeat(np.arange(20), 3)
    rng = np.random.default_rng(5)
    mixed = rng.permutation(60)
    found = bootstrap(r2, clusters, (predicted, label), 300, 0)
    shuffled = bootstrap(r2, clusters[mixed], (predicted[mixed], label[mixed]), 300, 0)
    assert found.low < found.value < found.high
    assert (shuffled.value, shuffled.low, shuffled.high) == pytest.approx((found.value, found.low, found.high), abs=1e-9)
    assert found == bootstrap(r2, clusters, (predicted, label), 300, 0)
    assert found != bootstrap(r2, clusters, (predicted, label), 300, 1)


def test_bootstrap_leaves_undefined_resamples_out():
    label = np.array([1.0] + [0.0] * 5)
    found = bootstrap(auc, np.arange(6), (np.linspace(0, 1, 6), label), 200, 0)
    assert found.value == 0.0 and np.isfinite([found.low, found.high]).all()
    undefined = bootstrap(auc, np.arange(6), (np.linspace(0, 1, 6), np.ones(6)), 50, 0)
    assert math.isnan(undefined.value) and math.isnan(undefined.low) and math.isnan(undefined.high)


def test_mean_interval_covers_the_true_mean():
    """150 seeded samples of a skewed score, n = 80: a 95% interval may miss some; a binomial test at 1e-4 must not object."""
    rng = np.random.default_rng(7)
    true_mean = 2 / 5  # of Beta(2, 3)
    inside = 0
    for seed in range(150):
        found = mean_interval(rng.beta(2, 3, size=80), 300, seed)
        assert found.low < found.value < found.high
        inside += found.low <= true_mean <= found.high
    assert stats.binomtest(inside, 150, 0.95).pvalue > 1e-4
    assert inside >= 130


@pytest.mark.parametrize("n", [2, 12, 99])
def test_mean_interval_of_few_is_students_t(n):
    sample = np.random.default_rng(n).beta(2, 3, size=n)
    found = mean_interval(sample, 300, 0)
    low, high = stats.ttest_1samp(sample, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-12)


def test_one_prompt_has_no_interval():
    found = mean_interval(np.array([0.3]), 100, 0)
    assert found.value == 0.3 and math.isnan(found.low) and math.isnan(found.high)


@pytest.mark.parametrize("sample", [[0.3, 0.3, 0.3], [0.1] * 10])
def test_mean_interval_without_spread_is_the_point(sample):
    found = mean_interval(np.array(sample), 100, 0)
    assert (found.low, found.high) == (found.value, found.value)
    assert found.value == pytest.approx(sample[0])


@pytest.mark.parametrize("sample", [[0.0, 1.0], [0.0, 0.0, 1.0], [0.0] * 30 + [1.0], [1.0] * 99 + [0.999]])
def test_mean_interval_is_finite_on_nearly_constant_samples(sample):
    found = mean_interval(np.array(sample), 500, 0)
    assert np.isfinite([found.low, found.high]).all()
    assert found.low <= found.value <= found.high
    if len(sample) >= 100:  # a bootstrap stays among what it saw; Student's t does not
        assert min(sample) <= found.low and found.high <= max(sample)
