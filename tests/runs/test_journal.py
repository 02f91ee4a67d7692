"""The journal of a sweep: written, read back, merged, and overruled by the run folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from stbench.core.errors import UserError
from stbench.runs.folder import find_runs, read_runs
from stbench.runs.journal import (
    JOURNAL_FILE,
    JournalEntry,
    merge_journals,
    read_journal,
    reconcile,
    write_journal,
)
from tests import fake_runs as runs

ENTRY = JournalEntry(
    run_id="digits-sit-ti-2-vanilla-s0-00000000",
    dataset="digits",
    backbone="sit-ti/2",
    objective="linear",
    recipe="vanilla",
    options={"coefficient": 0.5},
    seed=0,
    steps=800,
    setting_hash="1" * 8,
    row_hash="2" * 8,
)


def test_round_trip(tmp_path: Path) -> None:
    entries = [ENTRY, replace(ENTRY, run_id="other", state="failed", error="loss is nan at step 3")]
    write_journal(tmp_path, entries)
    assert read_journal(tmp_path) == entries
    assert entries[0].label == "vanilla (coefficient=0.5)"


def test_no_journal_is_an_empty_one(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []


@pytest.mark.parametrize("damage", ['"state": "lost"', '"state": 3'])
def test_a_damaged_one_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    write_journal(tmp_path, [ENTRY])
    path = tmp_path / JOURNAL_FILE
    path.write_text(path.read_text().replace('"state": "waiting"', damage))
    with pytest.raises(UserError, match="state = ") as caught:
        read_journal(tmp_path)
    assert "\n" not in str(caught.value)


def test_merging_keeps_what_the_new_one_does_not_name() -> None:
    other = replace(ENTRY, run_id="other")
    again = replace(ENTRY, state="finished")
    assert merge_journals([ENTRY, other], [again]) == [again, other]


def test_a_finished_run_counts_whatever_the_journal_says(tmp_path: Path) -> None:
    runs.build(tmp_path, "vanilla", 0, [4.0, 2.0])
    (record,) = read_runs(find_runs(tmp_path))
    entry = replace(ENTRY, run_id=record.run_id, steps=record.steps, state="failed", error="killed")
    longer = replace(entry, steps=2 * record.steps)
    assert reconcile([entry, longer], [record]) == [replace(entry, state="finished", error=""), longer]
