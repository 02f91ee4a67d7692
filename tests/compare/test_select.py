"""Filters, order and groups of a leaderboard, and the choice of metric, baseline, budget and target."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from stbench.compare.blocks import View, blocks
from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.question import Amount, Question, parse_amount, parse_target
from stbench.compare.select import SortKey, parse_where, require_baseline, select_rows, sort_rows
from stbench.core.errors import UserError
from stbench.runs.records import RunRecord
from tests.fake_runs import make_entry, make_record, make_seeds


def some_records(**changes: Any) -> list[RunRecord]:
    records = make_seeds("vanilla", [1.0, 1.02, 0.99], changes=changes)
    records += make_seeds("a", [0.5, 0.52, 0.49], changes=changes, options={"weight": 2.0})
    records += make_seeds("b", [2.0, 2.05, 1.99], changes=changes, teacher=400)
    return records


@pytest.fixture(scope="module")
def leaderboard() -> Leaderboard:
    """Three rows in each of two settings."""
    dit = {"name": "dit", "size": "ti/2", "options": {}}
    records = some_records() + some_records(backbone=dit, setting_hash="second", objective="iddpm")
    return build_leaderboard(records, [make_entry("waiting")])


def shown(leaderboard: Leaderboard, *conditions: str) -> list[list[str]]:
    tables = select_rows(leaderboard, parse_where(conditions)).tables
    return [[row.recipe for row in (*table.rows, *table.absent)] for table in tables]


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ((), [["vanilla", "a (weight=2.0)", "b"]] * 2),
        (("recipe=a",), [["vanilla", "a (weight=2.0)"]] * 2),
        (("recipe=a (weight=2.0)", "backbone=sit*"), [["vanilla", "a (weight=2.0)"]]),
        (("recipe=b,a", "objective=iddpm"), [["vanilla", "a (weight=2.0)", "b"]]),
        (("recipe=a", "recipe=b"), [["vanilla", "a (weight=2.0)", "b"]] * 2),
        (("recipe.weight=2",), [["vanilla", "a (weight=2.0)"]] * 2),
        (("train.lr=2e-3", "recipe=b", "setting=second"), [["vanilla", "b"]]),
        (("recipe=wait*",), [["vanilla", "waiting"]]),
    ],
)
def test_where(leaderboard: Leaderboard, conditions: tuple[str, ...], expected: list[list[str]]) -> None:
    found = [[name for name in names if name != "waiting" or "recipe=wait*" in conditions]
             for names in shown(leaderboard, *conditions)]  # fmt: skip
    assert sorted(found) == sorted(expected)


def test_a_comma_in_the_name_of_a_row_separates_no_patterns() -> None:
    where = parse_where(["recipe=repa (block=1, weight=0.5),sra"])
    assert where == {"recipe": ["repa (block=1, weight=0.5)", "sra"]}


def test_filters_change_no_number(leaderboard: Leaderboard) -> None:
    """Holm's correction still covers the hidden row."""
    (row,) = [row for row in leaderboard.tables[0].rows if row.recipe.startswith("a")]
    selected = select_rows(leaderboard, {"recipe": ["a"]})
    assert row in selected.tables[0].rows
    assert selected.tables[0].student_images == leaderboard.tables[0].student_images


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("recipe", "must be FIELD=PATTERN"),
        ("colour=red", "colour: no such field; choose one of dataset"),
        ("train.lrr=1", "train.precision, train.lr"),
        ("recipe=zzz", r"no row matches --where; the rows are vanilla; a \(weight=2.0\)"),
    ],
)
def test_a_wrong_filter_is_one_line(leaderboard: Leaderboard, condition: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        select_rows(leaderboard, parse_where([condition]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "order"),
    [
        ("recipe", "a vanilla b"),
        ("metric", "a vanilla b"),
        ("ratio", "a vanilla b"),
        ("speed-up", "a vanilla b"),
        ("cost", "a vanilla b"),
    ],
)
def test_sort(leaderboard: Leaderboard, key: SortKey, order: str) -> None:
    expected = order.split() if key != "recipe" else ["a", "b", "vanilla"]
    for table in sort_rows(leaderboard, key, Question()).tables:
        assert [row.recipe.split(" ")[0] for row in table.rows] == expected


def test_groups_by_recipe_have_a_row_per_setting(leaderboard: Leaderboard) -> None:
    parts = [block for block in blocks(leaderboard, view=View(group_by="recipe")) if block.sections]
    assert [part.heading for part in parts] == ["recipe vanilla", "recipe a (weight=2.0)", "recipe b"]
    assert [row[0] for row in parts[1].sections[0].rows] == ["dit-ti/2 iddpm", "sit-ti/2 linear"]


def test_groups_by_data_set_name_the_setting_of_a_row(leaderboard: Leaderboard) -> None:
    view = View(group_by="dataset", sort="ratio")
    (part,) = [block for block in blocks(leaderboard, view=view) if block.sections]
    rows = [row[0] for row in part.sections[0].rows]
    assert part.heading == "dataset digits" and len(rows) == 6
    assert rows[:2] == ["dit-ti/2 iddpm a", "sit-ti/2 linear a"] and rows[-1] == "sit-ti/2 linear b"


def with_kid(record: RunRecord) -> RunRecord:
    curve = []
    for point in record.curve:
        fid = point.metrics["fid"]
        curve.append(replace(point, metrics={**point.metrics, "kid": fid / 10, "accuracy": 0.1 / fid}))
    return replace(record, curve=curve)


def test_another_metric_takes_the_place_of_fid() -> None:
    records = list(map(with_kid, some_records()))
    (fid,) = build_leaderboard(records).tables
    (kid,) = build_leaderboard(records, question=Question(metric="kid")).tables
    for one, other in zip(fid.rows, kid.rows, strict=True):
        assert one.student.value is not None and other.student.value is not None
        assert other.student.value.mean == pytest.approx(one.student.value.mean / 10)
        assert other.student.plain.ratio == pytest.approx(one.student.plain.ratio)
    assert "KID" in blocks(Leaderboard((kid,), ()))[0].sections[0].header


def test_higher_is_better_for_accuracy() -> None:
    records = list(map(with_kid, some_records()))
    (table,) = build_leaderboard(records, question=Question(metric="accuracy")).tables
    _, good, bad = table.rows
    assert (good.recipe, bad.recipe) == ("a (weight=2.0)", "b")
    assert good.student.plain.ratio == pytest.approx(2, rel=0.02) and good.student.plain.verdict == "better"
    assert bad.student.plain.verdict == "worse"
    assert good.student.reach is not None and good.student.reach.speedup_student is not None
    fid_reach = build_leaderboard(records).tables[0].rows[1].student.reach
    assert fid_reach is not None and fid_reach.speedup_student is not None
    assert good.student.reach.speedup_student == pytest.approx(fid_reach.speedup_student, rel=1e-3)


def test_values_without_logarithm_are_not_tested() -> None:
    records = [replace(r, curve=[replace(p, metrics={**p.metrics, "kid": -0.01}) for p in r.curve])
               for r in some_records()]  # fmt: skip
    (table,) = build_leaderboard(records, question=Question(metric="kid")).tables
    verdicts = {row.student.plain.verdict for row in table.rows}
    assert verdicts == {"baseline", "no finite KID"}


def test_an_unknown_metric_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="--metric kidd: .* choose one of fid, is"):
        build_leaderboard(some_records(), question=Question(metric="kidd"))
    with pytest.raises(UserError, match="nn_distance"):
        Question(metric="nn_distance")


