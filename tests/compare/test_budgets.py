"""The two budgets, and what each row measured there, against values computed by hand."""

from __future__ import annotations

import pytest

from tests.fake_runs import LONG_STEPS, make_record, make_seeds
from tests.leaderboards import only_row, only_table


def test_student_only_is_the_last_step_shared_by_all_rows() -> None:
    records = [make_record("vanilla", 0, [16, 4, 1, 0.25], steps=LONG_STEPS)]
    records.append(make_record("short", 0, [16, 3], steps=(200, 400)))
    assert only_table(records).student_images == 64 * 400
    assert only_row(records, "short").student.plain.ratio == pytest.approx(3 / 4)
    assert only_row(records, "vanilla").student.step == 400
    assert [point.images for point in only_row(records, "vanilla").curve] == [64 * s for s in LONG_STEPS]


def test_without_a_shared_step_the_most_common_one_is_used() -> None:
    records = [make_record("vanilla", 0, [16, 4, 1]), make_record("other", 0, [16, 4, 2])]
    records.append(make_record("between", 0, [8.0, 2.0], steps=(300, 1000)))
    records.append(make_record("early", 0, [9.0], steps=(100,)))
    assert only_table(records).student_images == 64 * 800
    between = only_row(records, "between").student
    assert between.value is not None and between.interpolated
    assert between.value.mean == pytest.approx(8 * (2 / 8) ** (500 / 700))
    assert only_row(records, "early").student.plain.verdict == "not trained that far"
    assert any("51200 images, where 2 of 4 rows" in note for note in only_table(records).notes)


def test_rows_with_one_stage_have_one_budget() -> None:
    records = make_seeds("vanilla", [1.0] * 3) + make_seeds("other", [0.5, 0.51, 0.52])
    assert only_table(records).paid_images == only_table(records).student_images == 51200
    assert only_row(records, "other").paid == only_row(records, "other").student


def test_everything_paid_counts_the_teacher() -> None:
    records = [make_record("vanilla", 0, [16, 4, 1, 0.25], steps=LONG_STEPS)]
    records += make_seeds("taught", [0.5], teacher=400)
    taught, vanilla = only_row(records, "taught"), only_row(records, "vanilla")
    assert (only_table(records).student_images, only_table(records).paid_images) == (51200, 76800)
    assert (taught.student.images, taught.paid.images, taught.earlier_images) == (51200, 51200, 25600)
    assert (vanilla.student.images, vanilla.paid.images) == (51200, 76800)

    # FID: vanilla was not evaluated at 76800 images
    assert vanilla.student.value is not None and vanilla.student.value.mean == 1.0
    assert vanilla.paid.value is not None and vanilla.paid.interpolated
    assert vanilla.paid.value.mean == pytest.approx(0.5)  # half way between 1 and 0.25, in log FID
    assert vanilla.paid.inception is None and vanilla.paid.flops_total is None
    assert taught.student.plain.ratio == 0.5 and taught.paid.plain.ratio == pytest.approx(1.0)
    note = "everything paid: FID marked ~ is interpolated between two evaluations: vanilla"
    assert note in only_table(records).notes

    # Images to target
    reach = taught.student.reach
    assert reach is not None and reach.student is not None
    assert reach.paid == pytest.approx(reach.student + 25600)
    assert reach.speedup_paid == pytest.approx(51200 / (reach.student + 25600))

    # Costs
    student = taught.student
    assert student.flops_student and student.flops_total and student.seconds_student and student.seconds_total
    assert student.flops_total.mean == student.flops_student.mean + 400e12
    assert student.seconds_total.mean == student.seconds_student.mean + 25


