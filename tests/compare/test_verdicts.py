"""Ratios, tests, verdicts and images to target, against values computed by hand."""

from __future__ import annotations

import math

import pytest

from stbench.compare.stats import student_p
from tests.fake_runs import LONG_STEPS, make_record, make_seeds
from tests.leaderboards import only_row, only_table

# Log ratios with mean -1 and t = -5: p is 0.038 for one tested row and 0.075 for two.
LOG_RATIOS = [-1 - math.sqrt(3) / 5, -1.0, -1 + math.sqrt(3) / 5]


@pytest.mark.parametrize(
    ("last_fids", "verdict"),
    [
        ([0.50, 0.52, 0.49], "better"),
        ([2.0, 2.1, 1.9], "worse"),
        ([0.9, 1.2, 1.0], "not distinguishable"),
        ([0.5, 0.5], "too few seeds"),
    ],
)
def test_verdict(last_fids: list[float], verdict: str) -> None:
    records = make_seeds("vanilla", [1.0, 1.02, 0.99]) + make_seeds("taught", last_fids)
    assert only_row(records, "taught").student.plain.verdict == verdict


def test_p_is_that_of_paired_log_ratios() -> None:
    e = math.e
    records = make_seeds("vanilla", [1.0, 2.0, 0.5]) + make_seeds("taught", [e, 2 * e**2, 0.5 * e**3])
    taught = only_row(records, "taught").student.plain
    t = 2 * math.sqrt(3)  # of the log ratios 1, 2, 3
    assert taught.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert taught.ratio == pytest.approx(e**2)


def test_the_interval_contains_the_ratio_and_excludes_one_if_the_test_rejects() -> None:
    records = make_seeds("vanilla", [1.0, 1.1, 0.9]) + make_seeds("fast", [0.5, 0.57, 0.44])
    comparison = only_row(records, "fast").student.plain
    assert comparison.interval is not None and comparison.ratio is not None
    assert comparison.interval[0] < comparison.ratio < comparison.interval[1] < 1.0
    assert comparison.verdict == "better"


def test_holm_correction_covers_the_rows_of_a_table() -> None:
    vanilla = make_seeds("vanilla", [1.0] * 3)
    taught = make_seeds("taught", [math.exp(x) for x in LOG_RATIOS])
    other = make_seeds("other", [math.exp(x) for x in LOG_RATIOS])
    alone = only_row(vanilla + taught, "taught").student.plain
    assert (alone.p, alone.verdict) == (pytest.approx(student_p(5, 2)), "better")
    one_of_two = only_row(vanilla + taught + other, "taught").student.plain
    assert (one_of_two.p, one_of_two.verdict) == (pytest.approx(2 * student_p(5, 2)), "not distinguishable")


def test_only_common_seeds_are_paired() -> None:
    records = make_seeds("vanilla", [1.0, 1.0]) + make_seeds("taught", [0.5, 0.5, 4.0])
    taught = only_row(records, "taught").student
    assert taught.plain.ratio == pytest.approx(0.5)
    assert taught.value is not None and taught.value.values == (0.5, 0.5, 4.0)
    note = "taught: no vanilla run with seed 2; included in the means, not in ratio and verdict"
    assert note in only_table(records).notes


def test_without_vanilla_there_is_no_baseline() -> None:
    records = make_seeds("taught", [0.5]) + make_seeds("vanilla (altered)", [1.0])
    assert {row.student.plain.verdict for row in only_table(records).rows} == {"no baseline"}


def test_after_a_failed_baseline_seed_there_are_no_verdicts() -> None:
    records = make_seeds("vanilla", [1.0, 1.1, 0.9]) + make_seeds("fast", [0.5, 0.57, 0.44, 0.5])
    records.append(make_record("vanilla", 3, [16.0], status="failed"))
    assert only_row(records, "fast").student.plain.verdict == "a seed failed"


def test_the_guided_test_compares_each_side_at_its_own_best() -> None:
    """Vanilla is best at 1.5, taught at 2; the log ratios there are 1, 2, 3."""
    records = []
    for seed, vanilla_fid in enumerate([1.0, 2.0, 0.5]):
        taught_fid = vanilla_fid * math.exp(seed + 1)
        records.append(make_record("vanilla", seed, [16, 4, 8], guided={1.5: vanilla_fid, 2.0: 3.0}))
        records.append(make_record("taught", seed, [16, 4, 60], guided={1.5: 99.0, 2.0: taught_fid}))
    taught, vanilla = only_row(records, "taught").student, only_row(records, "vanilla").student
    assert taught.guided is not None and vanilla.guided is not None
    assert (taught.guided.scale, vanilla.guided.scale) == (2.0, 1.5)
    t = 2 * math.sqrt(3)
    assert taught.best.ratio == pytest.approx(math.e**2)
    assert taught.best.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert taught.best.verdict == "not distinguishable"
    assert taught.plain.ratio == pytest.approx(60 / 8) and vanilla.best.verdict == "baseline"


