"""What was asked for and is not there is a visible row, seed or note."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.cli.compare import compare, read_board
from stbench.compare import terminal, writers
from stbench.compare.build import leaderboard
from stbench.compare.leaderboard import Table
from stbench.core.errors import UserError
from stbench.runs.journal import JOURNAL_FILE, JournalEntry, write_journal
from stbench.runs.records import RunRecord
from tests.fake_runs import build

SETTING = "5e771a60"
CURVE = [16.0, 4.0, 1.0]


def entry(recipe: str, seed: int, state: str = "waiting", error: str = "", **changes: object) -> JournalEntry:
    """One run of 800 steps in the setting of the fixtures."""
    made = JournalEntry(
        run_id=f"digits-sit-{recipe}-s{seed}-800",
        dataset="digits",
        backbone="sit-ti/2",
        objective="linear",
        recipe=recipe,
        options={},
        seed=seed,
        steps=800,
        setting_hash=SETTING,
        row_hash=f"row-{recipe}",
        state=state,  # type: ignore[arg-type]
        error=error,
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def run(root: Path, recipe: str, seed: int, **options: object) -> RunRecord:
    """The run that `entry` asks for."""
    changes = {"row_hash": f"row-{recipe}"}
    return build(root, recipe, seed, CURVE, changes=changes, **options)  # type: ignore[arg-type]


def table(records: list[RunRecord], entries: list[JournalEntry]) -> Table:
    """The one table of them."""
    (only,) = leaderboard(records, entries).tables
    return only


def test_a_row_without_a_finished_seed_is_shown_with_its_state(tmp_path: Path) -> None:
    entries = [
        entry("taught", seed, "failed" if seed else "waiting", "loss is nan" if seed else "")
        for seed in (0, 1)
    ]
    made = table([run(tmp_path, "vanilla", 0)], [entry("vanilla", 0, "finished"), *entries])
    (absent,) = made.absent
    assert (absent.recipe, absent.seeds, absent.word) == ("taught", (0, 1), "waiting, failed")
    assert absent.state == "waiting (seed 0); failed: loss is nan (seed 1)"
    assert any(note.startswith("taught seed 1: failed: loss is nan") for note in made.notes)
    text = writers.render(leaderboard([run(tmp_path, "vanilla", 0)], entries), "md")
    assert "| taught | (0 1) waiting, failed | - | - | - | - |" in text
    assert "| taught | - | - | - | waiting (seed 0); failed: loss is nan (seed 1) |" in text


def test_a_missing_seed_stands_in_brackets_with_a_note(tmp_path: Path) -> None:
    records = [run(tmp_path, "vanilla", seed) for seed in (0, 1)]
    made = table(records, [entry("vanilla", seed) for seed in range(3)])
    assert made.absent == ()
    assert (made.rows[0].seeds, made.rows[0].unfinished) == ((0, 1), (2,))
    assert [note.partition(";")[0] for note in made.notes] == ["vanilla seed 2: waiting"]
    assert "| vanilla | 0 1 (2) |" in writers.render(leaderboard(records, [entry("vanilla", 2)]), "md")


def test_a_failed_seed_of_the_journal_takes_the_verdict(tmp_path: Path) -> None:
    records = [run(tmp_path, recipe, seed) for recipe in ("vanilla", "taught") for seed in range(3)]
    verdicts = {
        state: table(records, [entry("taught", 3, state, "out of memory")]).rows[-1].student.plain.verdict
        for state in ("waiting", "failed")
    }
    assert verdicts == {"waiting": "not distinguishable", "failed": "a seed failed"}


def test_a_failed_run_with_a_folder_keeps_its_place_and_takes_the_error(tmp_path: Path) -> None:
    records = [run(tmp_path, "vanilla", 0), run(tmp_path, "taught", 0, status="failed")]
    made = table(records, [entry("taught", 0, "failed", "loss is nan")])
    assert made.absent[0].state == "failed: loss is nan"
    (note,) = made.notes
    assert note.startswith("taught seed 0: failed at step 800 of 800") and note.endswith(": loss is nan")


@pytest.mark.parametrize("status", ["running", "stopped", "failed"])
def test_an_unfinished_row_is_visible_without_a_journal_too(tmp_path: Path, status: str) -> None:
    made = table([run(tmp_path, "vanilla", 0), run(tmp_path, "taught", 0, status=status)], [])
    assert [row.recipe for row in made.absent] == ["taught"]
    assert made.absent[0].state.startswith(status)


def test_a_finished_folder_overrules_the_journal(tmp_path: Path) -> None:
    made = table([run(tmp_path, "vanilla", 0)], [entry("vanilla", 0, "failed", "killed")])
    assert (made.absent, made.notes, made.rows[0].unfinished) == ((), (), ())


def test_a_finished_run_whose_folder_is_gone_is_missed(tmp_path: Path) -> None:
    made = table([run(tmp_path, "vanilla", 0)], [entry("taught", 0, "finished")])
    assert made.absent[0].state == "finished, but its folder is gone"


def test_a_setting_of_which_nothing_is_finished_is_a_table(tmp_path: Path) -> None:
    changes = {"setting_hash": "0ther000", "backbone": "dit-ti/2"}
    other = [entry("vanilla", seed, run_id=f"digits-dit-s{seed}", **changes) for seed in (0, 1)]
    board = leaderboard([run(tmp_path, "vanilla", 0)], other)
    bare = board.tables[1]
    assert (bare.rows, bare.backbone, bare.absent[0].seeds) == ((), "dit-ti/2", (0, 1))
    text = writers.render(board, "md")
    assert "## digits, dit-ti/2, linear" in text and "| vanilla | (0 1) | waiting |" in text
    assert "| dit-ti/2 | vanilla (0 1) | - | waiting | - | - |" in text  # in the summary of both


def test_an_asked_length_is_another_row(tmp_path: Path) -> None:
    made = table([run(tmp_path, "vanilla", 0)], [entry("vanilla", 0, steps=1600, row_hash="longer")])
    text = writers.render(
        leaderboard([run(tmp_path, "vanilla", 0)], [entry("vanilla", 0, steps=1600, row_hash="longer")]), "md"
    )
    assert (made.absent[0].length, made.rows[0].length) == (1600, 800)
    assert "| vanilla [800 steps] | 0 |" in text and "| vanilla [1600 steps] | (0) waiting |" in text


def test_every_format_holds_the_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    board = leaderboard([run(tmp_path, "vanilla", 0)], [entry("taught", 0, "failed", "loss is nan " * 20)])
    for form in ("csv", "json", "tex"):
        text = writers.render(board, form)  # type: ignore[arg-type]
        assert "taught" in text and "loss is nan" in text
    assert json.loads(writers.render(board, "json"))["tables"][0]["absent"][0]["seeds"] == [0]
    terminal.print_leaderboard(board)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "(0) failed" in printed


def test_the_journal_beside_the_run_folders_is_read(tmp_path: Path) -> None:
    run(tmp_path / "runs", "vanilla", 0)
    write_journal(tmp_path / "runs", [entry("vanilla", 0, "finished"), entry("taught", 0)])
    for path in (tmp_path / "runs", tmp_path):
        assert [row.recipe for row in read_board([path]).tables[0].absent] == ["taught"]
    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    assert read_board([folder]).tables[0].absent == ()  # one run was asked for by name


def test_a_journal_without_runs_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_journal(tmp_path, [entry("vanilla", 0)])
    compare([tmp_path], None, None, None, False)
    assert "vanilla  (0)    waiting" in capsys.readouterr().out


def test_a_damaged_journal_is_one_line(tmp_path: Path) -> None:
    run(tmp_path, "vanilla", 0)
    (tmp_path / JOURNAL_FILE).write_text("{")
    with pytest.raises(UserError, match="sweep.json is not whole JSON"):
        read_board([tmp_path])
