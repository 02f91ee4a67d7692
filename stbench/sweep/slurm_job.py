"""The function that a Slurm job of a sweep executes in each of its tasks: one `stbench run` until its end.

Signals. Before the time limit, and before a preemption that is announced, Slurm sends SIGUSR2: submitit then
calls `checkpoint` on the first task and requeues the job. On `scancel`, `scontrol requeue` and preemption
Slurm sends SIGTERM. In each case the run saves and exits, and the next attempt resumes it. Only a run that
ended by itself leaves an outcome.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

from stbench.core.files import temporary_path
from stbench.sweep.executor import exit_message, open_log

INTERRUPTED = 130
"""Exit code of a run that saved and stopped."""
OTHERS_SECONDS = 5.0


class RunFailed(Exception):
    """The run of a job failed; the message is its error."""


@dataclass
class RunJob:
    """Executes `stbench ARGUMENTS` in a child process and writes how it ended."""

    arguments: tuple[str, ...]
    log: Path
    """To which the output of all tasks is appended."""
    outcome: Path
    """File for the error of the run in JSON, "" if it finished. The first task that writes it wins."""
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    _stopping: bool = field(default=False, repr=False)

    def __call__(self) -> None:
        """Run until the end.

        Raises:
            RunFailed: The run failed, so that Slurm ends the other tasks and shows the job as failed.
            SystemExit: The run was asked to stop and has saved.
        """
        before = signal.signal(signal.SIGTERM, self._forward)
        try:
            log_start = self._start()
            code = self._wait()
        except Exception as error:  # raised by submitit's signal handler after too many requeues
            self._write_outcome(str(error))
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
        is_main = os.environ.get("SLURM_PROCID", "0") == "0"
        if self._stopping or code == INTERRUPTED:
            if is_main:
                sys.exit(INTERRUPTED)
            return  # not with an error, upon which srun would end the main rank before it has saved
        error_message = exit_message(code, self.log, log_start)
        if error_message:
            if not is_main and code > 0:
                self._wait_for_outcome()
            self._write_outcome(error_message)
            raise RunFailed(error_message)
        if is_main:
            self._write_outcome("")

    def checkpoint(self) -> Any:
        """Make the run save and exit; returns what submitit submits for the next attempt."""
        from submitit.helpers import DelayedSubmission

        self._stop()
        return DelayedSubmission(replace(self, _process=None, _stopping=False))

    def _start(self) -> int:
        """Start the run; returns the size of its log before."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "stbench.cli.child", str(os.getpid()), *self.arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
            environment |= {"OMP_NUM_THREADS": cores, "MKL_NUM_THREADS": cores}
        with open(self.log, "ab", opener=open_log) as file:
            log_start = file.tell()
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=_ignore_user_signals,
            )
        return log_start

    def _wait(self) -> int:
        assert self._process is not None
        if self._stopping:  # the signal came before there was a process
            self._process.terminate()
        return self._process.wait()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Pass SIGTERM on: with cgroups Slurm signals this process only, otherwise the run as well."""
        self._stopping = True
        if self._process is not None:
            self._process.terminate()

    def _stop(self) -> None:
        """Ask the run to save and exit, and wait for it. Called in a signal handler while `_wait` blocks."""
        self._stopping = True
        if self._process is None:
            return
        try:
            os.kill(self._process.pid, signal.SIGTERM)
            # Popen.wait would wait for its own lock, which the interrupted `_wait` holds.
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        except (ProcessLookupError, ChildProcessError):
            pass  # it has ended already

    def _wait_for_outcome(self) -> None:
        """Give the task that printed the error time to write it: only one of the ranks prints it."""
        deadline = time.monotonic() + OTHERS_SECONDS
        while not self.outcome.exists() and time.monotonic() < deadline:
            time.sleep(0.1)

    def _write_outcome(self, error: str) -> None:
        temporary = temporary_path(self.outcome)
        temporary.write_text(json.dumps({"error": error}) + "\n")
        try:
            os.link(
                temporary, self.outcome
            )  # fails if another task was first; a reader never sees half a file
        except FileExistsError:
            pass
        finally:
            temporary.unlink()


def _ignore_user_signals() -> None:
    """In the run: they are meant for submitit, and without a handler they would kill."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
