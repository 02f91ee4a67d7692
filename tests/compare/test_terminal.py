"""Leaderboards and single runs in the terminal: pinned text, 100 columns, no markup."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.compare.blocks import View
from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.terminal import print_curve, print_leaderboard, print_run
from stbench.runs.folder import RunFolder
from tests.fake_runs import make_digits_records, make_point, make_record, make_seeds, write_run

FIXTURES = Path(__file__).parents[1] / "fixtures"


def test_the_output_is_pinned_and_fits_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_leaderboard(build_leaderboard(make_digits_records()), view=View(details=True))
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert max(map(len, lines)) <= 100
    assert "\n".join(lines) + "\n" == (FIXTURES / "leaderboard.txt").read_text()


def test_an_empty_leaderboard_prints_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    print_leaderboard(Leaderboard((), ()))
    assert capsys.readouterr().out == "no finished runs to compare\n"


def test_many_options_are_wrapped_and_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    options = {
        "coefficient": 0.25,
        "guidance": 7,
        "interval": [0.4, 0.7],
        "teacher": "vanilla",
        "time": "native",
    }
    records = make_seeds("vanilla", [1.0] * 3)
    records.append(make_record("self-transcendence", 0, [16.0, 4.0, 1.0], options=options))
    print_leaderboard(build_leaderboard(records), view=View(details=True))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100 and "…" not in printed
    for name, value in options.items():
        assert f"{name}={str(value).partition(' ')[0]}" in printed
    assert "1.000 ± 0.000" in printed and "too few seeds" in printed


def test_square_brackets_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    """Rich treats "[bold]" and "[/x]" as markup unless it is disabled for the text."""
    changes = {"setting_hash": "[bold]", "objective": "[red]"}
    options = {"x": "[/x]"}
    records = [make_record("vanilla", 0, [16.0, 4.0, 1.0], changes=changes, options=options)]
    records.append(make_record("vanilla", 1, [16.0], changes=changes, options=options, status="failed"))
    print_leaderboard(build_leaderboard(records), view=View(details=True))
    record = replace(records[0], curve=[make_point(200, 1.0), replace(make_point(400, 1.0), stage="[red]")])
    metrics = {"fid": 1.0, "[red]": 2.0}
    print_curve(replace(record, curve=[replace(point, metrics=metrics) for point in record.curve]))
    tables, curve = capsys.readouterr().out.split("Curve of")
    assert "setting [bold]" in tables and "[red], batch 64" in tables
    assert "vanilla (x=[/x])" in tables and "- vanilla (x=[/x]) seed 1: failed" in tables
    assert curve.count("[red]") == 2  # a stage and a metric


def test_a_run_is_printed_with_settings_stages_and_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"interval": [0.4, 0.7]}
    record = write_run(tmp_path, "taught", 0, [7.74, 1.79, 0.75], teacher=400, options=options)
    print_run(record)
    printed = capsys.readouterr().out
    for expected in ("taught: interval=[0.4, 0.7]", "400 TFLOP", "teacher", "25.6k", "7.740", "aaaa1111"):
        assert expected in printed


def test_a_failed_run_is_printed_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = write_run(tmp_path, "vanilla", 0, [], status="failed")
    RunFolder(Path(record.path)).write_status("failed", error="FloatingPointError: loss is nan")
    print_run(record)
    assert "FloatingPointError: loss is nan" in capsys.readouterr().out


def test_a_curve_with_many_metrics_is_split_to_fit_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record("vanilla", 0, [16.0, 4.0, 1.0])
    basic = {"fid": 10.27, "fid_all": 10.31, "is": 5.213, "accuracy": 0.908}
    further = {
        "kid": 0.0123,
        "mind": 4.2,
        "precision": 0.71,
        "recall": 0.52,
        "nn_distance": 0.11,
        "nn_distance_heldout": 0.12,
    }
    curve = [replace(point, metrics=basic) for point in record.curve]
    curve.append(replace(make_point(800, 1.0, 1.5), metrics=basic | further))
    print_curve(replace(record, curve=curve))
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    first, second, third = printed.split("Further metrics")
    assert "accuracy" in first and "kid" not in first and "0.0123" in second
    assert "recall" in second and "nn distance" in third


def test_a_curve_under_two_protocols_names_them(capsys: pytest.CaptureFixture[str]) -> None:
    record = make_record("vanilla", 0, [16.0])
    print_curve(record)
    assert "aaaa1111" not in capsys.readouterr().out
    print_curve(replace(record, curve=[*record.curve, replace(record.curve[0], protocol="bbbb2222")]))
    printed = capsys.readouterr().out
    assert "aaaa1111" in printed and "bbbb2222" in printed


def test_nan_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    print_leaderboard(build_leaderboard(make_seeds("vanilla", [1.0, math.nan])), view=View(details=True))
    assert "nan ± nan" in capsys.readouterr().out