def test_another_baseline() -> None:
    question = Question(baseline="a")
    found = build_leaderboard(some_records(), question=question)
    (table,) = found.tables
    require_baseline(found, question)
    assert table.baseline == "a (weight=2.0)" and table.rows[0].student.plain.verdict == "baseline"
    ratios = {row.recipe: row.student.plain.ratio for row in table.rows}
    assert ratios["vanilla"] == pytest.approx(2, rel=0.02)


def test_an_unknown_baseline_names_the_rows() -> None:
    question = Question(baseline="zzz")
    with pytest.raises(UserError, match=r"no row is named 'zzz'; choose one of a \(weight=2.0\); vanilla; b"):
        require_baseline(build_leaderboard(some_records(), question=question), question)


def test_a_baseline_with_a_teacher_pays_for_it() -> None:
    (table,) = build_leaderboard(some_records(), question=Question(baseline="b")).tables
    reach = next(row for row in table.rows if row.recipe == "vanilla").student.reach
    assert reach is not None and reach.student is not None and reach.needed == 800 * 64
    assert reach.speedup_paid == pytest.approx(1200 * 64 / reach.student)


def test_another_budget_is_interpolated() -> None:
    (table,) = build_leaderboard(some_records(), question=Question(at=Amount("images", 600 * 64))).tables
    value = table.rows[0].student.value
    assert table.student_images == 600 * 64 and table.rows[0].student.interpolated
    assert value is not None and value.values[0] == pytest.approx(2.0)  # half of the way from 4 to 1, in log


