"""`stbench compare`: which runs and journals it reads, and where its output goes."""

from __future__ import annotations

from pathlib import Path

import pytest

from stbench.cli.compare import Format, Group, compare, read_leaderboard
from stbench.core.errors import UserError
from stbench.runs.journal import JOURNAL_FILE, write_journal
from tests.fake_runs import make_entry, write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A directory of one run folder, with a journal that also names a waiting run."""
    write_run(tmp_path / "runs", "vanilla", 0, [16.0, 4.0, 1.0])
    write_journal(tmp_path / "runs", [make_entry("vanilla"), make_entry("taught")])
    return tmp_path / "runs"


def test_the_journal_next_to_run_folders_is_read(runs: Path) -> None:
    for path in (runs, runs.parent):
        assert [row.recipe for row in read_leaderboard([path]).tables[0].absent] == ["taught"]


def test_a_run_folder_does_not_bring_its_journal(runs: Path) -> None:
    (folder,) = (path for path in runs.iterdir() if path.is_dir())
    assert read_leaderboard([folder]).tables[0].absent == ()


def test_a_run_that_is_named_twice_counts_once(runs: Path) -> None:
    leaderboard = read_leaderboard([runs, runs.parent, runs / ".." / "runs"])
    assert leaderboard.tables[0].rows[0].seeds == (0,)
    assert not any("repeats seed" in note for note in leaderboard.tables[0].notes)


def test_a_journal_without_run_folders_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_journal(tmp_path, [make_entry("vanilla")])
    compare([tmp_path])
    assert "vanilla  (0)    waiting" in capsys.readouterr().out


def test_a_directory_without_runs_and_journal_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stbench run"):
        compare([tmp_path])


def test_a_damaged_journal_is_a_one_line_error(runs: Path) -> None:
    (runs / JOURNAL_FILE).write_text("{")
    with pytest.raises(UserError, match=JOURNAL_FILE) as caught:
        read_leaderboard([runs])
    assert "\n" not in str(caught.value)


def test_output_and_plot_are_written(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([runs], format=Format.csv, output=tmp_path / "out.csv", plot=tmp_path / "curves.svg")
    assert capsys.readouterr().out == ""
    assert (tmp_path / "out.csv").read_text().startswith("dataset,setting,protocol")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_output_without_a_format_is_markdown(runs: Path, tmp_path: Path) -> None:
    compare([runs], output=tmp_path / "out")
    assert (tmp_path / "out").read_text().startswith("## sit-ti/2 on digits")


def test_nothing_is_written_if_the_published_values_cannot_be_read(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        compare([runs], format=Format.md, output=tmp_path / "out.md", reported_file=tmp_path / "nowhere.csv")
    assert not (tmp_path / "out.md").exists()


def test_published_values_are_added(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([runs], format=Format.md, reported=True)
    assert "Reported by papers and repositories" in capsys.readouterr().out


def test_a_further_file_of_a_plot_is_not_overwritten(tmp_path: Path) -> None:
    for setting in "abc":
        write_run(tmp_path / setting, "vanilla", 0, [16.0, 4.0, 1.0], changes={"setting_hash": setting})
    (tmp_path / "curves-2.png").write_text("mine")
    with pytest.raises(UserError, match=r"curves-2\.png exists and was not written by this command"):
        compare([tmp_path], plot=tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_filters_and_choices_reach_the_output(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs, "sra", 0, [16.0, 4.0, 2.0])
    compare([runs], where=["recipe=vanilla"], details=True, at="25.6k", target="8")
    printed = capsys.readouterr().out
    assert (
        "sra" not in printed
        and "step 400, 25.6k images" in printed
        and "Images to reach FID of 8.000" in printed
    )
    compare([runs], baseline="sra", format=Format.csv)
    assert ",fid,sra,51200," in capsys.readouterr().out


def test_rows_are_compared_at_equal_hours(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(runs, "taught", 0, [16.0, 4.0, 0.5], teacher=200)
    compare([runs], at="0.0125h")  # 45 s: 720 steps
    printed = capsys.readouterr().out
    assert "at 45 s of training of the last stage; paid: at 45 s of training of all stages" in printed
    assert "at equal time of the last stage" in printed and "~1.32" in printed
    compare([runs], at="0.72 PFLOP", details=True)
    assert "Student only: 720 TFLOP of the last stage" in capsys.readouterr().out
    compare([runs], at="0.72PFLOP", format=Format.csv)
    assert "flops,720000000000000.0" in capsys.readouterr().out


def test_groups_are_for_compact_tables(runs: Path) -> None:
    for more in ({"details": True}, {"format": Format.json}):
        with pytest.raises(UserError, match="--group-by applies to compact tables"):
            compare([runs], group_by=Group.recipe, **more)  # type: ignore[arg-type]
