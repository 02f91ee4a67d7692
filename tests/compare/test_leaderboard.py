"""Leaderboards against figures worked out by hand."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.compare import writers
from stbench.compare.build import leaderboard
from stbench.compare.leaderboard import Row, Table
from stbench.compare.stats import cell, crossing, holm, paired_interval, paired_p, student_p, value_at
from stbench.core.errors import UserError
from stbench.runs.records import RunRecord
from tests.fake_runs import LONG, STEPS, build, digits


def table(records: list[RunRecord]) -> Table:
    """The one table these records make."""
    (only,) = leaderboard(records).tables
    return only


def row(records: list[RunRecord], recipe: str) -> Row:
    """The one row of a recipe."""
    (only,) = [row for row in table(records).rows if row.recipe == recipe]
    return only


def values(records: list[RunRecord], recipe: str) -> tuple[float, ...]:
    """FIDs of a recipe's seeds at equal steps."""
    fid = row(records, recipe).student.fid
    assert fid is not None
    return fid.values


def seeds(root: Path, recipe: str, finals: list[float], **options: object) -> list[RunRecord]:
    """One run a seed that falls from 16 over 4 to its final FID."""
    return [build(root, recipe, seed, [16.0, 4.0, fid], **options) for seed, fid in enumerate(finals)]  # type: ignore[arg-type]


def test_crossing_is_linear_in_log_fid() -> None:
    assert crossing([100, 300], [8.0, 2.0], 4.0) == pytest.approx(200)


def test_crossing_is_the_first() -> None:
    assert crossing([100, 200, 300, 400], [8.0, 2.0, 8.0, 2.0], 4.0) == pytest.approx(150)


def test_crossing_is_never_extrapolated() -> None:
    assert crossing([100, 200], [8.0, 4.1], 4.0) is None
    assert crossing([100, 200], [3.0, 2.0], 4.0) == 100
    assert crossing([100, 200], [math.nan, math.nan], 4.0) is None


def test_value_between_points_is_log_linear() -> None:
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
def test_student_p_equals_the_printed_tables(t: float, dof: int, p: float) -> None:
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
    # mean 2, standard deviation 1, t = 4.30265 at 2 degrees of freedom
    half = 4.30265 / math.sqrt(3)
    assert paired_interval([1.0, 2.0, 3.0]) == pytest.approx((2 - half, 2 + half), rel=1e-5)
    assert paired_interval([1.0, 1.0]) == (1.0, 1.0)


def test_the_interval_of_a_ratio_holds_it_and_excludes_1_only_where_the_test_rejects(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0, 1.1, 0.9]) + seeds(tmp_path, "fast", [0.5, 0.57, 0.44])
    versus = row(records, "fast").student.plain
    assert versus.interval is not None and versus.ratio is not None
    assert versus.interval[0] < versus.ratio < versus.interval[1] < 1.0
    assert versus.verdict == "better"


def test_a_failed_baseline_seed_leaves_no_verdicts(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0, 1.1, 0.9]) + seeds(tmp_path, "fast", [0.5, 0.57, 0.44, 0.5])
    records.append(build(tmp_path, "vanilla", 3, [16.0], status="failed"))
    assert row(records, "fast").student.plain.verdict == "a seed failed"


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_cell_has_the_sample_standard_deviation() -> None:
    assert cell([1.0, 3.0]).std == pytest.approx(math.sqrt(2))
    assert cell([1.0]).std is None


def test_images_to_target_by_hand(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0, 1.0]) + seeds(tmp_path, "fast", [0.25, 0.5])
    reach = row(records, "fast").student.reach
    assert reach is not None
    # target 1.0; from 4 at 400 steps: half of the way to 0.25, two thirds of the way to 0.5
    expected = 64 * (400 + 400 * (1 / 2 + 2 / 3) / 2)
    assert reach.target == 1.0
    assert reach.student == pytest.approx(expected)
    assert reach.speedup_student == pytest.approx(64 * 800 / expected)


