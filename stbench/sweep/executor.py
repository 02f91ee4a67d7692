"""Executors start the runs of a sweep: the interface, and child processes on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stbench.core.text import visible
from stbench.runs.folder import OutputFolder
from stbench.runs.journal import JournalEntry

LOG_TAIL = 4096
"""Bytes at the end of a log in which its last line is searched."""


@dataclass(frozen=True)
class Job:
    """A run to execute."""

    entry: JournalEntry
    arguments: tuple[str, ...]
    """Command line after `stbench`."""
    stages: tuple[str, ...]
    """Fingerprints of the stages, in order. All stages but the last can be reused from another run."""

    @property
    def run_id(self) -> str:
        """Name of the run folder."""
        return self.entry.run_id


@dataclass(frozen=True)
class Outcome:
    """Result of a job."""

    run_id: str
    error: str = ""
    """One-line error message; "" if the run finished."""


class Executor(ABC):
    """Runs jobs in the background: on this machine, or on a cluster."""

    stopping = "stopping: waiting for the running runs to save; press Ctrl-C again to kill them"
    """What the sweep prints before it calls `stop`."""

    def adopt(self, jobs: Sequence[Job]) -> list[str]:
        """Run ids of the jobs that an earlier sweep submitted and that have not ended.

        Here none: child processes do not outlive their sweep.
        """
        return []

    @abstractmethod
    def has_free_slot(self) -> bool:
        """Whether another job can be submitted now."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Start a job without waiting for it, at the latest at the next `flush`."""

    def flush(self) -> None:
        """Start the jobs that were submitted since the last call. Here nothing is left to do."""

    @abstractmethod
    def poll(self) -> list[Outcome]:
        """Outcomes of the jobs that ended since the last call."""

    @abstractmethod
    def stop(self) -> None:
        """Called when the sweep ends. Jobs that cannot continue alone save their state and exit first."""


def last_line(file: Path, start: int = 0) -> str:
    """Last non-empty line of a log after byte `start`, with runs of spaces collapsed; "" if there is none."""
    if not file.exists():
        return ""
    with open(file, "rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(start, size - LOG_TAIL))
        tail = log.read().decode(errors="replace")
    lines = (" ".join(line.split()) for line in reversed(tail.splitlines()))
    return visible(next((line for line in lines if line), ""))


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    slot: int
    log: Path
    log_start: int
    """Size of the log before this attempt."""


class LocalExecutor(Executor):
    """One child process per run, in a fixed number of slots.

    A slot is a set of environment variables that gives the child its threads and its GPU. Children run
    `stbench.cli.child`, which ends the run if this process dies.
    """

    def __init__(self, root: Path, slots: Sequence[Mapping[str, str]]) -> None:
        self._output, self._slots = OutputFolder(root), slots
        self._children: dict[str, _Child] = {}

    def has_free_slot(self) -> bool:
        """Whether a slot is free."""
        return len(self._children) < len(self._slots)

    def submit(self, job: Job) -> None:
        """Start the run in the first free slot; its output is appended to its log."""
        taken = {child.slot for child in self._children.values()}
        slot = next(index for index in range(len(self._slots)) if index not in taken)
        log = self._output.run_log(job.run_id)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "stbench.cli.child", str(os.getpid()), *job.arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self._slots[slot]}
        with open(log, "ab", opener=open_log) as file:
            log_start = file.tell()
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C must reach only the sweep, which then stops each child once
            )
        self._children[job.run_id] = _Child(process, slot, log, log_start)

    def poll(self) -> list[Outcome]:
        """Outcomes of the processes that ended since the last call."""
        ended = {name: child for name, child in self._children.items() if child.process.poll() is not None}
        for name in ended:
            del self._children[name]
        return [
            Outcome(name, exit_message(child.process.returncode, child.log, child.log_start))
            for name, child in ended.items()
        ]

    def stop(self) -> None:
        """Ask the processes to save and exit, and wait for them.

        A second Ctrl-C while waiting kills them; they lose the steps since their last saved state.
        """
        try:
            for child in self._children.values():
                child.process.terminate()
            for child in self._children.values():
                child.process.wait()
        except KeyboardInterrupt:
            for child in self._children.values():
                child.process.kill()
                child.process.wait()
            raise


def open_log(path: str, flags: int) -> int:
    """Open a log, but not what a link in its place leads to, and without waiting for the reader of a pipe."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def exit_message(code: int, log: Path, log_start: int) -> str:
    """One-line error of a process that ended with `code`, taken from its log; "" if it succeeded."""
    line = last_line(log, log_start)
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (f" after: {line}" if line else "")
    return line.removeprefix("error: ") or f"exit code {code} without any output; see {log}"
