"""Published numbers: the file that ships, how it is shown, and what a wrong one says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stbench.cli.compare import compare
from stbench.compare import published as reported
from stbench.compare import terminal, writers
from stbench.compare.build import leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.published import read_reported
from stbench.core.errors import UserError
from tests.fake_runs import build

ROOT = Path(__file__).parents[2]
FILE = ROOT / "results" / "reported.csv"


@pytest.fixture
def board(tmp_path: Path) -> Leaderboard:
    """One measured row."""
    return leaderboard([build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0])])


def value(**wanted: str) -> list[float]:
    """Values of the shipped figures whose fields are these."""
    found = read_reported(FILE)
    return [float(f.value) for f in found if all(getattr(f, name) == text for name, text in wanted.items())]


def test_the_shipped_figures() -> None:
    assert len(read_reported(FILE)) == 120
    plot = {"certainty": "read off a plot", "n_samples": "10000"}
    assert value(recipe="self-transcendence", **plot) == [74.2, 51.7, 31.4, 26.0, 22.9]
    assert value(recipe="vanilla", **plot) == [96.4, 67.0, 49.7, 42.8, 38.6]
    assert value(recipe="vae-align", **plot) == [90.8, 58.8, 40.9, 35.9, 32.2]
    assert value(model="SiT-XL/2 + Self-Transcendence", metric="FID") == [1.25]
    assert value(model="DiT-B/4", metric="FID") == [68.4, 68.9, 68.3]
    assert value(certainty="from memory") == [57.6, 68.4, 43.5, 23.3]
    kinds = {figure.certainty.partition(" and ")[0] for figure in read_reported(FILE)}
    assert kinds == {"repository README", "read off a plot", "second-hand", "from memory"}


def test_every_format_marks_them_as_reported(board: Leaderboard, capsys: pytest.CaptureFixture[str]) -> None:
    figures = read_reported(FILE)
    for form in ("md", "tex"):
        text = writers.render(board, form, figures)  # type: ignore[arg-type]
        measured, shown = text.split(reported.TITLE, 1)
        assert "read off a plot" not in measured and "read off a plot" in shown and "FID-10k 22.9" in shown
    content = json.loads(writers.render(board, "json", figures))
    assert content["reported"]["title"] == reported.TITLE and len(content["reported"]["rows"]) == 120
    assert "reported" not in json.loads(writers.render(board, "json"))
    terminal.print_leaderboard(board, figures=figures)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.count(reported.TITLE) == 1 and "second-hand" in printed


def test_csv_holds_one_table_and_says_so(board: Leaderboard) -> None:
    with pytest.raises(UserError, match=r"csv holds one table.*reported\.csv"):
        writers.render(board, "csv", read_reported(FILE))


def test_figures_of_one_setting_share_a_line() -> None:
    section, notes = reported.section(read_reported(FILE))
    (line,) = [row for row in section.rows if row[4].startswith("FID-50k 33.0")]
    assert line[4] == "FID-50k 33.0, sFID 6.46, IS 43.7, precision 0.53, recall 0.63"
    assert [note.partition("]")[0] for note in notes] == [f"[{i + 1}" for i in range(len(notes))]


def test_the_clone_s_own_file_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "reported.csv").write_text("".join(FILE.read_text().splitlines(True)[:2]))
    monkeypatch.chdir(tmp_path)
    assert len(read_reported()) == 1


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read it .*--reported-file FILE") as caught:
        read_reported(tmp_path / "nowhere.csv")
    assert "\n" not in str(caught.value)


DAMAGE: dict[str, Callable[[str], str]] = {
    "line 1: expected the columns": lambda text: text.replace("certainty", "confidence", 1),
    "line 2: expected a number as value, found 'low'": lambda text: text.replace("2.27", "low"),
    "line 2: expected 15 columns": lambda text: text.replace("2.27", "2.27,extra"),
    "line 2: expected a source": lambda text: text.replace("DiT README", "", 1),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_file_names_the_line(tmp_path: Path, message: str) -> None:
    (tmp_path / "reported.csv").write_text(DAMAGE[message](FILE.read_text()))
    with pytest.raises(UserError, match=message):
        read_reported(tmp_path / "reported.csv")


def test_nothing_is_written_when_the_file_is_missing(tmp_path: Path) -> None:
    build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0])
    with pytest.raises(UserError):
        compare([tmp_path], "md", tmp_path / "out.md", None, tmp_path / "nowhere.csv")
    assert not (tmp_path / "out.md").exists()
