"""Intervals of rates against what they promise: by enumeration, against formulas written apart, against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from grpo_safe.algorithm.rates import holm, mcnemar, newcombe, rate, rate_at_least, rate_at_most, rate_difference, tango

Z = 1.959963984540054


def events(k: int, n: int) -> np.ndarray:
    return np.arange(n) < k


def table(both: int, only_before: int, only_after: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    before = np.repeat([1, 1, 0, 0], [both, only_before, only_after, neither])
    after = np.repeat([1, 0, 1, 0], [both, only_before, only_after, neither])
    return before, after


# --- one rate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    [(0, 40, 0.0, 1 - 0.025 ** (1 / 40)), (40, 40, 0.025 ** (1 / 40), 1.0), (0, 14, 0.0, 1 - 0.025 ** (1 / 14))],
)
def test_ends_by_hand(k: int, n: int, low: float, high: float) -> None:
    found = rate(events(k, n))
    assert (found.value, found.low, found.high) == pytest.approx((k / n, low, high), abs=1e-9)


def test_interval_is_the_betas_quantiles() -> None:
    found = rate(events(3, 20))
    assert found.low == pytest.approx(stats.beta.ppf(0.025, 3, 18)) and found.high == pytest.approx(stats.beta.ppf(0.975, 4, 17))


@pytest.mark.parametrize("n", [14, 40, 250])
def test_coverage_by_enumeration_is_never_below_nominal(n: int) -> None:
    intervals = [rate(events(k, n)) for k in range(n + 1)]
    upper = np.array([rate_at_most(events(k, n), 0.9) for k in range(n + 1)])
    lower = np.array([rate_at_least(events(k, n), 0.9) for k in range(n + 1)])
    low, high = np.array([i.low for i in intervals]), np.array([i.high for i in intervals])
    ends = np.concatenate([low, high, upper, lower])
    truths = np.unique(
        np.clip(np.concatenate([np.linspace(0, 1, 401), ends - 1e-9, ends + 1e-9]), 0, 1)
    )  # coverage jumps at the ends
    for p in truths:
        chance = stats.binom.pmf(np.arange(n + 1), n, p)
        assert chance[(low <= p) & (p <= high)].sum() >= 0.95 - 1e-9
        assert chance[p <= upper].sum() >= 0.9 - 1e-9
        assert chance[p >= lower].sum() >= 0.9 - 1e-9


@pytest.mark.parametrize(("n", "delta"), [(45, 0.1), (55, 6 * 0.1 / math.pi**2), (145, 6 * 0.1 / (math.pi**2 * 100))])
def test_how_many_prompts_without_an_event_show_at_most_five_percent(n: int, delta: float) -> None:
    """One look at delta .1 needs 45; the first of many looks 55, the tenth 145 (delta_j = 6 delta / (pi^2 j^2))."""
    assert rate_at_most(events(0, n), 1 - delta) <= 0.05 < rate_at_most(events(0, n - 1), 1 - delta)


def test_no_prompts_say_nothing() -> None:
    assert (
        math.isnan(rate(events(0, 0)).value)
        and rate_at_most(events(0, 0), 0.9) == 1.0
        and rate_at_least(events(0, 0), 0.9) == 0.0
    )


# --- two rates --------------------------------------------------------------------------------------------------------


def newcombe_by_hand(both: int, only_before: int, only_after: int, neither: int) -> tuple[float, float]:
    """Method 10 for after - before, in the cells' words of the paper: a both, b first only, c second only, d neither."""
    a, b, c, d = both, only_after, only_before, neither
    n, z = a + b + c + d, Z

    def limits(x: int) -> tuple[float, float]:
        root = z * math.sqrt(z**2 + 4 * x * (1 - x / n))
        return (2 * x + z**2 - root) / (2 * (n + z**2)), (2 * x + z**2 + root) / (2 * (n + z**2))

    l1, u1 = limits(a + b)
    l2, u2 = limits(a + c)
    p1, p2 = (a + b) / n, (a + c) / n
    numerator = a * d - b * c
    if numerator > n / 2:
        numerator -= n / 2
    elif numerator >= 0:
        numerator = 0
    square = (a + b) * (c + d) * (a + c) * (b + d)
    phi = numerator / math.sqrt(square) if square else 0.0
    d1, e1, d2, e2 = p1 - l1, u1 - p1, p2 - l2, u2 - p2
    delta = math.sqrt(d1**2 - 2 * phi * d1 * e2 + e2**2)
    epsilon = math.sqrt(e1**2 - 2 * phi * e1 * d2 + d2**2)
    return p1 - p2 - delta, p1 - p2 + epsilon


CELLS = [
    (36, 2, 12, 0),
    (0, 0, 0, 40),
    (40, 0, 0, 0),
    (0, 5, 0, 20),
    (10, 3, 9, 30),
    (1, 0, 0, 13),
    (5, 20, 20, 5),
    (0, 20, 20, 0),
]


