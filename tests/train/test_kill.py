"""A run that is killed with SIGKILL anywhere and resumed ends with the same bits."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

DRIVER = Path(__file__).with_name("kill_driver.py")
FORCED = {
    "training": ["training_step:2", "training_step:5", "training_step:9", "training_step:12"],
    "checkpoint": ["atomic_file.fsync:5", "atomic_file.fsync:9", "_sync_folder.fsync:20", "save_state:4"],
    "evaluation": ["generate:1", "compute_metrics:2", "append_points:2", "validation_loss:3"],
    "between stages": ["write_artifact:1", "add_stage:1", "publish_artifact:1", "setup:1"],
}


def survive(folder: Path, events: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder), *events], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(outcomes) == len(events)
    assert [o for o in outcomes if not o["killed"]] == []
    assert [o for o in outcomes if not o["same"]] == []


def test_killed_once_in_each_phase(tmp_path: Path) -> None:
    survive(tmp_path, [events[-1] for events in FORCED.values()])


@pytest.mark.slow
def test_killed_at_forced_and_random_points(tmp_path: Path) -> None:
    drawn = random.Random(20)
    anywhere = [f"any:{drawn.uniform(0.02, 0.98):.4f}" for _ in range(20)]
    survive(tmp_path, [event for events in FORCED.values() for event in events] + anywhere)