def test_a_seed_that_is_there_at_its_first_point_gives_a_bound(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0, 1.0]) + seeds(tmp_path, "fast", [0.25])
    assert (reach := row(records, "fast").student.reach) is not None and not reach.bound
    records.append(build(tmp_path, "fast", 1, [0.5, 0.4, 0.3]))
    assert (reach := row(records, "fast").student.reach) is not None and reach.bound
    text = writers.render(leaderboard(records), "md")
    assert "| fast | <= " in text and " | >= " in text


def test_a_seed_that_does_not_arrive_makes_the_row_beyond_budget(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0, 1.0]) + seeds(tmp_path, "slow", [0.5, 1.01])
    reach = row(records, "slow").student.reach
    assert reach is not None
    assert (reach.student, reach.paid, reach.arrived, reach.limit) == (None, None, 1, 51200)
    assert (reach.speedup_student, reach.speedup_paid) == (None, None)


def test_the_baseline_needs_its_own_budget(tmp_path: Path) -> None:
    reach = row(seeds(tmp_path, "vanilla", [0.9, 1.1]), "vanilla").student.reach
    assert reach is not None and (reach.student, reach.speedup_student) == (51200, 1.0)
    assert (reach.paid, reach.speedup_paid) == (51200, 1.0)


def test_everything_paid_counts_the_teacher(tmp_path: Path) -> None:
    records = [build(tmp_path, "vanilla", 0, [16, 4, 1, 0.25], steps=LONG)]
    records += seeds(tmp_path, "taught", [0.5], teacher=400)
    taught, vanilla = row(records, "taught"), row(records, "vanilla")
    assert (table(records).student_images, table(records).paid_images) == (51200, 76800)
    assert (taught.student.images, taught.paid.images, taught.earlier_images) == (51200, 51200, 25600)
    assert (vanilla.student.images, vanilla.paid.images) == (51200, 76800)
    assert vanilla.student.fid is not None and vanilla.student.fid.mean == 1.0
    assert vanilla.paid.fid is not None and vanilla.paid.interpolated
    assert vanilla.paid.fid.mean == pytest.approx(0.5)  # between 1 and 0.25
    assert vanilla.paid.inception is None and vanilla.paid.flops_total is None
    assert taught.student.plain.ratio == 0.5 and taught.paid.plain.ratio == pytest.approx(1.0)
    reach = taught.student.reach
    assert reach is not None and reach.student is not None
    assert reach.paid == pytest.approx(reach.student + 25600)
    assert reach.speedup_paid == pytest.approx(51200 / (reach.student + 25600))
    student = taught.student
    assert student.flops_student and student.flops_total and student.seconds_student and student.seconds_total
    assert student.flops_total.mean == student.flops_student.mean + 400e12
    assert student.seconds_total.mean == student.seconds_student.mean + 25
    assert any("FID marked ~ lies between two evaluations: vanilla" in note for note in table(records).notes)


def test_a_row_trained_on_stands_at_both_budgets(tmp_path: Path) -> None:
    records = seeds(tmp_path, "taught", [0.5] * 3, teacher=800)
    for seed in range(3):
        records.append(build(tmp_path, "vanilla", seed, [16, 4, 1, 0.25], steps=LONG))
        records.append(build(tmp_path, "other", seed, [16, 4, 2, 0.5], steps=LONG))
    other, taught = row(records, "other"), row(records, "taught")
    assert other.student.fid and other.paid.fid and taught.student.fid and taught.paid.fid
    assert (other.student.step, other.student.fid.mean) == (800, 2.0)
    assert (other.paid.step, other.paid.fid.mean) == (1600, 0.5)
    assert (taught.student.fid, taught.student.step) == (taught.paid.fid, taught.paid.step)
    assert (other.student.plain.ratio, other.paid.plain.ratio) == (2.0, 2.0)
    assert (taught.student.plain.verdict, taught.paid.plain.verdict) == ("better", "worse")
    assert taught.paid.reach is not None and taught.student.reach is not None
    assert (taught.student.reach.target, taught.paid.reach.target) == (1.0, 0.25)


