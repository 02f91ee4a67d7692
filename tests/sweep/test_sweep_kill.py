"""Interrupted and killed sweeps: rerunning the same command ends with the same runs and the same table."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stbench.runs.folder import RunFolder, find_runs, read_runs
from stbench.runs.journal import read_journal
from tests.conftest import BLOCKS, TINY
from tests.train.kill_driver import digest

STEPS = 30
VARIABLE = ("seconds", "paths")
"""Fields of a table that depend on time or place."""


def write_suite(folder: Path, runs: list[dict[str, Any]], steps: int = STEPS) -> Path:
    defaults = {"backbone": "sit", "steps": steps, "precision": "fp32", "set": TINY}
    file = folder / "suite.json"
    file.write_text(json.dumps({"defaults": defaults, "groups": [{"runs": runs}]}))
    return file


@pytest.fixture()
def suite(tmp_path: Path) -> Path:
    """Four runs: two students of one teacher, and two without a teacher."""
    taught = {"recipe": "self-transcendence", "set": BLOCKS}
    weaker = {**taught, "set": {**BLOCKS, "recipe.guidance": 1}}
    return write_suite(tmp_path, [{"recipe": "vanilla"}, taught, weaker, {"recipe": "vanilla", "seed": 1}])


def start(suite: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "stbench", "sweep", "--suite", str(suite), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--jobs", "2", "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_until(due: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    while not due():
        assert process.poll() is None, "the sweep ended too early"
        time.sleep(0.01)


def finish(suite: Path, output: Path) -> None:
    process = start(suite, output)
    printed, _ = process.communicate()
    assert process.returncode == 0, printed.decode()[-2000:]
    assert b"4 finished, 0 failed" in printed


def children(output: Path) -> list[int]:
    """Process ids of the running runs."""
    folders = [RunFolder(path.parent) for path in output.glob("*/status.json")]
    return [folder.status()["pid"] for folder in folders if folder.status()["state"] == "running"]


def has_saved(output: Path) -> bool:
    """Whether a run has saved its training state."""
    return any(output.glob("*/checkpoints/*/state.json"))


def kill_when(due: Callable[[], bool], suite: Path, output: Path, with_children: bool = False) -> None:
    """Start the sweep and kill it when `due` returns true, its runs as well if `with_children`."""
    process = start(suite, output)
    wait_until(due, process)
    process.kill()
    for pid in children(output) if with_children else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def without_variable_fields(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {name: item for name, item in value.items() if not name.startswith(VARIABLE)}
        return {name: without_variable_fields(item) for name, item in kept.items()}
    return [without_variable_fields(item) for item in value] if isinstance(value, list) else value


def table(output: Path) -> Any:
    """The leaderboard from `stbench compare`, without times and paths."""
    command = [sys.executable, "-m", "stbench", "compare", str(output), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return without_variable_fields(json.loads(done.stdout))


def count_finished(output: Path) -> int:
    return sum(entry.state == "finished" for entry in read_journal(output))


def digests(output: Path) -> dict[str, Any]:
    return {path.name: digest(path) for path in find_runs(output)}


@pytest.mark.slow
def test_a_run_whose_sweep_is_killed_saves_and_ends(tmp_path: Path) -> None:
    output = tmp_path / "runs"
    kill_when(
        lambda: has_saved(output), write_suite(tmp_path, [{"recipe": "vanilla"}], steps=100_000), output
    )
    (run,) = (RunFolder(path.parent) for path in output.glob("*/spec.json"))
    deadline = time.monotonic() + 120
    while run.in_use():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert run.status()["state"] == "stopped"


@pytest.mark.slow
def test_a_sweep_that_is_killed_three_times_ends_with_the_same_runs(suite: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(suite, whole)
    kill_when(lambda: has_saved(killed), suite, killed)
    kill_when(lambda: any(killed.glob(".artifacts/*/artifact.json")), suite, killed, with_children=True)
    kill_when(lambda: count_finished(killed) == 2, suite, killed)
    assert count_finished(killed) < 4
    finish(suite, killed)
    assert read_journal(killed) == read_journal(whole)
    assert digests(killed) == digests(whole)
    assert table(killed) == table(whole)
    teachers = [stage for run in read_runs(find_runs(killed)) for stage in run.stages[:-1]]
    assert sorted(stage.reused for stage in teachers) == [False, True]


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_and_prints_the_command_that_resumes(suite: Path, tmp_path: Path) -> None:
    output = tmp_path / "runs"
    process = start(suite, output)
    wait_until(lambda: has_saved(output), process)
    running = children(output)
    assert running
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate()
    assert process.returncode == 130
    last = printed.decode().splitlines()[-1]
    assert last.startswith("stopped; rerun the same command to resume: stbench sweep --suite")
    assert {entry.state for entry in read_journal(output)} <= {"waiting", "finished"}
    for pid in running:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert {RunFolder(path).status()["state"] for path in find_runs(output)} <= {"stopped", "finished"}


@pytest.mark.slow
def test_a_run_of_a_sweep_equals_the_same_run_started_by_hand(suite: Path, tmp_path: Path) -> None:
    swept, alone = tmp_path / "swept", tmp_path / "alone"
    finish(suite, swept)
    for config in swept.glob(".sweep/*.json"):
        values = json.loads(config.read_text())
        sets = [f"--set={key}={json.dumps(value)}" for key, value in values.pop("set").items()]
        options = [part for key, value in values.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "stbench", "run", *sets, *options]
        command += ["--device", "cpu", "--output", str(alone), "--no-reuse"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    by_hand, by_sweep = digests(alone), digests(swept)
    assert len(by_hand) == 4
    for runs in (by_hand, by_sweep):
        for run in runs.values():
            run["stages.jsonl"] = run["stages.jsonl"].replace('"reused": true', '"reused": false')
    assert by_hand == by_sweep