def test_a_longer_row_is_evaluated_at_both_budgets() -> None:
    records = make_seeds("taught", [0.5] * 3, teacher=800)
    for seed in range(3):
        records.append(make_record("vanilla", seed, [16, 4, 1, 0.25], steps=LONG_STEPS))
        records.append(make_record("other", seed, [16, 4, 2, 0.5], steps=LONG_STEPS))
    other, taught = only_row(records, "other"), only_row(records, "taught")
    assert other.student.value and other.paid.value and taught.student.value and taught.paid.value
    assert (other.student.step, other.student.value.mean) == (800, 2.0)
    assert (other.paid.step, other.paid.value.mean) == (1600, 0.5)
    assert (taught.student.value, taught.student.step) == (taught.paid.value, taught.paid.step)
    assert (other.student.plain.ratio, other.paid.plain.ratio) == (2.0, 2.0)
    assert (taught.student.plain.verdict, taught.paid.plain.verdict) == ("better", "worse")
    assert taught.paid.reach is not None and taught.student.reach is not None
    assert (taught.student.reach.target, taught.paid.reach.target) == (1.0, 0.25)


def test_a_short_row_is_noted_with_the_steps_to_train() -> None:
    records = make_seeds("vanilla", [1.0]) + make_seeds("taught", [0.5], teacher=400)
    vanilla, taught = only_row(records, "vanilla"), only_row(records, "taught")
    assert vanilla.paid.value is None and vanilla.paid.plain.verdict == "not trained that far"
    assert vanilla.paid.best.verdict == "not trained that far"
    assert taught.paid.value is not None and taught.paid.plain.verdict == "no vanilla there"
    note = "everything paid: not trained to 76800 images of the last stage: vanilla; train with --steps 1200"
    assert note in only_table(records).notes


def test_everything_paid_is_the_largest_total_that_the_baseline_reaches() -> None:
    records = [make_record("vanilla", 0, [16, 4, 1, 0.25], steps=LONG_STEPS)]
    records += make_seeds("taught", [0.5], teacher=800)
    records += make_seeds("costly", [0.1], teacher=10_000)
    assert only_table(records).paid_images == 64 * 1600
    costly = only_row(records, "costly")
    assert costly.paid.value is None and costly.paid.plain.verdict == "paid more already"
    note = "everything paid: the earlier stages alone exceed the budget: costly"
    assert note in only_table(records).notes
    assert costly.student.plain.ratio == pytest.approx(0.1)


def test_best_guidance_is_chosen_by_the_mean_over_seeds() -> None:
    scales = [{1.5: 0.1, 2.0: 0.3, 3.0: 0.9}, {1.5: 0.9, 2.0: 0.3, 3.0: 0.9}]
    records = [make_record("vanilla", seed, [16, 4, 1], guided=scales[seed]) for seed in (0, 1)]
    guided = only_row(records, "vanilla").student.guided
    assert guided is not None
    assert (guided.scale, guided.value.values, guided.edge) == (2.0, (0.3, 0.3), False)


def test_best_guidance_is_taken_from_the_shared_grid_and_its_edge_is_marked() -> None:
    records = [
        make_record("vanilla", 0, [16, 4, 1], guided={1.5: 0.6, 2.0: 0.5, 3.0: 0.1}),
        make_record("taught", 0, [16, 4, 1], guided={1.5: 1.2, 2.0: 1.3}),
    ]
    guided = [only_row(records, recipe).student.guided for recipe in ("vanilla", "taught")]
    assert [(g.scale, g.edge) for g in guided if g] == [(2.0, True), (1.0, True)]
    note = "student only: best guidance at the edge of the shared grid: taught @1*, vanilla @2*"
    assert note in only_table(records).notes


def test_rows_without_two_shared_scales_have_no_best_guidance() -> None:
    records = [
        make_record("vanilla", 0, [16, 4, 1], guided={1.5: 0.6}),
        make_record("taught", 0, [16, 4, 1], guided={2.0: 0.6}),
    ]
    assert {row.student.guided for row in only_table(records).rows} == {None}
    assert any("share fewer than two guidance scales" in note for note in only_table(records).notes)


def test_a_row_without_guided_samples_does_not_shrink_the_grid() -> None:
    records = [
        make_record("vanilla", 0, [16, 4, 1], guided={1.5: 0.6}),
        make_record("taught", 0, [16, 4, 1]),
    ]
    assert only_row(records, "taught").student.guided is None
    assert only_row(records, "taught").student.best.verdict == "not sampled"
    assert only_row(records, "vanilla").student.guided is not None
