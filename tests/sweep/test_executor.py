"""A process for each run: its slot, log, error and end; and what a person sees of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from stbench.cli.sweep import slots
from stbench.sweep.executor import Executor, LocalExecutor, Outcome, last_line, log_file
from stbench.sweep.monitor import Lines, LiveTable, duration
from tests.sweep.test_queue import job


def wait_for(executor: Executor) -> list[Outcome]:
    found: list[Outcome] = []
    while not found:
        time.sleep(0.02)
        found = executor.poll()
    return found


def test_a_process_for_each_run_with_its_slot_its_log_and_its_error(tmp_path: Path) -> None:
    executor = LocalExecutor(tmp_path, [{"COLUMNS": "33"}])
    good, bad = job("good"), replace(job("bad"), arguments=("show", "nowhere"))
    good = replace(good, arguments=("--version",))
    log_file(tmp_path, good.run_id).parent.mkdir()
    log_file(tmp_path, bad.run_id).write_text("an earlier try\n")
    executor.submit(good)
    assert not executor.free()
    assert wait_for(executor) == [Outcome(good.run_id)]
    assert executor.free()
    assert log_file(tmp_path, good.run_id).read_text().startswith("stbench 0.")
    executor.submit(bad)
    (outcome,) = wait_for(executor)
    assert outcome.error.startswith("nowhere is no run folder") and "\n" not in outcome.error
    assert log_file(tmp_path, bad.run_id).read_text().startswith("an earlier try\nerror: nowhere")


@pytest.fixture()
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that runs in place of stbench.cli.child."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = tmp_path / "stbench" / "cli"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    return package / "child.py"


def test_a_killed_process_is_a_failed_run(tmp_path: Path, stand_in: Path) -> None:
    stand_in.write_text("import os, signal\nprint('step 3')\nos.kill(os.getpid(), signal.SIGKILL)\n")
    executor = LocalExecutor(tmp_path, [{}])
    executor.submit(job("vanilla"))
    assert wait_for(executor) == [Outcome(job("vanilla").run_id, "killed by SIGKILL after: step 3")]


def test_a_process_that_fails_without_a_word_names_its_log(tmp_path: Path, stand_in: Path) -> None:
    stand_in.write_text("raise SystemExit(7)\n")
    executor = LocalExecutor(tmp_path, [{}])
    executor.submit(job("vanilla"))
    (outcome,) = wait_for(executor)
    assert outcome.error.startswith("exit code 7") and outcome.error.endswith(".log")


def test_a_second_ctrl_c_kills_what_does_not_stop(tmp_path: Path, stand_in: Path) -> None:
    stubborn = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(600)\n"
    )
    stand_in.write_text(stubborn)
    executor = LocalExecutor(tmp_path, [{}])
    executor.submit(job("vanilla"))
    while last_line(log_file(tmp_path, job("vanilla").run_id)) != "deaf":
        time.sleep(0.02)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            executor.stop()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [outcome.error for outcome in executor.poll()] == ["killed by SIGKILL after: deaf"]


def test_a_child_without_its_parent_ends() -> None:
    command = [sys.executable, "-m", "stbench.cli.child", "1", "list", "samplers"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == b""


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("old\n" * 3000 + "step 100/800:  loss 1\n\n")
    assert last_line(log) == "step 100/800: loss 1"
    assert last_line(log, start=log.stat().st_size) == ""


@pytest.mark.parametrize(("jobs", "threads"), [(1, 4), (2, 2), (3, 1), (9, 1), (None, 1)])
def test_slots_share_the_cores(monkeypatch: pytest.MonkeyPatch, jobs: int | None, threads: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    found = slots(torch.device("cpu"), jobs)
    assert found == [{"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}] * (jobs or 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert {slot["OMP_NUM_THREADS"] for slot in slots(torch.device("cpu"), jobs)} == {"1"}


def test_slots_take_the_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    cuda = torch.device("cuda")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(cuda, None)] == ["2", "5"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(cuda, 3)] == ["2", "5", "2"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(torch.device("cuda:1"), None)] == ["5"]


def test_lines_tell_each_change_once() -> None:
    told = StringIO()
    lines = Lines(Console(file=told, width=40))
    first, second = job("vanilla").entry, job("taught").entry
    lines.update([first, second], {})
    lines.update([replace(first, state="running"), second], {})
    lines.update([replace(first, state="running"), second], {})
    lines.update([replace(first, state="failed", error="loss [0] is nan"), second], {})
    printed = told.getvalue().splitlines()
    assert printed[0] == "sweep of 2 runs: 0 running, 2 waiting, 0 failed, 0 finished"
    assert printed[1] == f"running: {first.run_id}"
    assert printed[2].startswith(f"failed: {first.run_id}  0:0") and printed[2].endswith("loss [0] is nan")
    assert len(printed) == 3


def test_the_table_shows_what_runs_and_why_others_wait(tmp_path: Path) -> None:
    running, held, failed = (job(name).entry for name in ("vanilla", "held", "lost"))
    log_file(tmp_path, running.run_id).parent.mkdir()
    log_file(tmp_path, running.run_id).write_text("vanilla step 100/800: denoise 0.4\n")
    told = StringIO()
    console = Console(file=told, width=140)
    table = LiveTable(tmp_path, console).table(
        [replace(running, state="running"), held, replace(failed, state="failed", error="loss is nan")],
        {held.run_id: "for a stage of that one"},
    )
    console.print(table)
    for text in ("step 100/800: denoise 0.4", "for a stage of that one", "loss is nan", "1 failed"):
        assert text in told.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (4.4, 75, 3675)] == ["0:04", "1:15", "1:01:15"]
