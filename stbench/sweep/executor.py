"""Where the runs of a sweep are made: the interface, and this machine's slots."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stbench.runs.journal import JournalEntry


@dataclass(frozen=True)
class Job:
    """One run to be made."""

    entry: JournalEntry
    arguments: tuple[str, ...]
    """What follows `stbench` on its command line."""
    stages: tuple[str, ...]
    """Fingerprints of its stages, in order. All but the last may come from another run."""

    @property
    def run_id(self) -> str:
        """Name of its run folder."""
        return self.entry.run_id


@dataclass(frozen=True)
class Outcome:
    """How a submitted job ended."""

    run_id: str
    error: str = ""
    """One line; "" if it finished."""


class Executor(ABC):
    """Where runs are made. LocalExecutor is this machine; a cluster's queue is another subclass."""

    @abstractmethod
    def free(self) -> bool:
        """Whether a job may be submitted now."""

    @abstractmethod
    def submit(self, job: Job) -> None:
        """Start a job; returns at once."""

    @abstractmethod
    def poll(self) -> list[Outcome]:
        """The jobs that ended since the last call."""

    @abstractmethod
    def stop(self) -> None:
        """Ask every job to save and end, and wait until they have."""


def log_file(root: Path, run_id: str) -> Path:
    """Where a run's output goes; each try is added to it."""
    return root / ".logs" / f"{run_id}.log"


def last_line(file: Path, start: int = 0, window: int = 4096) -> str:
    """The last line of a log that is not empty, looked for beyond byte `start` and in the last few KiB."""
    if not file.exists():
        return ""
    with open(file, "rb") as log:
        size = log.seek(0, os.SEEK_END)
        log.seek(max(start, size - window))
        lines = [" ".join(line.split()) for line in log.read().decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


@dataclass
class _Child:
    process: subprocess.Popen[bytes]
    slot: int
    log: Path
    start: int
    """Size of the log when this try began."""


class LocalExecutor(Executor):
    """A process for each run, in slots: the environment variables of a slot give it its threads or its GPU.

    A child is bound to this process by `stbench.child`: when this one is killed, it saves and ends.
    """

    def __init__(self, root: Path, slots: Sequence[Mapping[str, str]]) -> None:
        self._root, self._slots = root, slots
        self._children: dict[str, _Child] = {}

    def free(self) -> bool:
        """Whether a slot is empty."""
        return len(self._children) < len(self._slots)

    def submit(self, job: Job) -> None:
        """Start the run in the first empty slot, its output added to its log."""
        taken = {child.slot for child in self._children.values()}
        slot = next(n for n in range(len(self._slots)) if n not in taken)
        log = log_file(self._root, job.run_id)
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "stbench.cli.child", str(os.getpid()), *job.arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **self._slots[slot]}
        with open(log, "ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for the sweep, which asks each child once
            )
        self._children[job.run_id] = _Child(process, slot, log, start)

    def poll(self) -> list[Outcome]:
        """The processes that ended since the last call."""
        ended = {name: child for name, child in self._children.items() if child.process.poll() is not None}
        for name in ended:
            del self._children[name]
        return [Outcome(name, _error(child)) for name, child in ended.items()]

    def stop(self) -> None:
        """Ask the processes to save and end; a Ctrl-C while they do kills them, which loses no more than the
        steps since they last saved.
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


def _error(child: _Child) -> str:
    code, line = child.process.returncode, last_line(child.log, child.start)
    if code == 0:
        return ""
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (f" after: {line}" if line else "")
    return line.removeprefix("error: ") or f"exit code {code} without a word; see {child.log}"
