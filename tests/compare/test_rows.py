"""Which runs share a row, which rows share a table, and which runs are excluded."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.compare.build import build_leaderboard
from stbench.core.errors import UserError
from stbench.runs.records import RunRecord
from tests.fake_runs import STEPS, make_record, make_seeds
from tests.leaderboards import only_row, only_table


def fids(records: list[RunRecord], recipe: str) -> tuple[float, ...]:
    """Return the FIDs of a recipe's seeds at the student-only budget."""
    fid = only_row(records, recipe).student.value
    assert fid is not None
    return fid.values


def test_runs_of_different_length_are_different_rows() -> None:
    records = [
        make_record("vanilla", 0, [16, 4, 1]),
        make_record("vanilla", 1, [16, 4], steps=(200, 400)),
    ]
    assert [row.seeds for row in only_table(records).rows] == [(0,), (1,)]
    assert any("baseline: the vanilla runs of 800 steps" in note for note in only_table(records).notes)


def test_runs_with_different_options_are_different_rows() -> None:
    records = [make_record("taught", 0, [1.0]), make_record("taught", 1, [1.0], options={"mask": "released"})]
    assert {row.recipe for row in only_table(records).rows} == {"taught", "taught (mask=released)"}


def test_runs_with_the_same_row_hash_share_a_row() -> None:
    same = {"row_hash": "0123abcd"}
    records = [
        make_record("taught", seed, [1.0], options={"mask": str(seed)}, changes=same) for seed in (0, 1)
    ]
    assert [row.seeds for row in only_table(records).rows] == [(0, 1)]


def test_each_setting_and_protocol_has_its_own_table() -> None:
    records = [
        make_record("vanilla", 0, [1.0]),
        make_record("vanilla", 1, [1.0], protocol="bbbb2222"),
        make_record("vanilla", 2, [1.0], changes={"setting_hash": "other"}),
    ]
    tables = build_leaderboard(records).tables
    assert {(table.setting, table.protocol): table.rows[0].seeds for table in tables} == {
        ("5e771a60", "aaaa1111"): (0,),
        ("5e771a60", "bbbb2222"): (1,),
        ("other", "aaaa1111"): (2,),
    }
    assert "vanilla seed 1: excluded, not evaluated under protocol aaaa1111" in tables[0].notes


def test_no_seed_is_dropped() -> None:
    records = make_seeds("vanilla", [1.0, 2.0, 60.0])
    assert fids(records, "vanilla") == (1.0, 2.0, 60.0)
    fid = only_row(records, "vanilla").student.value
    assert fid is not None and fid.mean == pytest.approx(21.0)


def test_a_diverged_seed_makes_the_mean_nan() -> None:
    records = make_seeds("vanilla", [1.0] * 3) + make_seeds("wild", [0.5, 0.5, math.nan])
    wild = only_row(records, "wild")
    assert wild.seeds == (0, 1, 2) and wild.student.value is not None and math.isnan(wild.student.value.mean)
    assert wild.student.plain.verdict == "no finite FID"


def test_a_nonpositive_fid_is_clamped() -> None:
    assert fids(make_seeds("vanilla", [-1e-7]), "vanilla") == (1e-9,)


def test_of_two_runs_with_the_same_seed_the_first_path_counts() -> None:
    records = make_seeds("vanilla", [3.0], root=Path("b")) + make_seeds("vanilla", [1.0], root=Path("a"))
    assert fids(records, "vanilla") == (1.0,)
    name = "digits-sit-vanilla-s0-800"
    assert only_table(records).notes == (f"b/{name}: excluded, repeats seed 0 of a/{name}",)


def test_seeds_without_a_shared_evaluation_are_excluded() -> None:
    records = make_seeds("vanilla", [1.0])
    changes = {"row_hash": "same"}
    records += [make_record("taught", 0, [2.0], steps=(100, 800), changes=changes)]
    records += [make_record("taught", 1, [2.0], steps=(200, 800), changes=changes)]
    table = only_table(records)
    assert [row.recipe for row in table.rows] == ["vanilla"]
    assert "taught: excluded, its seeds share no evaluation without guidance" in table.notes


def test_the_curve_contains_the_last_stage_only() -> None:
    taught = only_row([make_record("taught", 0, [16, 4, 1], teacher=600)], "taught")
    assert [point.images for point in taught.curve] == [step * 64 for step in STEPS]


def test_a_curve_without_fid_is_an_error() -> None:
    record = make_record("vanilla", 0, [1.0])
    curve = [replace(point, metrics={"is": 5.0}) for point in record.curve]
    with pytest.raises(UserError, match="expected 'fid' among the metrics at step 200 .*, found is"):
        build_leaderboard([replace(record, curve=curve)])
