"""Requested runs without results are a visible row, seed or note."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from stbench.compare import terminal
from stbench.compare.blocks import View
from stbench.compare.build import build_leaderboard
from stbench.compare.writers import Format, render
from stbench.runs.folder import State
from stbench.runs.records import RunRecord
from tests.fake_runs import make_entry, make_record, make_seeds
from tests.leaderboards import only_row, only_table


def make_run(recipe: str, seed: int, status: State = "finished") -> RunRecord:
    """Return the run of `make_entry`."""
    changes = {"row_hash": f"row-{recipe}"}
    return make_record(recipe, seed, [16.0, 4.0, 1.0], status=status, changes=changes)


def test_a_row_without_a_finished_seed_is_shown_with_its_states() -> None:
    records = [make_run("vanilla", 0)]
    entries = [
        make_entry("vanilla", 0, state="finished"),
        make_entry("taught", 0, state="waiting"),
        make_entry("taught", 1, state="failed", error="loss is nan"),
    ]
    table = only_table(records, entries)
    (row,) = table.absent
    assert (row.recipe, row.seeds, row.word) == ("taught", (0, 1), "waiting, failed")
    assert row.state == "waiting (seed 0); failed: loss is nan (seed 1)"
    assert any(note.startswith("taught seed 1: failed: loss is nan") for note in table.notes)
    text = render(build_leaderboard(records, entries), "md", view=View(details=True))
    assert "| taught | (0 1) waiting, failed | - | - | - | - |" in text
    assert "| taught | - | - | - | waiting (seed 0); failed: loss is nan (seed 1) |" in text


def test_a_missing_seed_of_a_row_is_shown_in_brackets_with_a_note() -> None:
    records = [make_run("vanilla", seed) for seed in (0, 1)]
    table = only_table(records, [make_entry("vanilla", seed) for seed in range(3)])
    assert table.absent == ()
    assert (table.rows[0].seeds, table.rows[0].unfinished) == ((0, 1), (2,))
    note = "vanilla seed 2: waiting; not included in the results (digits-sit-vanilla-s2-800)"
    assert table.notes == (note,)
    assert "| vanilla | 0 1 (2) |" in render(
        build_leaderboard(records, [make_entry("vanilla", 2)]), "md", view=View(details=True)
    )


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_an_unfinished_seed_is_listed_without_a_journal(status: State) -> None:
    records = make_seeds("vanilla", [1.0] * 3) + make_seeds("taught", [0.5, 0.51, 0.52])
    records.append(make_record("taught", 3, [16.0, 4.0], status=status))
    taught = only_row(records, "taught")
    assert (taught.seeds, taught.unfinished) == ((0, 1, 2), (3,))
    (note,) = only_table(records).notes
    assert note.startswith(f"taught seed 3: {status}") and "at step 400 of 800" in note
    assert (taught.student.plain.verdict == "a seed failed") == (status == "failed")


@pytest.mark.parametrize(
    ("state", "verdict"), [("waiting", "not distinguishable"), ("failed", "a seed failed")]
)
def test_a_failed_seed_in_the_journal_removes_the_verdict(state: str, verdict: str) -> None:
    records = [make_run(recipe, seed) for recipe in ("vanilla", "taught") for seed in range(3)]
    table = only_table(records, [make_entry("taught", 3, state=state, error="out of memory")])
    assert table.rows[-1].student.plain.verdict == verdict


def test_a_failed_run_folder_keeps_its_progress_and_takes_the_error_of_the_journal() -> None:
    records = [make_run("vanilla", 0), make_run("taught", 0, "failed")]
    table = only_table(records, [make_entry("taught", 0, state="failed", error="loss is nan")])
    assert table.absent[0].state == "failed: loss is nan"
    (note,) = table.notes
    assert note.startswith("taught seed 0: failed at step 800 of 800") and note.endswith(": loss is nan")


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_an_unfinished_row_is_listed_without_a_journal(status: State) -> None:
    table = only_table([make_run("vanilla", 0), make_run("taught", 0, status)])
    assert [row.recipe for row in table.absent] == ["taught"]
    assert table.absent[0].state.startswith(status)


def test_unfinished_runs_alone_make_no_table_but_notes() -> None:
    leaderboard = build_leaderboard([make_record("vanilla", 0, [], status="running")])
    assert leaderboard.tables == ()
    (note,) = leaderboard.notes
    assert note.startswith("vanilla seed 0: running (or killed) before its first evaluation")


def test_a_finished_folder_overrules_the_journal() -> None:
    table = only_table([make_run("vanilla", 0)], [make_entry("vanilla", 0, state="failed", error="killed")])
    assert (table.absent, table.notes, table.rows[0].unfinished) == ((), (), ())


def test_a_finished_run_without_its_folder_is_listed() -> None:
    table = only_table([make_run("vanilla", 0)], [make_entry("taught", 0, state="finished")])
    assert table.absent[0].state == "finished, but its folder is gone"


def test_a_setting_without_a_finished_run_is_a_table_of_states() -> None:
    changes = {"setting_hash": "0ther000", "backbone": "dit-ti/2"}
    entries = [make_entry("vanilla", seed, run_id=f"digits-dit-s{seed}", **changes) for seed in (0, 1)]
    leaderboard = build_leaderboard([make_run("vanilla", 0)], entries)
    table = leaderboard.tables[1]
    assert (table.rows, table.backbone, table.absent[0].seeds) == ((), "dit-ti/2", (0, 1))
    text = render(leaderboard, "md", view=View(details=True))
    assert "## digits, dit-ti/2, linear" in text and "| vanilla | (0 1) | waiting |" in text
    assert "| dit-ti/2 | vanilla (0 1) | - | waiting | - | - |" in text  # in the combined table


def test_a_requested_length_is_a_row_of_its_own() -> None:
    records, entries = [make_run("vanilla", 0)], [make_entry("vanilla", 0, steps=1600, row_hash="longer")]
    table = only_table(records, entries)
    assert (table.absent[0].length, table.rows[0].length) == (1600, 800)
    text = render(build_leaderboard(records, entries), "md", view=View(details=True))
    assert r"| vanilla \[800 steps\] | 0 |" in text and r"| vanilla \[1600 steps\] | (0) waiting |" in text


def test_every_format_contains_the_unfinished_row(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [make_entry("taught", 0, state="failed", error="loss is nan " * 20)]
    leaderboard = build_leaderboard([make_run("vanilla", 0)], entries)
    for form in get_args(Format):
        text = render(leaderboard, form, view=View(details=True))
        assert "taught" in text and "loss is nan" in text
    assert json.loads(render(leaderboard, "json"))["tables"][0]["absent"][0]["seeds"] == [0]
    terminal.print_leaderboard(leaderboard, view=View(details=True))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "(0) failed" in printed
