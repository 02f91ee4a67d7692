"""The compact tables: what they say at which width, and what to run next."""

from __future__ import annotations

import io
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from stbench.cli.compare import read_leaderboard
from stbench.compare.blocks import View, blocks
from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.next_step import next_step
from stbench.compare.question import Amount, Question
from stbench.compare.terminal import print_leaderboard
from tests.fake_runs import make_digits_records, make_entry, make_record, make_seeds

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures"


def printed(leaderboard: Leaderboard, width: int = 100) -> str:
    file = io.StringIO()
    print_leaderboard(leaderboard, console=Console(file=file, width=width))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def test_the_compact_output_is_pinned() -> None:
    assert printed(build_leaderboard(make_digits_records())) == (FIXTURES / "compact.txt").read_text()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_digits_fit_and_every_number_is_on_one_line(width: int) -> None:
    leaderboard = read_leaderboard([ROOT / "results" / "digits" / "runs"])
    text = printed(leaderboard, width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("\nrepa†") == 6  # a row and what it needs, in three tables
    assert (
        text.count("self-transcendence") == 12
    )  # three rows each and the ranks; never broken within the word
    tables = [section for block in blocks(leaderboard, width=width) for section in block.sections]
    assert len(tables) == 3 and all(len(table.header) <= 10 for table in tables)
    assert ("(0.68-0.77)" in text) == (width >= 100)
    assert ("1.18x (1.14-1.23)" in text) == (width == 160)
    assert "±" in text


def test_a_ratio_has_the_mark_of_its_verdict() -> None:
    records = make_seeds("vanilla", [1.0, 1.02, 0.99]) + make_seeds("good", [0.5, 0.52, 0.49])
    records += make_seeds("bad", [2.0, 2.05, 1.99]) + make_seeds("same", [1.1, 0.9, 1.0])
    records += make_seeds("short", [0.9])
    lines = {line.split()[0]: line for line in printed(build_leaderboard(records)).splitlines() if line}
    assert " 0.50 (0.4" in lines["good"] and ") +" in lines["good"]
    assert ") -" in lines["bad"] and ") =" in lines["same"] and " 0.90 ?" in lines["short"]


def test_options_are_named_below_unless_they_tell_rows_apart() -> None:
    records = make_seeds("vanilla", [1.0] * 3) + make_seeds("a", [0.9] * 3, options={"x": 1})
    text = printed(build_leaderboard(records))
    assert "\na        3" in text and "options: a x=1" in text
    records += make_seeds("a", [0.8] * 3, options={"x": 2})
    text = printed(build_leaderboard(records))
    assert "\na (x=1)  3" in text and "\na (x=2)  3" in text and "options:" not in text


def test_vanilla_with_options_keeps_its_name() -> None:
    text = printed(build_leaderboard(make_seeds("vanilla", [1.0] * 3, options={"x": 1})))
    assert "\nvanilla (x=1)  3" in text


def test_rows_without_results_are_one_line() -> None:
    records = [*make_seeds("vanilla", [1.0] * 3), make_record("b", 0, [16.0], status="failed")]
    records.append(make_record("vanilla", 3, [], status="stopped"))
    text = printed(build_leaderboard(records, [make_entry("a"), make_entry("a", 1)]))
    assert "no results yet: a (0 1) waiting; b (0) failed; vanilla (3)\n" in text
    assert "\nvanilla  3/4" in text


def test_a_single_run_is_a_small_table_with_the_next_command() -> None:
    text = printed(build_leaderboard([make_record("sra", 0, [16.0, 4.0, 1.0], root=Path("my runs"))]))
    assert " - " not in text and "ratio" not in text  # no columns of dashes
    command = "for s in 0 1 2; do stbench run --config 'my runs/digits-sit-sra-s0-800' --recipe vanilla "
    assert f"next: {command}--seed $s --output 'my runs'; done" in " ".join(text.split())


def test_too_few_seeds_name_the_missing_ones() -> None:
    records = make_seeds("vanilla", [1.0] * 5) + make_seeds("sra", [0.9] * 2, root=Path("results/runs"))
    text = " ".join(printed(build_leaderboard(records)).split())
    command = "for s in 2 3 4; do stbench run --config results/runs/digits-sit-sra-s0-800 --seed $s; done"
    assert f"fewer than 3 common seeds, so no verdict; next: {command}" in text


def test_seeds_that_the_baseline_lacks_do_not_count() -> None:
    records = make_seeds("vanilla", [1.0] * 3)
    records += [make_record("sra", seed, [16.0, 4.0, 0.9], root=Path("results/runs")) for seed in (3, 4, 5)]
    text = " ".join(printed(build_leaderboard(records)).split())
    assert "next: for s in 0 1 2; do stbench run --config results/runs/digits-sit-sra-s3-800" in text


def test_the_next_command_is_a_command(tmp_path: Path) -> None:
    """bash runs it with every run folder and seed as single arguments."""
    records = [make_record(name, 0, [16.0, 4.0, 1.0], root=Path("my 'runs'")) for name in ("vanilla", "a b")]
    (table,) = build_leaderboard(records).tables
    command = next_step(table).partition("next: ")[2]
    fake = 'stbench() { printf "%s|" "$@"; echo; }\n'
    out = subprocess.run(["bash", "-c", fake + command], check=True, capture_output=True, text=True).stdout
    folders = [f"my 'runs'/digits-sit-{name}-s0-800" for name in ("vanilla", "a b")]
    expected = [f"run|--config|{f}|--seed|{s}|--output|my 'runs'|" for f in folders for s in (1, 2)]
    assert sorted(out.splitlines()) == sorted(expected)


def test_reasons_for_missing_tests_are_named() -> None:
    records = make_seeds("vanilla", [1.0] * 3) + make_seeds("taught", [0.9] * 3, teacher=400)
    records += make_seeds("short", [0.9])
    text = printed(build_leaderboard(records))
    text = " ".join(text.split())
    assert "short (too few seeds)" in text
    assert "taught (paid, no vanilla there)" in text and "vanilla (" not in text

    records = [r for name in ("vanilla", "one", "two") for r in make_seeds(name, [1.0])]
    assert "not tested: all rows (too few seeds)" in " ".join(printed(build_leaderboard(records)).split())


def test_a_baseline_without_a_value_at_the_budget_is_not_missing() -> None:
    far = Question(at=Amount("images", 1e6))
    text = printed(build_leaderboard(make_seeds("vanilla", [1.0] * 3), question=far))
    assert "no value of vanilla there; next: choose another --at" in text
    assert "stbench run" not in text


def test_enough_seeds_need_no_next_command() -> None:
    assert "next:" not in printed(build_leaderboard(make_digits_records()))


def test_settings_with_equal_words_name_their_difference() -> None:
    train = {"steps": 800, "batch": 64, "precision": "fp32"}
    records = make_seeds("vanilla", [1.0] * 3)
    for lr in (1e-3, 4e-3):
        changes = {"train": train | {"lr": lr}, "setting_hash": f"lr{lr}"}
        records += make_seeds("vanilla", [1.0] * 3, changes=changes)
    text = printed(build_leaderboard(records), 160)
    assert "(train.lr 0.001)" in text and "(train.lr 0.004)" in text


def test_a_terminal_without_unicode_gets_other_letters() -> None:
    recipe = {"name": "repa", "options": {"x": "é"}, "effective": {}, "needs": "an encoder"}
    records = make_seeds("vanilla", [1.0, 1.1, 0.9]) + make_seeds(
        "repa", [0.5] * 3, changes={"recipe": recipe}
    )
    for details in (False, True):
        raw = io.BytesIO()
        file = io.TextIOWrapper(raw, encoding="ascii")
        view = View(details=details)
        print_leaderboard(build_leaderboard(records), view=view, console=Console(file=file, width=100))
        file.flush()
        text = raw.getvalue().decode("ascii")
        assert "1.00" in text and "+-0.1" in text.replace(" ", "") and "repa" in text and "\\xe9" in text


def test_square_brackets_are_text() -> None:
    changes = {"objective": "[red]", "dataset": "[bold]"}
    records = make_seeds("vanilla", [1.0] * 3, changes=changes)
    records += make_seeds("a[/b]", [1.1] * 3, changes=changes, options={"x": "[/x]"})
    text = printed(build_leaderboard(records, [make_entry("[i]", dataset="[bold]")]))
    for expected in ("[red] objective", "on [bold]", "\na[/b]", "a[/b] x=[/x]", "[i] (0) waiting"):
        assert expected in text
