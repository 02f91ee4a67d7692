"""A resumable queue of runs: what may start, what waits and why, what failed. It knows runs by their journal
entries, command lines and stage fingerprints, and nothing of training.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from stbench.errors import UserError
from stbench.journal import Entry, State, merge_journals, read_journal, settled, write_journal
from stbench.records import RunRecord
from stbench.results import RunFolder

POLL_SECONDS = 0.2
FOLDER = ".sweep"
"""What a sweep keeps for itself beside the run folders: its lock, and a config file for each run."""


@dataclass(frozen=True)
class Job:
    """One run to be made."""

    entry: Entry
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
        command = [sys.executable, "-m", "stbench.child", str(os.getpid()), *job.arguments]
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


class Monitor(ABC):
    """Watches a sweep."""

    @abstractmethod
    def update(self, entries: Sequence[Entry], reasons: Mapping[str, str]) -> None:
        """How the runs asked for stand, and why some wait; called after every look at them."""


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Own the sweeps into `root` for a `with` block; UserError if another one is at work."""
    folder = RunFolder(root / FOLDER)
    with ExitStack() as stack:
        try:
            stack.enter_context(folder.lock())
        except UserError:
            raise UserError(
                f"another sweep is at work in {root}; wait for it, stop it, or choose another --output"
            ) from None
        yield


def opened(root: Path, asked: Sequence[Entry]) -> list[Entry]:
    """The journal as it stands before a sweep: what was ever asked for; nothing runs, what failed and is
    asked for again waits. Call it while `alone`.
    """
    again = {entry.run_id for entry in asked}
    entries = [
        replace(entry, state="waiting", error="")
        if entry.run_id in again or entry.state == "running"
        else entry
        for entry in merge_journals(read_journal(root), asked)
    ]
    return settled(entries, _records(root, entries))


def _records(root: Path, entries: Sequence[Entry]) -> Iterator[RunRecord]:
    for entry in entries:
        folder = RunFolder(root / entry.run_id)
        if folder.exists():
            with contextlib.suppress(UserError):  # a damaged folder is not finished: its run will say why
                yield folder.record()


class Sweep:
    """The queue: starts what may start, in the order asked for, and writes the journal at every change."""

    def __init__(
        self,
        root: Path,
        jobs: Sequence[Job],
        executor: Executor,
        monitor: Monitor,
        pause: Callable[[], None] = lambda: time.sleep(POLL_SECONDS),
    ) -> None:
        self._root, self._executor, self._monitor, self._pause = root, executor, monitor, pause
        self._jobs = {job.run_id: job for job in jobs}
        self._entries: dict[str, Entry] = {}

    def run(self) -> list[Entry]:
        """Make every run that is not finished; returns how each ended. Call it while `alone`.

        An interruption stops the running ones, puts them back to waiting, and goes on up.
        """
        known = opened(self._root, [job.entry for job in self._jobs.values()])
        self._entries = {entry.run_id: entry for entry in known}
        self._write()
        try:
            while self._pending():
                self._collect()
                self._monitor.update(self._asked(), self._start())
                if self._pending():
                    self._pause()
        finally:
            self._halt()
        return self._asked()

    def _asked(self) -> list[Entry]:
        return [self._entries[run_id] for run_id in self._jobs]

    def _in(self, *states: State) -> list[Job]:
        return [job for name, job in self._jobs.items() if self._entries[name].state in states]

    def _pending(self) -> bool:
        return bool(self._in("waiting", "running"))

    def _write(self) -> None:
        write_journal(self._root, self._entries.values())

    def _mark(self, run_id: str, state: State, error: str = "") -> None:
        self._entries[run_id] = replace(self._entries[run_id], state=state, error=error)
        self._write()

    def _collect(self) -> None:
        for outcome in self._executor.poll():
            if not outcome.error:
                self._mark(outcome.run_id, "finished")
            elif self._in_use(outcome.run_id):  # by a run typed by hand, which will finish it
                self._mark(outcome.run_id, "waiting")
            else:
                self._mark(outcome.run_id, "failed", outcome.error)

    def _start(self) -> dict[str, str]:
        """Submit what may start; returns why the others wait."""
        reasons = {
            job.run_id: "its folder is in use" for job in self._in("waiting") if self._in_use(job.run_id)
        }
        for job in self._in("waiting"):
            if job.run_id in reasons:
                continue
            if maker := self._maker(job, reasons):
                reasons[job.run_id] = f"for a stage of {maker}"
            elif self._executor.free():
                self._executor.submit(job)
                self._mark(job.run_id, "running")
        return reasons

    def _maker(self, job: Job, busy: Mapping[str, str]) -> str:
        """The run that makes a stage which this one needs, "" for none: one under way that has the stage
        before it, or one whose last stage it is, since a last stage is always trained.
        """
        needed = {stage for stage in job.stages[:-1] if not self._published(stage)}
        for other in self._in("waiting", "running"):
            under_way = self._entries[other.run_id].state == "running" or other.run_id in busy
            made = other.stages if under_way else other.stages[-1:]
            if other is not job and needed.intersection(made):
                return other.run_id
        return ""

    def _published(self, stage: str) -> bool:
        return (self._root / ".artifacts" / stage[:16]).is_dir()

    def _in_use(self, run_id: str) -> bool:
        return RunFolder(self._root / run_id).in_use()

    def _halt(self) -> None:
        """After an interruption nothing runs: stop it, and say so in the journal."""
        try:
            self._executor.stop()
        finally:
            for outcome in self._executor.poll():
                self._mark(outcome.run_id, "waiting" if outcome.error else "finished")
