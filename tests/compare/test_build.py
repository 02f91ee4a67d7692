"""Whole leaderboards: independent of the order of records, and built without heavy imports."""

from __future__ import annotations

import subprocess
import sys

from stbench.compare.build import build_leaderboard
from tests.fake_runs import make_digits_records

HEAVY = {"torch", "mmengine", "matplotlib", "scipy", "numpy", "PIL", "pydantic", "rich"}


def test_the_order_of_the_records_does_not_matter() -> None:
    records = make_digits_records()
    assert build_leaderboard(records[::-1]) == build_leaderboard(records)


def test_the_baseline_comes_first_then_rows_by_fid() -> None:
    (table,) = build_leaderboard(make_digits_records()).tables
    assert [row.recipe for row in table.rows] == ["vanilla", "self-transcendence", "vae-align"]


def test_comparing_and_writing_import_nothing_heavy() -> None:
    modules = "build", "plot", "published", "run_report", "terminal", "writers"
    imports = ", ".join(f"stbench.compare.{module}" for module in modules)
    code = f"import sys, {imports}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "stbench.compare.build" in loaded and not HEAVY & loaded
