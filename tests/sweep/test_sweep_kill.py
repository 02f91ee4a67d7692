"""kill -9 of a sweep at three points: the same command ends with the same runs and the same table."""

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
CLOCK = ("seconds", "paths")
"""Fields of a table that tell the time or the place."""


def suite(folder: Path) -> Path:
    """Four runs at one seed: two students of one teacher, and two alone."""
    taught = {"recipe": "self-transcendence", "set": BLOCKS}
    runs = [
        {"recipe": "vanilla"},
        taught,
        {**taught, "set": {**BLOCKS, "recipe.guidance": 1}},
        {"recipe": "vanilla", "seed": 1},
    ]
    defaults = {"backbone": "sit", "steps": STEPS, "precision": "fp32", "set": TINY}
    file = folder / "suite.json"
    file.write_text(json.dumps({"defaults": defaults, "groups": [{"runs": runs}]}))
    return file


def start(suite: Path, output: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "stbench", "sweep", "--suite", str(suite), "--output", str(output)]
    return subprocess.Popen(
        [*command, "--jobs", "2", "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(suite: Path, output: Path) -> None:
    said, _ = (process := start(suite, output)).communicate()
    assert process.returncode == 0, said.decode()[-2000:]
    assert b"4 finished, 0 failed" in said


def children(output: Path) -> list[int]:
    """The processes of the runs that are under way."""
    states = [RunFolder(path.parent) for path in output.glob("*/status.json")]
    return [folder.status()["pid"] for folder in states if folder.status()["state"] == "running"]


def kill_when(due: Callable[[], bool], suite: Path, output: Path, with_children: bool = False) -> None:
    """Start the sweep and kill it, and perhaps its runs (as a power cut does), when `due` says so."""
    process = start(suite, output)
    while not due():
        assert process.poll() is None, "the sweep ended before it was to be killed"
        time.sleep(0.01)
    process.kill()
    for pid in children(output) if with_children else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def clockless(value: Any) -> Any:
    """The value without what tells the time or the place."""
    if isinstance(value, dict):
        kept = {k: v for k, v in value.items() if not k.startswith(CLOCK)}
        return {name: clockless(item) for name, item in kept.items()}
    return [clockless(item) for item in value] if isinstance(value, list) else value


def table(output: Path) -> Any:
    """The leaderboard as `stbench compare` gives it."""
    command = [sys.executable, "-m", "stbench", "compare", str(output), "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return clockless(json.loads(done.stdout))


def finished(output: Path) -> int:
    return sum(entry.state == "finished" for entry in read_journal(output))


def everything(output: Path) -> dict[str, Any]:
    return {path.name: digest(path) for path in find_runs(output)}


@pytest.mark.slow
def test_killed_at_three_points(tmp_path: Path) -> None:
    asked, whole, killed = suite(tmp_path), tmp_path / "whole", tmp_path / "killed"
    finish(asked, whole)
    kill_when(lambda: any(killed.glob("*/checkpoints/*/state.json")), asked, killed)
    kill_when(lambda: any(killed.glob(".artifacts/*/artifact.json")), asked, killed, with_children=True)
    kill_when(lambda: finished(killed) == 2, asked, killed)
    assert finished(killed) < 4
    finish(asked, killed)
    assert read_journal(killed) == read_journal(whole)
    assert everything(killed) == everything(whole)
    assert table(killed) == table(whole)
    teachers = [stage for run in read_runs(find_runs(killed)) for stage in run.stages[:-1]]
    assert sorted(stage.reused for stage in teachers) == [False, True]


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_and_prints_the_command_that_goes_on(tmp_path: Path) -> None:
    asked, output = suite(tmp_path), tmp_path / "runs"
    process = start(asked, output)
    while not any(output.glob("*/checkpoints/*/state.json")):
        assert process.poll() is None
        time.sleep(0.01)
    under_way = children(output)
    assert under_way
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    assert process.returncode == 130
    assert (
        said.decode()
        .splitlines()[-1]
        .startswith("stopped; rerun the same command to resume: stbench sweep --suite")
    )
    assert {entry.state for entry in read_journal(output)} <= {"waiting", "finished"}
    for pid in under_way:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert {RunFolder(path).status()["state"] for path in find_runs(output)} <= {"stopped", "finished"}


@pytest.mark.slow
def test_the_runs_of_a_killed_sweep_end(tmp_path: Path) -> None:
    asked, output = suite(tmp_path), tmp_path / "runs"
    kill_when(lambda: any(output.glob("*/checkpoints/*/state.json")), asked, output)
    until = time.monotonic() + 60
    while any(RunFolder(path.parent).in_use() for path in output.glob("*/.lock")):
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
def test_a_run_of_a_sweep_has_the_bits_of_run(tmp_path: Path) -> None:
    asked, swept, alone = suite(tmp_path), tmp_path / "swept", tmp_path / "alone"
    finish(asked, swept)
    for config in swept.glob(".sweep/*.json"):
        values = json.loads(config.read_text())
        options = [
            part
            for key, value in values.pop("set").items()
            for part in ("--set", f"{key}={json.dumps(value)}")
        ]
        options += [part for key, value in values.items() for part in (f"--{key}", str(value))]
        command = [
            sys.executable,
            "-m",
            "stbench",
            "run",
            *options,
            "--device",
            "cpu",
            "--output",
            str(alone),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--no-reuse"], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    told = everything(alone), everything(swept)
    assert len(told[0]) == 4
    for runs in told:
        for run in runs.values():
            run["stages.jsonl"] = run["stages.jsonl"].replace('"reused": true', '"reused": false')
    assert told[0] == told[1]
