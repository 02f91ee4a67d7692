"""Child processes of a sweep: slots, logs, errors, and what happens when either side dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.runs.folder import OutputFolder
from stbench.sweep.executor import Executor, LocalExecutor, Outcome, last_line
from tests.fake_jobs import job


def wait_for(executor: Executor) -> list[Outcome]:
    found: list[Outcome] = []
    while not found:
        time.sleep(0.02)
        found = executor.poll()
    return found


def test_a_process_per_run_with_slot_log_and_error(tmp_path: Path) -> None:
    executor = LocalExecutor(tmp_path, [{"COLUMNS": "33"}])
    good, bad = job("good"), replace(job("bad"), arguments=("show", "nowhere"))
    good = replace(good, arguments=("--version",))
    OutputFolder(tmp_path).run_log(good.run_id).parent.mkdir()
    OutputFolder(tmp_path).run_log(bad.run_id).write_text("an earlier attempt\n")
    executor.submit(good)
    assert not executor.has_free_slot()
    assert wait_for(executor) == [Outcome(good.run_id)]
    assert executor.has_free_slot()
    assert OutputFolder(tmp_path).run_log(good.run_id).read_text().startswith("stbench 0.")
    executor.submit(bad)
    (outcome,) = wait_for(executor)
    assert outcome.error.startswith("nowhere is not a run folder") and "\n" not in outcome.error
    log = OutputFolder(tmp_path).run_log(bad.run_id)
    assert log.read_text().startswith("an earlier attempt\nerror: nowhere")


@pytest.fixture()
def child_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that children execute instead of stbench.cli.child."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = tmp_path / "stbench" / "cli"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    return package / "child.py"


def test_a_killed_process_is_a_failed_run(tmp_path: Path, child_file: Path) -> None:
    child_file.write_text("import os, signal\nprint('step 3')\nos.kill(os.getpid(), signal.SIGKILL)\n")
    executor = LocalExecutor(tmp_path, [{}])
    executor.submit(job("vanilla"))
    assert wait_for(executor) == [Outcome(job("vanilla").run_id, "killed by SIGKILL after: step 3")]


def test_the_error_of_a_process_without_output_names_its_log(tmp_path: Path, child_file: Path) -> None:
    child_file.write_text("raise SystemExit(7)\n")
    executor = LocalExecutor(tmp_path, [{}])
    executor.submit(job("vanilla"))
    (outcome,) = wait_for(executor)
    assert outcome.error.startswith("exit code 7 without any output") and outcome.error.endswith(".log")


def test_a_second_ctrl_c_kills_processes_that_do_not_stop(tmp_path: Path, child_file: Path) -> None:
    child_file.write_text(
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('deaf')\ntime.sleep(600)\n"
    )
    executor = LocalExecutor(tmp_path, [{}])
    executor.submit(job("vanilla"))
    while last_line(OutputFolder(tmp_path).run_log(job("vanilla").run_id)) != "deaf":
        time.sleep(0.02)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)  # stands for the second Ctrl-C
    try:
        with pytest.raises(KeyboardInterrupt):
            executor.stop()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [outcome.error for outcome in executor.poll()] == ["killed by SIGKILL after: deaf"]


def test_a_child_whose_parent_is_gone_ends() -> None:
    command = [sys.executable, "-m", "stbench.cli.child", "1", "list", "samplers"]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGTERM and done.stdout == b""


def test_the_last_line_of_a_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_line(log) == ""
    log.write_text("old\n" * 3000 + "step 100/800:  loss 1\n\n")
    assert last_line(log) == "step 100/800: loss 1"
    assert last_line(log, start=log.stat().st_size) == ""


def test_a_link_or_a_pipe_in_place_of_a_log_is_refused(tmp_path: Path) -> None:
    log = OutputFolder(tmp_path).run_log(job("good").run_id)
    log.parent.mkdir()
    (tmp_path / "precious").write_text("content")
    log.symlink_to(tmp_path / "precious")
    with pytest.raises(OSError):
        LocalExecutor(tmp_path, [{}]).submit(replace(job("good"), arguments=("--version",)))
    assert (tmp_path / "precious").read_text() == "content"
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(OSError):
        LocalExecutor(tmp_path, [{}]).submit(replace(job("good"), arguments=("--version",)))
