"""A resumable queue of runs: what may start, what waits and why, what failed. It knows runs by their journal
entries and stage fingerprints, and nothing of training.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from stbench.core.errors import UserError
from stbench.runs.folder import RunFolder
from stbench.runs.journal import JournalEntry, State, merge_journals, read_journal, reconcile, write_journal
from stbench.runs.records import RunRecord
from stbench.sweep.executor import Executor, Job

POLL_SECONDS = 0.2
FOLDER = ".sweep"
"""What a sweep keeps for itself beside the run folders: its lock, and a config file for each run."""


class Monitor(ABC):
    """Watches a sweep."""

    @abstractmethod
    def update(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> None:
        """How the runs asked for stand, and why some wait; called after every look at them."""

    @abstractmethod
    def stopping(self) -> None:
        """The sweep was interrupted, and waits for its running ones to save and end."""


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


def opened(root: Path, asked: Sequence[JournalEntry]) -> list[JournalEntry]:
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
    return reconcile(entries, _records(root, entries))


def _records(root: Path, entries: Sequence[JournalEntry]) -> Iterator[RunRecord]:
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
        self._entries: dict[str, JournalEntry] = {}

    def run(self) -> list[JournalEntry]:
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

    def _asked(self) -> list[JournalEntry]:
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
        if self._in("running"):
            self._monitor.stopping()
        try:
            self._executor.stop()
        finally:
            for outcome in self._executor.poll():
                self._mark(outcome.run_id, "waiting" if outcome.error else "finished")
