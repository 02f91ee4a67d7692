"""Time and size of `report` for 500 run folders: no torch, and a page of less than a megabyte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from time import process_time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from stbench.cli.compare import read_records
from stbench.compare.build import build_leaderboard
from stbench.report.page import render_page
from tests.fake_runs import write_run

pytestmark = pytest.mark.benchmark

STEPS = tuple(range(100, 2100, 100))
REPORT = """
import sys
from pathlib import Path
from stbench.cli.report import report
report([Path(sys.argv[1])], output=Path(sys.argv[2]))
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hundred recipes with five seeds and twenty evaluations each."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # durable writes would take minutes
        for i in range(500):
            recipe = "vanilla" if i < 5 else f"recipe-{i // 5}"
            fids = [(10 + i % 7) * 100 / step + i / 997 for step in STEPS]
            guided = {1.5: 0.3 + i / 991, 2.0: 0.4 + i / 983}
            write_run(root, recipe, i % 5, fids, steps=STEPS, teacher=800 * (i % 2), guided=guided)
    return root


def test_the_whole_process(benchmark: BenchmarkFixture, folders: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    command = [sys.executable, "-c", REPORT, str(folders), str(output)]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=3)
    assert output.stat().st_size < 1_000_000


def test_rendering_takes_less_time_than_reading(folders: Path) -> None:
    start = process_time()
    records, entries = read_records([folders])
    leaderboard = build_leaderboard(records, entries)
    middle = process_time()
    render_page(leaderboard, records)
    assert process_time() - middle < 2 * (middle - start)
