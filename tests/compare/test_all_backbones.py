"""Tables of several backbones, combined into one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from stbench.compare.all_backbones import combine_tables
from stbench.compare.build import build_leaderboard
from stbench.runs.records import RunRecord
from tests.fake_runs import LONG_STEPS, make_record


def two_backbones() -> list[RunRecord]:
    """Return vanilla and one more recipe on two backbones, three seeds each, under one protocol."""
    records = []
    for backbone, f in (("dit", 3.0), ("sit", 1.0)):
        changes = {"backbone": {"name": backbone, "size": "ti/2", "options": {}}, "setting_hash": backbone}
        for seed, g in enumerate((1.0, 1.01, 0.99)):
            plain, taught = [16.0, 4.0, f * g, f * g / 2], [16.0, 4.0, f / 2]
            common: dict[str, Any] = {
                "steps": LONG_STEPS, "guided": {1.5: f * g / 4, 2.0: f}, "changes": changes,
            }  # fmt: skip
            records.append(make_record("vanilla", seed, plain, **common))
            records.append(make_record("taught", seed, taught, teacher=800, **common))
    return records


def test_backbones_are_shown_side_by_side() -> None:
    (combined,) = combine_tables(build_leaderboard(two_backbones()))
    assert "all backbones under linear" in combined.heading
    assert "20 function evaluations" in combined.heading and "not ranked" in combined.text
    student, paid = combined.sections
    names = [(backbone, recipe) for backbone in ("dit-ti/2", "sit-ti/2") for recipe in ("vanilla", "taught")]
    assert [row[:2] for row in student.rows] == names
    cells = {row[:2]: row[2:] for row in student.rows}
    assert cells["dit-ti/2", "taught"][:2] == ("1.500 ± 0.000", "0.50 better")
    assert cells["sit-ti/2", "taught"][:2] == ("0.500 ± 0.000", "0.50 better")
    assert {row[:2]: row[3] for row in paid.rows}["sit-ti/2", "taught"] == "1.00 n.d."
    assert "51.2k" in student.title and "102.4k" in paid.title


def test_different_objectives_are_not_combined() -> None:
    records = [replace(r, objective="iddpm") if r.backbone == "dit-ti/2" else r for r in two_backbones()]
    assert combine_tables(build_leaderboard(records)) == []


def test_a_single_setting_is_not_repeated() -> None:
    records = [record for record in two_backbones() if record.backbone == "dit-ti/2"]
    assert combine_tables(build_leaderboard(records)) == []


def test_settings_with_the_same_backbone_are_named_by_their_hash() -> None:
    records = [replace(record, backbone="sit-ti/2") for record in two_backbones()]
    (combined,) = combine_tables(build_leaderboard(records))
    assert "all settings under linear" in combined.heading
    assert {row[0] for row in combined.sections[0].rows} == {"sit-ti/2 [dit]", "sit-ti/2 [sit]"}