def test_a_short_row_is_named_with_what_to_train(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0]) + seeds(tmp_path, "taught", [0.5], teacher=400)
    vanilla, taught = row(records, "vanilla"), row(records, "taught")
    assert vanilla.paid.fid is None and vanilla.paid.plain.verdict == "not trained that far"
    assert vanilla.paid.best.verdict == "not trained that far"
    assert taught.paid.fid is not None and taught.paid.plain.verdict == "no vanilla there"
    note = "everything paid: no point at 76800 images of the last stage: vanilla; train with --steps 1200"
    assert note in table(records).notes


def test_everything_paid_is_the_largest_sum_that_the_baseline_reaches(tmp_path: Path) -> None:
    records = [build(tmp_path, "vanilla", 0, [16, 4, 1, 0.25], steps=LONG)]
    records += seeds(tmp_path, "taught", [0.5], teacher=800)
    records += seeds(tmp_path, "costly", [0.1], teacher=10_000)
    assert table(records).paid_images == 64 * 1600
    costly = row(records, "costly")
    assert costly.paid.fid is None and costly.paid.plain.verdict == "paid more already"
    assert any(note.endswith("earlier stages alone: costly") for note in table(records).notes)
    assert costly.student.plain.ratio == pytest.approx(0.1)


def test_rows_of_one_stage_have_one_budget(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0] * 3) + seeds(tmp_path, "other", [0.5, 0.51, 0.52])
    assert table(records).paid_images == table(records).student_images == 51200
    assert row(records, "other").paid == row(records, "other").student


def test_equal_steps_are_the_last_that_all_rows_share(tmp_path: Path) -> None:
    records = [build(tmp_path, "vanilla", 0, [16, 4, 1, 0.25], steps=LONG)]
    records.append(build(tmp_path, "short", 0, [16, 3], steps=(200, 400)))
    assert table(records).student_images == 64 * 400
    assert row(records, "short").student.plain.ratio == pytest.approx(3 / 4)
    assert row(records, "vanilla").student.step == 400
    assert [point.images for point in row(records, "vanilla").curve] == [64 * step for step in LONG]


def test_without_a_common_step_most_rows_decide(tmp_path: Path) -> None:
    records = [build(tmp_path, "vanilla", 0, [16, 4, 1]), build(tmp_path, "other", 0, [16, 4, 2])]
    records.append(build(tmp_path, "between", 0, [8.0, 2.0], steps=(300, 1000)))
    records.append(build(tmp_path, "early", 0, [9.0], steps=(100,)))
    assert table(records).student_images == 64 * 800
    between = row(records, "between").student
    assert between.fid is not None and between.interpolated
    assert between.fid.mean == pytest.approx(8 * (2 / 8) ** (500 / 700))
    assert row(records, "early").student.plain.verdict == "not trained that far"
    assert any("51200 images, which 2 of 4 rows have" in note for note in table(records).notes)


def test_runs_of_other_lengths_are_other_rows(tmp_path: Path) -> None:
    records = [
        build(tmp_path, "vanilla", 0, [16, 4, 1]),
        build(tmp_path, "vanilla", 1, [16, 4], steps=(200, 400)),
    ]
    assert [row.seeds for row in table(records).rows] == [(0,), (1,)]
    assert any("baseline: the vanilla runs of 800 steps" in note for note in table(records).notes)


def test_runs_of_other_options_are_other_rows(tmp_path: Path) -> None:
    records = [
        build(tmp_path, "taught", 0, [1.0]),
        build(tmp_path, "taught", 1, [1.0], options={"mask": "released"}),
    ]
    assert {row.recipe for row in table(records).rows} == {"taught", "taught (mask=released)"}


def test_row_hash_decides_where_there_is_one(tmp_path: Path) -> None:
    same = {"row_hash": "0123abcd"}
    records = [
        build(tmp_path, "taught", seed, [1.0], options={"mask": str(seed)}, changes=same) for seed in (0, 1)
    ]
    assert [row.seeds for row in table(records).rows] == [(0, 1)]


