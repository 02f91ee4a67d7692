"""The function of a Slurm job: outcomes and signals, with a child process that stands for the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stbench.sweep.executor import last_line
from stbench.sweep.slurm_job import RunFailed, RunJob

RUN = """
import signal, sys, time
signals = []
signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
print("step 1", flush=True)
while not signals:
    time.sleep(0.01)
print("saved", flush=True)
sys.exit(130)
"""
TASK = """
import os, signal, sys
from pathlib import Path
from stbench.sweep.slurm_job import RunJob
job = RunJob(("run",), Path(sys.argv[1]), Path(sys.argv[2]))
def checkpoint(number, frame):
    job.checkpoint()
    raise SystemExit(255)
signal.signal(signal.SIGUSR2, checkpoint)
os.environ["PYTHONPATH"] = sys.argv[3]
os.chdir(sys.argv[3])
job()
"""


@pytest.fixture()
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], RunJob]:
    """A job whose run is the given program instead of stbench.cli.child."""
    package = tmp_path / "stbench" / "cli"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_PROCID", raising=False)

    def write(program: str) -> RunJob:
        (package / "child.py").write_text(program)
        return RunJob(("run",), tmp_path / "logs" / "run.log", tmp_path / "outcome.json")

    return write


def outcome(job: RunJob) -> str | None:
    return json.loads(job.outcome.read_text())["error"] if job.outcome.exists() else None


def test_a_finished_run(make: Callable[[str], RunJob], monkeypatch: pytest.MonkeyPatch) -> None:
    job = make("import os; print(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    monkeypatch.setenv("SLURM_PROCID", "1")
    job()
    assert outcome(job) is None  # only the first task says that the run has finished
    monkeypatch.setenv("SLURM_PROCID", "0")
    job()
    assert outcome(job) == "" and job.log.read_text() == "7\n7\n"


def test_a_failed_run_leaves_its_error_and_the_first_error_stays(make: Callable[[str], RunJob]) -> None:
    job = make("raise SystemExit('error: no such file')")
    with pytest.raises(RunFailed, match="^no such file$"):
        job()
    assert outcome(job) == "no such file"
    with pytest.raises(RunFailed):
        make("import os; os.kill(os.getpid(), 9)")()
    assert outcome(job) == "no such file"
    assert [path.name for path in job.outcome.parent.iterdir() if path.name.startswith(".")] == []


def test_a_run_that_stopped_by_itself_has_no_outcome(
    make: Callable[[str], RunJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make("raise SystemExit(130)")
    with pytest.raises(SystemExit):
        job()
    monkeypatch.setenv("SLURM_PROCID", "1")
    job()  # srun must not end the first task because of this one
    assert outcome(job) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_makes_the_run_save_and_leaves_no_outcome(
    number: signal.Signals, make: Callable[[str], RunJob], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make(RUN)
    monkeypatch.delenv("PYTHONPATH")
    command = [sys.executable, "-c", TASK, str(job.log), str(job.outcome), str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True, cwd=tmp_path.parent)
    deadline = time.monotonic() + 60
    while last_line(job.log) != "step 1":
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)  # as Slurm does: the task and its child
    assert process.wait(60) == (130 if number == signal.SIGTERM else 255)
    assert last_line(job.log) == "saved" and outcome(job) is None
