"""Time of `compare` for 1,000 run folders: less than three seconds in a process of its own, without torch."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from stbench.cli.compare import read_leaderboard
from tests.fake_runs import LONG_STEPS, write_run

pytestmark = pytest.mark.benchmark

COMPARE = """
import sys
from pathlib import Path
from stbench.cli.compare import compare
compare([Path(sys.argv[1])])
assert "torch" not in sys.modules
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred recipes with five seeds each."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)  # durable writes would take minutes
        for i in range(1000):
            recipe = "vanilla" if i < 5 else f"recipe-{i // 5}"
            fids = [10 + i % 7, 3 + i % 3, 0.9 + i / 1000, 0.45 + i / 1000]
            guided = {1.5: 0.3, 2.0: 0.4}
            write_run(root, recipe, i % 5, fids, steps=LONG_STEPS, teacher=800 * (i % 2), guided=guided)
    return root


def processor_seconds() -> float:
    """Return the processor time of all processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_reading_and_comparing(benchmark: BenchmarkFixture, folders: Path) -> None:
    leaderboard = benchmark(lambda: read_leaderboard([folders]))
    assert sum(len(row.seeds) for table in leaderboard.tables for row in table.rows) == 1000


def test_the_whole_process(benchmark: BenchmarkFixture, folders: Path) -> None:
    """The limit is on processor time, which other work on the machine does not change."""
    command = [sys.executable, "-c", COMPARE, str(folders)]
    before = processor_seconds()
    benchmark.pedantic(lambda: subprocess.run(command, check=True, capture_output=True), rounds=5)
    assert (processor_seconds() - before) / 5 < 3.0