@pytest.mark.parametrize("cells", CELLS)
def test_newcombes_limits_equal_the_formula(cells: tuple[int, int, int, int]) -> None:
    both, only_before, only_after, neither = cells
    low, high = newcombe_by_hand(*cells)
    assert newcombe(both, only_after, only_before, neither, Z) == pytest.approx((max(-1.0, low), min(1.0, high)), abs=1e-9)


@pytest.mark.parametrize("cells", CELLS)
def test_tangos_limits_are_where_the_restricted_likelihoods_score_is_z(cells: tuple[int, int, int, int]) -> None:
    """The share lost is found by maximizing the likelihood on a grid, not by the formula."""
    _, lost, gained, _ = cells
    n = sum(cells)
    for sign, limit in zip((1, -1), tango(gained, lost, n, Z), strict=True):
        if abs(limit) == 1.0:
            continue
        grid = np.linspace(max(0.0, -limit), (1 - limit) / 2, 400_001)[1:-1]
        with np.errstate(divide="ignore"):
            likelihood = gained * np.log(grid + limit) + lost * np.log(grid) + (n - gained - lost) * np.log1p(-2 * grid - limit)
        share = grid[np.argmax(likelihood)]
        score = (gained - lost - n * limit) / math.sqrt(n * (2 * share + limit * (1 - limit)))
        assert score == pytest.approx(sign * Z, abs=2e-2)


@pytest.mark.parametrize("cells", CELLS)
def test_paired_difference_is_the_wider_of_both_and_turns_round(cells: tuple[int, int, int, int]) -> None:
    both, lost, gained, neither = cells
    found = rate_difference(*table(*cells))
    pairs = [newcombe(both, gained, lost, neither, Z), tango(gained, lost, sum(cells), Z)]
    assert found.value == pytest.approx((gained - lost) / sum(cells))
    assert (found.low, found.high) == pytest.approx((min(p[0] for p in pairs), max(p[1] for p in pairs)), abs=1e-9)
    back = rate_difference(*reversed(table(*cells)))
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-6)


@pytest.mark.parametrize("cells", [(0, 0, 0, 14), (14, 0, 0, 0), (7, 0, 0, 7)])
def test_no_discordant_prompt_is_no_certainty(cells: tuple[int, int, int, int]) -> None:
    found = rate_difference(*table(*cells))
    assert found.low < -0.02 and found.high > 0.02


SETTINGS = [
    (0.0, 0.0, 0.3), (0.1, 0.05, 0.05), (0.3, 0.1, 0.3), (0.02, 0.02, 0.1), (0.5, 0.0, 0.1), (0.3, 0.0, 0.02), (0.05, 0.3, 0.0), (0.8, 0.02, 0.1),
]  # fmt: skip


@pytest.mark.parametrize(("both", "only_before", "only_after"), SETTINGS)
@pytest.mark.parametrize("n", [14, 30, 40, 60, 250])
def test_coverage_of_the_paired_interval_by_simulation(n: int, both: float, only_before: float, only_after: float) -> None:
    """Not exact by construction, so: refused where a one-sided test at .01 / 40 finds it below .95."""
    rng = np.random.default_rng(7)
    runs, truth = 2000, only_after - only_before
    drawn = rng.multinomial(n, [both, only_before, only_after, 1 - both - only_before - only_after], size=runs)
    seen: dict[tuple[int, ...], bool] = {}
    for cells in {tuple(map(int, row)) for row in drawn}:
        found = rate_difference(*table(*cells))
        seen[cells] = found.low <= truth <= found.high
    covered = sum(seen[tuple(map(int, row))] for row in drawn)
    print(f"n={n} cells {both, only_before, only_after}: {covered / runs:.3f}")
    assert stats.binomtest(covered, runs, 0.95, alternative="less").pvalue > 0.01 / 40


@pytest.mark.parametrize("cells", CELLS)
def test_mcnemar_is_a_sum_over_a_fair_coin(cells: tuple[int, int, int, int]) -> None:
    m, k = cells[1] + cells[2], min(cells[1], cells[2])
    tail = sum(math.comb(m, i) for i in range(k + 1)) / 2**m
    assert mcnemar(*table(*cells)) == pytest.approx(min(1.0, 2 * tail) if cells[1] != cells[2] else 1.0)


# --- many tests -------------------------------------------------------------------------------------------------------


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6]) == [1.0, 1.0] and holm([]) == [] and holm([0.2]) == [0.2]


@pytest.mark.parametrize("seed", range(20))
def test_holm_rejects_what_the_steps_reject(seed: int) -> None:
    """Stepping down: the smallest against alpha / m, the next against alpha / (m - 1), until one stays."""
    rng = np.random.default_rng(seed)
    p = rng.random(7) ** 3
    for alpha in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, place in enumerate(np.argsort(p)):
            if p[place] > alpha / (7 - rank):
                break
            rejected.add(int(place))
        assert {i for i, q in enumerate(holm(p.tolist())) if q <= alpha} == rejected
