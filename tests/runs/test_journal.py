"""The journal of a sweep: written, read, merged, and reconciled with run folders."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.core.errors import UserError
from stbench.runs.journal import JOURNAL_FILE, merge_journals, read_journal, reconcile, write_journal
from tests.fake_runs import edit_record, make_entry, make_record

ENTRY = make_entry("vanilla", options={"coefficient": 0.5})


def test_a_written_journal_is_read_back(tmp_path: Path) -> None:
    entries = [ENTRY, replace(ENTRY, run_id="other", state="failed", error="loss is nan at step 3")]
    write_journal(tmp_path, entries)
    assert read_journal(tmp_path) == entries
    assert entries[0].label == "vanilla (coefficient=0.5)"


def test_a_missing_journal_has_no_entries(tmp_path: Path) -> None:
    assert read_journal(tmp_path) == []


@pytest.mark.parametrize("damage", ['"state": "lost"', '"state": 3'])
def test_an_invalid_field_is_a_one_line_error(tmp_path: Path, damage: str) -> None:
    write_journal(tmp_path, [ENTRY])
    path = tmp_path / JOURNAL_FILE
    field, value = json.loads(f"[{damage.replace(':', ',')}]")
    edit_record(path, runs=[{**json.loads(path.read_text())["runs"][0], field: value}])
    with pytest.raises(UserError, match="state = ") as caught:
        read_journal(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_journal_without_runs_is_an_error(tmp_path: Path) -> None:
    write_journal(tmp_path, [])
    path = tmp_path / JOURNAL_FILE
    edit_record(path, runs=None)
    with pytest.raises(UserError, match="no valid field 'runs'"):
        read_journal(tmp_path)


def test_merging_replaces_known_entries_and_keeps_the_others() -> None:
    other = replace(ENTRY, run_id="other")
    again = replace(ENTRY, state="finished")
    assert merge_journals([ENTRY, other], [again]) == [again, other]


def test_a_finished_run_folder_takes_precedence_over_the_journal() -> None:
    record = make_record("vanilla", 0, [4.0, 2.0])
    entry = replace(ENTRY, run_id=record.run_id, steps=record.steps, state="failed", error="killed")
    longer = replace(entry, steps=2 * record.steps)
    assert reconcile([entry, longer], [record]) == [replace(entry, state="finished", error=""), longer]


def test_a_changed_journal_is_an_error(tmp_path: Path) -> None:
    write_journal(tmp_path, [ENTRY])
    path = tmp_path / JOURNAL_FILE
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(UserError, match="is damaged.*rerun `stbench sweep`"):
        read_journal(tmp_path)
