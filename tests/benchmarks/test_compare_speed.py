"""How long `compare` takes over two hundred run folders: under a second at best, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from stbench.compare.build import leaderboard
from stbench.runs.folder import find_runs, read_runs
from tests.fake_runs import LONG, build

pytestmark = pytest.mark.benchmark

COMPARE = """
import sys; from pathlib import Path
from stbench import report
from stbench.compare import leaderboard
from stbench.runs.folder import find_runs, read_runs
report.print_leaderboard(leaderboard(read_runs(find_runs(Path(sys.argv[1])))))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty recipes of five seeds each."""
    root = tmp_path_factory.mktemp("runs")
    for i in range(200):
        recipe = "vanilla" if i < 5 else f"recipe-{i // 5}"
        fids = [10 + i % 7, 3 + i % 3, 0.9 + i / 1000, 0.45 + i / 1000]
        build(root, recipe, i % 5, fids, steps=LONG, teacher=800 * (i % 2), guided={1.5: 0.3, 2.0: 0.4})
    return root


def test_reading_and_comparing(benchmark: BenchmarkFixture, folders: Path) -> None:
    board = benchmark(lambda: leaderboard(read_runs(find_runs(folders))))
    assert sum(len(row.seeds) for table in board.tables for row in table.rows) == 200


def test_the_whole_process(benchmark: BenchmarkFixture, folders: Path) -> None:
    command = [sys.executable, "-c", COMPARE, str(folders)]
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=5)
    assert benchmark.stats.stats.min < 1.0