def test_each_column_of_tests_is_corrected_separately() -> None:
    """Two rows are tested without guidance and one with it: only the first p-value is doubled."""
    records = []
    for seed, x in enumerate(LOG_RATIOS):
        f = math.exp(x)
        records.append(make_record("vanilla", seed, [16, 4, 1.0], guided={1.5: 0.5, 2.0: 0.75}))
        records.append(make_record("taught", seed, [16, 4, f], guided={1.5: 0.5 * f, 2.0: 0.75}))
        records.append(make_record("other", seed, [16, 4, f]))
    taught, other = only_row(records, "taught").student, only_row(records, "other").student
    assert taught.plain.p == other.plain.p == pytest.approx(2 * student_p(5, 2))
    assert taught.best.p == pytest.approx(student_p(5, 2))
    assert (taught.plain.verdict, taught.best.verdict) == ("not distinguishable", "better")
    assert (other.best.p, other.best.verdict) == (None, "not sampled")


def test_guidance_is_compared_at_both_budgets() -> None:
    """Vanilla is sampled at 800 and at 1600 steps, one for each budget."""
    records = []
    for seed in range(3):
        early, late = {800: {1.5: 0.8}}, {1.5: 0.1}
        fids = [16, 4, 1, 0.25]
        records.append(make_record("vanilla", seed, fids, steps=LONG_STEPS, guided=late, guided_at=early))
        records.append(make_record("taught", seed, [16, 4, 0.9], teacher=800, guided={1.5: 0.4}))
    taught = only_row(records, "taught")
    assert taught.student.best.ratio == pytest.approx(0.5)
    assert taught.paid.best.ratio == pytest.approx(4.0)
    assert (taught.student.best.verdict, taught.paid.best.verdict) == ("better", "worse")


def test_a_baseline_without_guided_samples_is_the_verdict() -> None:
    records = make_seeds("vanilla", [1.0])
    records.append(make_record("taught", 0, [16, 4, 0.9], guided={1.5: 0.4}))
    assert only_row(records, "taught").student.best.verdict == "vanilla not sampled"


def test_images_to_target_by_hand() -> None:
    records = make_seeds("vanilla", [1.0, 1.0]) + make_seeds("fast", [0.25, 0.5])
    reach = only_row(records, "fast").student.reach
    assert reach is not None
    # Target 1.0. In log FID from 4 at 400 steps: half of the way to 0.25, two thirds of the way to 0.5.
    expected = 64 * (400 + 400 * (1 / 2 + 2 / 3) / 2)
    assert reach.target == 1.0
    assert reach.student == pytest.approx(expected)
    assert reach.speedup_student == pytest.approx(64 * 800 / expected)


def test_a_seed_below_the_target_at_its_first_point_gives_a_bound() -> None:
    records = make_seeds("vanilla", [1.0, 1.0]) + make_seeds("fast", [0.25])
    assert (reach := only_row(records, "fast").student.reach) is not None and not reach.bound
    records.append(make_record("fast", 1, [0.5, 0.4, 0.3]))
    assert (reach := only_row(records, "fast").student.reach) is not None and reach.bound


def test_a_seed_that_never_reaches_the_target_leaves_no_mean() -> None:
    records = make_seeds("vanilla", [1.0, 1.0]) + make_seeds("slow", [0.5, 1.01])
    reach = only_row(records, "slow").student.reach
    assert reach is not None
    assert (reach.student, reach.paid, reach.arrived, reach.limit) == (None, None, 1, 51200)
    assert (reach.speedup_student, reach.speedup_paid) == (None, None)


def test_the_baseline_needs_its_own_budget() -> None:
    reach = only_row(make_seeds("vanilla", [0.9, 1.1]), "vanilla").student.reach
    assert reach is not None and (reach.student, reach.speedup_student) == (51200, 1.0)
    assert (reach.paid, reach.speedup_paid) == (51200, 1.0)
