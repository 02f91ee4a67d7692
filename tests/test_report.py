"""What is printed and drawn: pinned text, formats that parse, a figure that is not blank."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from stbench import report
from stbench.compare import leaderboard
from stbench.errors import UserError
from stbench.leaderboard import Leaderboard
from stbench.results import RunFolder
from stbench.sections import count, duration, flop, number
from stbench.testing.runs import build, digits, point

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Leaderboard:
    """Three recipes of three seeds, of which two were trained twice as long."""
    return leaderboard(digits(tmp_path_factory.mktemp("runs")))


def test_markdown_is_pinned(board: Leaderboard) -> None:
    assert report.render(board, "md") == (FIXTURES / "leaderboard.md").read_text()


def test_terminal_is_pinned_and_fits_100_columns(
    board: Leaderboard, capsys: pytest.CaptureFixture[str]
) -> None:
    report.print_leaderboard(board)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert (
        "\n".join(map(str.rstrip, printed.splitlines())) + "\n" == (FIXTURES / "leaderboard.txt").read_text()
    )


def test_json_holds_every_figure(board: Leaderboard) -> None:
    content = json.loads(report.render(board, "json"), parse_constant=lambda name: pytest.fail(name))
    (table,) = content["tables"]
    assert content["schema"] == 1
    assert [row["recipe"] for row in table["rows"]] == [row.recipe for row in board.tables[0].rows]
    assert table["rows"][1]["fid"]["values"] == list(board.tables[0].rows[1].fid.values)
    assert table["rows"][1]["paid"]["reach"]["speedup"] == board.tables[0].rows[1].paid.reach.speedup  # type: ignore[union-attr]


def test_json_stays_strict_with_a_diverged_seed(tmp_path: Path) -> None:
    text = report.render(leaderboard([build(tmp_path, "vanilla", 0, [1.0, 1.0, math.nan])]), "json")
    content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert content["tables"][0]["rows"][0]["fid"]["mean"] == "nan"


def test_csv_has_a_line_a_row_at_full_precision(board: Leaderboard) -> None:
    lines = list(csv.DictReader(io.StringIO(report.render(board, "csv"))))
    rows = board.tables[0].rows
    assert [line["recipe"] for line in lines] == [row.recipe for row in rows]
    assert [float(line["fid_mean"]) for line in lines] == [row.fid.mean for row in rows]
    assert [float(line["flops_total_mean"]) for line in lines] == [row.flops_total.mean for row in rows]
    assert lines[0]["seeds"] == "0 1 2" and lines[0]["protocol"] == "aaaa1111"


def test_tex_is_balanced_and_escaped(tmp_path: Path) -> None:
    records = [build(tmp_path, "a_b&c%", 0, [16.0, 4.0, 1.0], options={"x": "{1}"})]
    text = report.render(leaderboard(records), "tex")
    code = "\n".join(line for line in text.splitlines() if not line.startswith("%"))
    assert code.count("\\begin{tabular}") == code.count("\\end{tabular}") == 4
    assert r"a\_b\&c\% (x=\{1\})" in code
    for grid in code.split("\\begin{tabular}{")[1:]:
        columns = grid.index("}")
        for line in grid.splitlines():
            if line.endswith(r"\\"):
                assert line.replace(r"\&", "").count("&") == columns - 1


def test_a_bound_says_how_many_seeds_arrived(tmp_path: Path) -> None:
    records = [build(tmp_path, "vanilla", seed, [16.0, 4.0, 1.0]) for seed in (0, 1)]
    records += [build(tmp_path, "slow", seed, [16.0, 4.0, fid]) for seed, fid in enumerate([0.5, 1.1])]
    assert "| > 51.2k (1 of 2 seeds) | - |" in report.render(leaderboard(records), "md")


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    text = report.render(leaderboard([build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0])]), "md")
    assert "| vanilla | 0 | 51.2k | 1.000 | 5.000 |" in text


def test_an_unfinished_seed_is_in_the_row_and_in_a_note(tmp_path: Path) -> None:
    records = [
        build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0]),
        build(tmp_path, "vanilla", 1, [16.0], status="failed"),
    ]
    text = report.render(leaderboard(records), "md")
    assert "| vanilla | 0 (1) |" in text and "- vanilla seed 1: failed at step 200 of 800" in text


def test_no_finished_run_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    report.print_leaderboard(Leaderboard((), ()))
    assert capsys.readouterr().out == "no finished run to compare\n"


def test_show_prints_settings_stages_and_curve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"interval": [0.4, 0.7]}
    record = build(tmp_path, "taught", 0, [7.74, 1.79, 0.75], teacher=400, options=options)
    report.show(record)
    printed = capsys.readouterr().out
    for expected in ("taught: interval=[0.4, 0.7]", "400 TFLOP", "teacher", "25.6k", "7.740", "aaaa1111"):
        assert expected in printed


def test_show_says_why_a_run_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = build(tmp_path, "vanilla", 0, [], status="failed")
    RunFolder(Path(record.path)).write_status("failed", error="FloatingPointError: loss is nan")
    report.show(record)
    assert "FloatingPointError: loss is nan" in capsys.readouterr().out


def test_a_curve_of_many_metrics_fits_100_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0])
    basic = {"fid": 10.27, "fid_all": 10.31, "is": 5.213, "accuracy": 0.908}
    extras = {
        "kid": 0.0123,
        "precision": 0.71,
        "recall": 0.52,
        "nn_distance": 0.11,
        "nn_distance_heldout": 0.12,
    }
    points = [replace(p, metrics=basic) for p in record.curve] + [
        replace(point(800, 1.0, 1.5), metrics=basic | extras)
    ]
    report.print_curve(replace(record, curve=points))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    first, further = printed.split("Further metrics")
    assert "accuracy" in first and "kid" not in first and "0.0123" in further


def test_a_curve_under_two_protocols_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = build(tmp_path, "vanilla", 0, [16.0])
    report.print_curve(replace(record, curve=[*record.curve, replace(record.curve[0], protocol="bbbb2222")]))
    printed = capsys.readouterr().out
    assert "aaaa1111" in printed and "bbbb2222" in printed


@pytest.mark.parametrize(
    ("value", "text"),
    [(800, "800"), (51200, "51.2k"), (102400, "102.4k"), (1_281_167, "1.28M"), (999_990, "1M")],
)
def test_counts(value: float, text: str) -> None:
    assert count(value) == text


def test_units() -> None:
    assert [flop(x) for x in (0, 1.234e15, 8e14)] == ["0 FLOP", "1.23 PFLOP", "800 TFLOP"]
    assert [duration(x) for x in (45.2, 300, 10_000)] == ["45.2 s", "5 min", "2.78 h"]
    assert [number(x) for x in (0.01234, 0.5, 12.345, 123.45)] == ["0.0123", "0.500", "12.35", "123.5"]


def test_the_figure_shows_every_recipe_in_its_colour(board: Leaderboard, tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    from stbench.figures import COLOURS, GREY

    report.plot(board, tmp_path / "deep" / "curves.png")
    pixels = np.asarray(Image.open(tmp_path / "deep" / "curves.png").convert("RGB")).astype(int)
    assert pixels.shape[1] == 1200
    for colour in (GREY, *COLOURS[:2]):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        halves = np.array_split((pixels == wanted).all(axis=-1), 2, axis=1)
        assert all(half.sum() > 100 for half in halves), colour


def test_the_figure_takes_records_too(tmp_path: Path) -> None:
    report.plot([build(tmp_path, "vanilla", 0, [16.0, 4.0, 1.0])], tmp_path / "curves.svg")
    assert "<svg" in (tmp_path / "curves.svg").read_text()


def test_a_figure_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected finished runs to plot"):
        report.plot(Leaderboard((), ()), tmp_path / "curves.png")


def test_an_unknown_figure_format_is_refused(board: Leaderboard, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"found .*curves\.doc; try curves\.png"):
        report.plot(board, tmp_path / "curves.doc")
