"""Published values: the shipped file, its display, and errors in a damaged file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.published import TITLE, published_section, read_published
from stbench.compare.terminal import print_leaderboard
from stbench.compare.writers import render
from stbench.core.errors import UserError
from tests.fake_runs import make_record

FILE = Path(__file__).parents[2] / "results" / "reported.csv"
ROWS = FILE.read_text().count("\n") - 1


@pytest.fixture
def leaderboard() -> Leaderboard:
    """One measured row."""
    return build_leaderboard([make_record("vanilla", 0, [16.0, 4.0, 1.0])])


def values_where(**fields: str) -> list[float]:
    """Return the shipped values with these fields."""
    return [
        float(value.value)
        for value in read_published(FILE)
        if all(getattr(value, name) == text for name, text in fields.items())
    ]


def test_the_shipped_values() -> None:
    assert len(read_published(FILE)) == ROWS
    plot = {"certainty": "read off a plot", "n_samples": "10000"}
    assert values_where(recipe="self-transcendence", **plot) == [74.2, 51.7, 31.4, 26.0, 22.9]
    assert values_where(recipe="vanilla", **plot) == [96.4, 67.0, 49.7, 42.8, 38.6]
    assert values_where(recipe="vae-align", **plot) == [90.8, 58.8, 40.9, 35.9, 32.2]
    assert values_where(model="SiT-XL/2 + Self-Transcendence", metric="FID") == [1.25]
    assert values_where(model="DiT-B/4", metric="FID") == [68.4, 68.9, 68.3]
    assert values_where(certainty="from memory") == [57.6, 68.4, 43.5, 23.3]
    kinds = {value.certainty.partition(" and ")[0] for value in read_published(FILE)}
    assert kinds == {"repository README", "read off a plot", "second-hand", "from memory"}


@pytest.mark.parametrize("form", ["md", "tex"])
def test_published_values_follow_the_measured_ones(leaderboard: Leaderboard, form: str) -> None:
    text = render(leaderboard, form, read_published(FILE))  # type: ignore[arg-type]
    measured, published = text.split(TITLE, 1)
    assert "read off a plot" not in measured
    assert "read off a plot" in published and "FID-10k 22.9" in published


def test_json_has_published_values_under_their_own_key(leaderboard: Leaderboard) -> None:
    content = json.loads(render(leaderboard, "json", read_published(FILE)))
    assert content["reported"]["title"] == TITLE and len(content["reported"]["rows"]) == ROWS
    assert "reported" not in json.loads(render(leaderboard, "json"))


def test_the_terminal_prints_published_values(
    leaderboard: Leaderboard, capsys: pytest.CaptureFixture[str]
) -> None:
    print_leaderboard(leaderboard, published=read_published(FILE))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.count(TITLE) == 1 and "second-hand" in printed


def test_csv_has_no_room_for_published_values(leaderboard: Leaderboard) -> None:
    with pytest.raises(UserError, match=r"single table.*reported\.csv"):
        render(leaderboard, "csv", read_published(FILE))


def test_metrics_of_one_evaluation_share_a_line() -> None:
    section, notes = published_section(read_published(FILE))
    (line,) = [row for row in section.rows if row[4].startswith("FID-50k 33.0")]
    assert line[4] == "FID-50k 33.0, sFID 6.46, IS 43.7, precision 0.53, recall 0.63"
    assert [note.partition("]")[0] for note in notes] == [f"[{i + 1}" for i in range(len(notes))]


def test_the_working_directory_has_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "reported.csv").write_text("".join(FILE.read_text().splitlines(True)[:2]))
    monkeypatch.chdir(tmp_path)
    assert len(read_published()) == 1


def test_the_file_of_the_clone_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(read_published()) == ROWS


def test_a_missing_file_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read .*--reported-file FILE") as caught:
        read_published(tmp_path / "nowhere.csv")
    assert "\n" not in str(caught.value)


DAMAGE: dict[str, Callable[[str], str]] = {
    "line 1: expected the columns": lambda text: text.replace("certainty", "confidence", 1),
    "line 2: expected a finite number in column 'value'": lambda text: text.replace("2.27", "low"),
    "line 2: expected 15 columns": lambda text: text.replace("2.27", "2.27,extra"),
    "line 2: column 'source' must not be empty": lambda text: text.replace("DiT README", "", 1),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_an_error_in_a_damaged_file_names_the_line(tmp_path: Path, message: str) -> None:
    (tmp_path / "reported.csv").write_text(DAMAGE[message](FILE.read_text()))
    with pytest.raises(UserError, match=message):
        read_published(tmp_path / "reported.csv")