def test_settings_and_protocols_make_their_own_tables(tmp_path: Path) -> None:
    records = [
        build(tmp_path, "vanilla", 0, [1.0]),
        build(tmp_path, "vanilla", 1, [1.0], protocol="bbbb2222"),
        build(tmp_path, "vanilla", 2, [1.0], changes={"setting_hash": "other"}),
    ]
    found = {(table.setting, table.protocol): table.rows[0].seeds for table in leaderboard(records).tables}
    assert found == {
        ("5e771a60", "aaaa1111"): (0,),
        ("5e771a60", "bbbb2222"): (1,),
        ("other", "aaaa1111"): (2,),
    }
    first = leaderboard(records).tables[0]
    assert "vanilla seed 1: left out, not evaluated under protocol aaaa1111" in first.notes


def test_seeds_are_never_dropped(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0, 2.0, 60.0])
    assert values(records, "vanilla") == (1.0, 2.0, 60.0)
    fid = row(records, "vanilla").student.fid
    assert fid is not None and fid.mean == pytest.approx(21.0)


def test_a_diverged_seed_stays_and_shows(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0] * 3) + seeds(tmp_path, "wild", [0.5, 0.5, math.nan])
    wild = row(records, "wild")
    assert wild.seeds == (0, 1, 2) and wild.student.fid is not None and math.isnan(wild.student.fid.mean)
    assert wild.student.plain.verdict == "no finite FID"


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_an_unfinished_seed_is_listed(tmp_path: Path, status: str) -> None:
    records = seeds(tmp_path, "vanilla", [1.0] * 3) + seeds(tmp_path, "taught", [0.5, 0.51, 0.52])
    records.append(build(tmp_path, "taught", 3, [16.0, 4.0], status=status))  # type: ignore[arg-type]
    assert row(records, "taught").seeds == (0, 1, 2)
    assert row(records, "taught").unfinished == (3,)
    assert any(
        "taught seed 3: " + status in note and "at step 400 of 800" in note for note in table(records).notes
    )
    assert (row(records, "taught").student.plain.verdict == "a seed failed") == (status == "failed")


def test_a_board_of_unfinished_runs_has_only_notes(tmp_path: Path) -> None:
    board = leaderboard([build(tmp_path, "vanilla", 0, [], status="running")])
    assert (
        board.tables == ()
        and "vanilla seed 0: running (or killed) before its first evaluation" in board.notes[0]
    )


def test_a_repeated_seed_counts_once(tmp_path: Path) -> None:
    records = seeds(tmp_path / "a", "vanilla", [1.0]) + seeds(tmp_path / "b", "vanilla", [3.0])
    assert values(records, "vanilla") == (1.0,)
    assert any("it repeats seed 0 of" in note for note in table(records).notes)


@pytest.mark.parametrize(
    ("finals", "verdict"),
    [([0.50, 0.52, 0.49], "better"), ([2.0, 2.1, 1.9], "worse"), ([0.9, 1.2, 1.0], "not distinguishable"),
     ([0.5, 0.5], "too few seeds")],
)  # fmt: skip
def test_verdicts(tmp_path: Path, finals: list[float], verdict: str) -> None:
    records = seeds(tmp_path, "vanilla", [1.0, 1.02, 0.99]) + seeds(tmp_path, "taught", finals)
    assert row(records, "taught").student.plain.verdict == verdict


def test_the_p_value_is_of_paired_log_ratios(tmp_path: Path) -> None:
    e = math.e
    records = seeds(tmp_path, "vanilla", [1.0, 2.0, 0.5]) + seeds(
        tmp_path, "taught", [e, 2 * e**2, 0.5 * e**3]
    )
    taught = row(records, "taught").student.plain
    t = 2 * math.sqrt(3)  # of the log ratios 1, 2, 3
    assert taught.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert taught.ratio == pytest.approx(e**2)