def test_a_given_target_needs_no_baseline() -> None:
    (table,) = build_leaderboard(make_seeds("a", [1.0] * 3), question=Question(target=2.0)).tables
    reach = table.rows[0].student.reach
    assert reach is not None and reach.student == pytest.approx(600 * 64)
    assert (reach.speedup_student, reach.needed) == (None, None)
    assert reach.flops_student == pytest.approx(600e12) and reach.seconds_student == pytest.approx(600 / 16)


def test_costs_at_a_target_include_earlier_stages() -> None:
    (table,) = build_leaderboard(some_records(), question=Question(target=4.0)).tables
    reach = next(row for row in table.rows if row.recipe == "b").student.reach
    assert reach is not None
    assert (reach.student, reach.paid) == (400 * 64, 800 * 64)
    assert (reach.flops_student, reach.flops_paid) == (400e12, 800e12)
    assert (reach.seconds_student, reach.seconds_paid) == (25.0, 50.0)


def test_an_equal_cost_is_other_images_for_every_row() -> None:
    """16 steps of 64 images take a second and 16 TFLOP; `slow` takes twice as long. FID is 4 at step 400."""
    slow = make_record("slow", 0, [16.0, 4.0, 1.0])
    slow = replace(slow, curve=[replace(p, seconds=2 * p.seconds) for p in slow.curve])
    records = [make_record("vanilla", 0, [16.0, 4.0, 1.0]), slow]
    records.append(make_record("taught", 0, [16.0, 4.0, 1.0], teacher=200))
    (table,) = build_leaderboard(records, question=Question(at=Amount("seconds", 25.0))).tables
    rows = {row.recipe: row for row in table.rows}
    assert (table.student_images, table.paid_images) == (25_600, 25_600)
    assert {name: row.student.images for name, row in rows.items()} == {
        "vanilla": 25_600, "slow": 12_800, "taught": 25_600
    }  # fmt: skip
    assert {name: row.paid.images for name, row in rows.items()} == {
        "vanilla": 25_600, "slow": 12_800, "taught": 12_800
    }  # fmt: skip
    assert rows["slow"].student.plain.ratio == pytest.approx(4.0)
    assert rows["taught"].paid.plain.ratio == pytest.approx(4.0)

    (table,) = build_leaderboard(records, question=Question(at=Amount("flops", 600e12))).tables
    assert [row.student.images for row in table.rows] == [600 * 64] * 3
    assert all(row.student.interpolated for row in table.rows)


def test_a_cost_that_a_row_does_not_reach_names_the_steps() -> None:
    records = [
        make_record("vanilla", 0, [16.0, 4.0, 1.0]),
        make_record("taught", 0, [16.0], steps=[200], teacher=400),
    ]
    (table,) = build_leaderboard(records, question=Question(at=Amount("seconds", 20.0))).tables
    rows = {row.recipe: row for row in table.rows}
    assert rows["taught"].student.plain.verdict == "not trained that far"
    assert rows["taught"].paid.plain.verdict == "paid more already"
    assert any("train with --steps 320" in note for note in table.notes)


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("51200", "images", 51200),
        ("51.2k", "images", 51200),
        ("1.28M", "images", 1280000),
        ("2.5h", "seconds", 9000),
        ("30 min", "seconds", 1800),
        ("3EFLOP", "flops", 3e18),
        ("1.5 PFLOPs", "flops", 1.5e15),
        ("2e20FLOP", "flops", 2e20),
    ],
)
def test_amounts_of_training(text: str, unit: str, value: float) -> None:
    assert parse_amount(text) == Amount(unit, pytest.approx(value))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-5",
        "k",
        "nan",
        "inf",
        "1e400",
        "1_000",
        "5x",
        "5 K",
        "0h",
        "1e999h",
        "h",
        "FLOP",
        "1..2",
        "\u0665",
    ],
)
def test_wrong_numbers_are_one_line(text: str) -> None:
    with pytest.raises(UserError, match="--at must be a positive number of images"):
        parse_amount(text)
    with pytest.raises(UserError, match="--target must be a positive number or 'baseline'"):
        parse_target(text if text != "1e400" else "inf")


def test_targets() -> None:
    assert parse_target("baseline") is None and parse_target("2.5") == 2.5
