"""Statistics against values computed by hand, printed tables and scipy."""

from __future__ import annotations

import math
import random

import pytest

from stbench.compare.stats import (
    BOOTSTRAP_SEEDS,
    _resamples,
    crossing,
    deviation,
    holm,
    mean,
    paired_interval,
    paired_p,
    seed_stats,
    student_p,
    student_quantile,
    value_at,
)


def test_crossing_is_linear_in_log_fid() -> None:
    assert crossing([100, 300], [8.0, 2.0], 4.0) == pytest.approx(200)


def test_crossing_is_the_first_one() -> None:
    assert crossing([100, 200, 300, 400], [8.0, 2.0, 8.0, 2.0], 4.0) == pytest.approx(150)


def test_crossing_is_not_extrapolated() -> None:
    assert crossing([100, 200], [8.0, 4.1], 4.0) is None
    assert crossing([100, 200], [3.0, 2.0], 4.0) == 100
    assert crossing([100, 200], [math.nan, math.nan], 4.0) is None


def test_crossing_after_a_diverged_point_is_the_next_point() -> None:
    assert crossing([100, 200, 300], [8.0, math.nan, 2.0], 4.0) == 300


def test_value_between_points_is_linear_in_log_fid() -> None:
    assert value_at([100, 300], [8.0, 2.0], 200) == pytest.approx(4.0)
    assert value_at([100, 300], [8.0, 2.0], 300) == 2.0
    assert value_at([100, 300], [8.0, 2.0], 301) is None
    assert value_at([100, 300], [8.0, 2.0], 99) is None


@pytest.mark.parametrize(
    ("t", "dof", "p"),
    [
        (12.706, 1, 0.05),
        (4.30265, 2, 0.05),
        (3.18245, 3, 0.05),
        (2.77645, 4, 0.05),
        (9.92484, 2, 0.01),
        (0, 5, 1),
    ],
)
def test_student_p_equals_printed_tables(t: float, dof: int, p: float) -> None:
    assert student_p(t, dof) == pytest.approx(p, rel=1e-4)
    assert student_p(-t, dof) == pytest.approx(p, rel=1e-4)


def test_student_p_equals_scipy() -> None:
    from scipy.special import stdtr

    for dof in range(1, 12):
        for t in (0.3, 1.7, 4.3, 15.3):
            assert student_p(t, dof) == pytest.approx(2 * stdtr(dof, -t), abs=1e-13)


def test_paired_p_by_hand() -> None:
    # mean 2, standard deviation 1, so t = 2 sqrt(3) with 2 degrees of freedom: p = 1 - t / sqrt(t^2 + 2)
    t = 2 * math.sqrt(3)
    assert paired_p([1.0, 2.0, 3.0]) == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert paired_p([1.0, 1.0]) == 0
    assert paired_p([0.0, 0.0, 0.0]) == 1


def test_paired_interval_by_hand() -> None:
    # mean 2, standard deviation 1, t = 4.30265 for 2 degrees of freedom
    half = 4.30265 / math.sqrt(3)
    assert paired_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), rel=1e-5)
    assert paired_interval([1.0, 1.0]) == (1.0, 1.0)


def test_from_ten_differences_the_interval_is_that_of_bootstrap_t() -> None:
    """By hand over all resamples that are drawn; Student's interval is another one."""
    values = [math.log(1.0 + i) for i in range(BOOTSTRAP_SEEDS)]
    n, centre, error = len(values), mean(values), deviation(values) / math.sqrt(len(values))
    t = []
    for positions in _resamples(n):
        drawn = [values[i] for i in positions]
        t.append((mean(drawn) - centre) / (deviation(drawn) / math.sqrt(n)))
    t.sort()
    assert len(t) == 2000
    # The quantile 0.025 of 2,000 values lies at position 49.975, that of 0.975 at 1949.025
    low, high = t[49] + 0.975 * (t[50] - t[49]), t[1949] + 0.025 * (t[1950] - t[1949])
    found = paired_interval(values)
    assert found == pytest.approx((centre - high * error, centre - low * error))
    assert paired_interval(values[::-1]) == pytest.approx(found)
    half = student_quantile(0.05, n - 1) * error
    assert found != pytest.approx((centre - half, centre + half), rel=0.01)
    assert paired_interval([0.5] * n) == (0.5, 0.5)


@pytest.mark.parametrize("skewed", [False, True])
def test_the_bootstrap_interval_contains_the_mean_as_often_as_it_says(skewed: bool) -> None:
    """In 95 % of the samples within three standard errors; of exponential ones in at least 92 %."""
    draw, trials, hits = random.Random(5), 400, 0
    for _ in range(trials):
        sample = [draw.expovariate(1.0) - 1 if skewed else draw.gauss(0, 1) for _ in range(BOOTSTRAP_SEEDS)]
        low, high = paired_interval(sample)
        hits += low <= 0 <= high
    error = math.sqrt(0.95 * 0.05 / trials)
    assert hits / trials > (0.92 if skewed else 0.95 - 3 * error)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_seed_stats_have_the_sample_standard_deviation() -> None:
    assert seed_stats([1.0, 3.0]).std == pytest.approx(math.sqrt(2))
    assert seed_stats([1.0]).std is None