def test_more_rows_raise_the_bar(tmp_path: Path) -> None:
    vanilla = seeds(tmp_path, "vanilla", [1.0] * 3)
    # log ratios near -1 with t = -5: p is 0.038 alone, 0.075 beside a second such row
    logs = [-1 - math.sqrt(3) / 5, -1.0, -1 + math.sqrt(3) / 5]
    taught = seeds(tmp_path, "taught", [math.exp(x) for x in logs])
    other = seeds(tmp_path, "other", [math.exp(x) for x in logs])
    assert row(vanilla + taught, "taught").student.plain.p == pytest.approx(student_p(5, 2))
    assert row(vanilla + taught, "taught").student.plain.verdict == "better"
    assert row(vanilla + taught + other, "taught").student.plain.p == pytest.approx(2 * student_p(5, 2))
    assert row(vanilla + taught + other, "taught").student.plain.verdict == "not distinguishable"


def test_only_common_seeds_are_paired(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0, 1.0]) + seeds(tmp_path, "taught", [0.5, 0.5, 4.0])
    assert row(records, "taught").student.plain.ratio == pytest.approx(0.5)
    assert values(records, "taught") == (0.5, 0.5, 4.0)
    assert "taught: no vanilla of seed 2; in the means, not in ratio and verdict" in table(records).notes


def test_without_vanilla_there_is_no_verdict(tmp_path: Path) -> None:
    records = seeds(tmp_path, "taught", [0.5]) + seeds(tmp_path, "vanilla (altered)", [1.0])
    assert {row.student.plain.verdict for row in table(records).rows} == {"no baseline"}


def test_best_guidance_is_chosen_on_the_mean(tmp_path: Path) -> None:
    scales = [{1.5: 0.1, 2.0: 0.3, 3.0: 0.9}, {1.5: 0.9, 2.0: 0.3, 3.0: 0.9}]
    records = [build(tmp_path, "vanilla", seed, [16, 4, 1], guided=scales[seed]) for seed in (0, 1)]
    guided = row(records, "vanilla").student.guided
    assert guided is not None
    assert (guided.scale, guided.fid.values, guided.edge) == (2.0, (0.3, 0.3), False)


def test_best_guidance_keeps_to_the_common_grid_and_marks_its_edge(tmp_path: Path) -> None:
    records = [
        build(tmp_path, "vanilla", 0, [16, 4, 1], guided={1.5: 0.6, 2.0: 0.5, 3.0: 0.1}),
        build(tmp_path, "taught", 0, [16, 4, 1], guided={1.5: 1.2, 2.0: 1.3}),
    ]
    guided = [row(records, recipe).student.guided for recipe in ("vanilla", "taught")]
    assert [(g.scale, g.edge) for g in guided if g] == [(2.0, True), (1.0, True)]
    note = "equal steps: best guidance at the edge of the common grid: taught @1*, vanilla @2*"
    assert note in table(records).notes


def test_the_guided_test_is_between_each_side_s_own_best(tmp_path: Path) -> None:
    """By hand: vanilla's best is 1.5, taught's 2; the log ratios there are 1, 2, 3."""
    records = []
    for seed, theirs in enumerate([1.0, 2.0, 0.5]):
        own = theirs * math.exp(seed + 1)
        records.append(build(tmp_path, "vanilla", seed, [16, 4, 8], guided={1.5: theirs, 2.0: 3.0}))
        records.append(build(tmp_path, "taught", seed, [16, 4, 60], guided={1.5: 99.0, 2.0: own}))
    taught, vanilla = row(records, "taught").student, row(records, "vanilla").student
    assert taught.guided is not None and vanilla.guided is not None
    assert (taught.guided.scale, vanilla.guided.scale) == (2.0, 1.5)
    t = 2 * math.sqrt(3)
    assert taught.best.ratio == pytest.approx(math.e**2)
    assert taught.best.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert taught.best.verdict == "not distinguishable"
    assert taught.plain.ratio == pytest.approx(60 / 8) and vanilla.best.verdict == "baseline"


def test_each_column_of_tests_has_its_own_correction(tmp_path: Path) -> None:
    """Two rows are tested without guidance and one with it: only the first column is doubled."""
    logs = [-1 - math.sqrt(3) / 5, -1.0, -1 + math.sqrt(3) / 5]
    records = []
    for seed, x in enumerate(logs):
        f = math.exp(x)
        records.append(build(tmp_path, "vanilla", seed, [16, 4, 1.0], guided={1.5: 0.5, 2.0: 0.75}))
        records.append(build(tmp_path, "taught", seed, [16, 4, f], guided={1.5: 0.5 * f, 2.0: 0.75}))
        records.append(build(tmp_path, "other", seed, [16, 4, f]))
    taught, other = row(records, "taught").student, row(records, "other").student
    assert taught.plain.p == other.plain.p == pytest.approx(2 * student_p(5, 2))
    assert taught.best.p == pytest.approx(student_p(5, 2))
    assert (taught.plain.verdict, taught.best.verdict) == ("not distinguishable", "better")
    assert (other.best.p, other.best.verdict) == (None, "not sampled")


def test_guidance_is_compared_at_both_budgets(tmp_path: Path) -> None:
    """Vanilla is sampled at 800 and at 1600 steps; each budget compares with what it was there."""
    records = []
    for seed in range(3):
        early, late = {800: {1.5: 0.8}}, {1.5: 0.1}
        fids = [16, 4, 1, 0.25]
        records.append(build(tmp_path, "vanilla", seed, fids, steps=LONG, guided=late, guided_at=early))
        records.append(build(tmp_path, "taught", seed, [16, 4, 0.9], teacher=800, guided={1.5: 0.4}))
    taught = row(records, "taught")
    assert taught.student.best.ratio == pytest.approx(0.5)
    assert taught.paid.best.ratio == pytest.approx(4.0)
    assert (taught.student.best.verdict, taught.paid.best.verdict) == ("better", "worse")


def test_a_baseline_without_guided_samples_is_said(tmp_path: Path) -> None:
    records = seeds(tmp_path, "vanilla", [1.0])
    records.append(build(tmp_path, "taught", 0, [16, 4, 0.9], guided={1.5: 0.4}))
    assert row(records, "taught").student.best.verdict == "vanilla not sampled"


def test_rows_that_share_no_two_scales_have_no_best_guidance(tmp_path: Path) -> None:
    records = [
        build(tmp_path, "vanilla", 0, [16, 4, 1], guided={1.5: 0.6}),
        build(tmp_path, "taught", 0, [16, 4, 1], guided={2.0: 0.6}),
    ]
    assert {r.student.guided for r in table(records).rows} == {None}
    assert any("share no two scales" in note for note in table(records).notes)


def test_a_row_without_guided_samples_does_not_shrink_the_grid(tmp_path: Path) -> None:
    records = [
        build(tmp_path, "vanilla", 0, [16, 4, 1], guided={1.5: 0.6}),
        build(tmp_path, "taught", 0, [16, 4, 1]),
    ]
    assert row(records, "taught").student.guided is None
    assert row(records, "taught").student.best.verdict == "not sampled"
    assert row(records, "vanilla").student.guided is not None


def test_the_teacher_is_not_on_the_curve(tmp_path: Path) -> None:
    taught = row([build(tmp_path, "taught", 0, [16, 4, 1], teacher=600)], "taught")
    assert [point.images for point in taught.curve] == [step * 64 for step in STEPS]


def test_a_curve_without_fid_is_refused(tmp_path: Path) -> None:
    record = build(tmp_path, "vanilla", 0, [1.0])
    curve = [replace(point, metrics={"is": 5.0}) for point in record.curve]
    with pytest.raises(UserError, match="expected 'fid'"):
        leaderboard([replace(record, curve=curve)])


def test_the_order_of_the_records_does_not_matter(tmp_path: Path) -> None:
    records = digits(tmp_path)
    assert leaderboard(records[::-1]) == leaderboard(records)


HEAVY = {"torch", "mmengine", "matplotlib", "scipy", "numpy", "pydantic", "rich"}


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, stbench.compare, stbench.report, stbench.results; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())
