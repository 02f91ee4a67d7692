"""The resumable queue of a sweep: which runs may start, which wait and why, which failed.

Knows runs by their journal entries and stage fingerprints. Knows nothing about training.
"""

from __future__ import annotations

import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from stbench.core.errors import UserError
from stbench.core.files import lock_folder, remove_unfinished
from stbench.runs.folder import OutputFolder
from stbench.runs.journal import JournalEntry, State, merge_journals, read_journal, reconcile, write_journal
from stbench.runs.records import RunRecord
from stbench.sweep.executor import Executor, Job

POLL_SECONDS = 0.2


class Monitor(ABC):
    """Shows the progress of a sweep."""

    @abstractmethod
    def update(self, entries: Sequence[JournalEntry], reasons: Mapping[str, str]) -> None:
        """Show the state of the requested runs; called after every poll.

        Args:
            entries: Journal entries of the requested runs.
            reasons: Why a waiting run cannot start yet, by run id.
        """

    @abstractmethod
    def stopping(self, message: str) -> None:
        """Show what happens to the running runs of an interrupted sweep."""


@contextmanager
def lock_sweep(root: Path) -> Iterator[None]:
    """Allow only one sweep at a time into `root`.

    Raises:
        UserError: Another sweep is running there.
    """
    folder = OutputFolder(root).sweep
    with lock_folder(folder, "wait for that sweep, stop it, or choose another --output"):
        remove_unfinished(folder)
        yield


def initial_entries(root: Path, requested: Sequence[JournalEntry]) -> list[JournalEntry]:
    """Journal of `root` at the start of a sweep, with the requested runs added.

    Call it under `lock_sweep`: then no run of a local sweep is running, whatever the journal says. Requested
    runs are set back to "waiting", so that failed ones are retried. A finished run folder counts as finished.
    """
    retried = {entry.run_id for entry in requested}
    entries = [
        replace(entry, state="waiting", error="")
        if entry.run_id in retried or entry.state == "running"
        else entry
        for entry in merge_journals(read_journal(root), requested)
    ]
    return reconcile(entries, _records(root, entries))


def _records(root: Path, entries: Sequence[JournalEntry]) -> Iterator[RunRecord]:
    for entry in entries:
        folder = OutputFolder(root).run(entry.run_id)
        if folder.exists():
            # A damaged folder counts as unfinished: starting its run then reports the damage.
            with contextlib.suppress(UserError):
                yield folder.record()


class Sweep:
    """The queue. Starts runs in the requested order and writes the journal after every change."""

    def __init__(
        self,
        root: Path,
        jobs: Sequence[Job],
        *,
        executor: Executor,
        monitor: Monitor,
        pause: Callable[[], None] = lambda: time.sleep(POLL_SECONDS),
    ) -> None:
        self._root, self._output = root, OutputFolder(root)
        self._executor, self._monitor, self._pause = executor, monitor, pause
        self._jobs = {job.run_id: job for job in jobs}
        self._entries: dict[str, JournalEntry] = {}

    def run(self) -> list[JournalEntry]:
        """Execute every unfinished run and return the final entries of the requested runs.

        Call it under `lock_sweep`. On Ctrl-C the running runs are stopped and set back to "waiting", or left
        to the cluster that executes them, and KeyboardInterrupt is raised again.
        """
        entries = initial_entries(self._root, [job.entry for job in self._jobs.values()])
        self._entries = {entry.run_id: entry for entry in entries}
        for run_id in self._executor.adopt(self._jobs_in("waiting")):
            self._entries[run_id] = replace(self._entries[run_id], state="running")
        self._write_journal()
        try:
            while self._unfinished():
                self._collect_outcomes()
                reasons = self._start_jobs()
                self._monitor.update(self._requested(), reasons)
                if self._unfinished():
                    self._pause()
        finally:
            self._stop()
        return self._requested()

    def _requested(self) -> list[JournalEntry]:
        return [self._entries[run_id] for run_id in self._jobs]

    def _jobs_in(self, *states: State) -> list[Job]:
        return [job for run_id, job in self._jobs.items() if self._entries[run_id].state in states]

    def _unfinished(self) -> bool:
        return bool(self._jobs_in("waiting", "running"))

    def _write_journal(self) -> None:
        write_journal(self._root, self._entries.values())

    def _set_state(self, run_id: str, state: State, error: str = "") -> None:
        self._entries[run_id] = replace(self._entries[run_id], state=state, error=error)
        self._write_journal()

    def _collect_outcomes(self) -> None:
        for outcome in self._executor.poll():
            if not outcome.error:
                self._set_state(outcome.run_id, "finished")
            elif self._in_use(outcome.run_id):
                # The job failed because a `stbench run` started by hand owns the folder and will finish it.
                self._set_state(outcome.run_id, "waiting")
            else:
                self._set_state(outcome.run_id, "failed", outcome.error)

    def _start_jobs(self) -> dict[str, str]:
        """Submit the jobs that can start; returns why the other waiting runs cannot, by run id."""
        reasons = {
            job.run_id: "its run folder is in use"
            for job in self._jobs_in("waiting")
            if self._in_use(job.run_id)
        }
        for job in self._jobs_in("waiting"):
            if job.run_id in reasons:
                continue
            if provider := self._stage_provider(job, busy=reasons):
                reasons[job.run_id] = f"needs a stage of {provider}"
            elif self._executor.has_free_slot():
                self._executor.submit(job)
                self._set_state(job.run_id, "running")
        try:
            self._executor.flush()
        except BaseException:
            self._settle()
            raise
        return reasons

    def _stage_provider(self, job: Job, busy: Mapping[str, str]) -> str:
        """Return the run that will train a stage which `job` could reuse; "" if there is none to wait for.

        A run under way provides all of its stages. A run that has not started provides only its last stage:
        a last stage is always trained, whereas an earlier one could as well be trained by `job` itself.
        `busy` contains waiting runs whose folder is in use, so they are under way in another process.
        """
        needed = {stage for stage in job.stages[:-1] if not self._is_published(stage)}
        for other in self._jobs_in("waiting", "running"):
            under_way = self._entries[other.run_id].state == "running" or other.run_id in busy
            provided = other.stages if under_way else other.stages[-1:]
            if other is not job and needed.intersection(provided):
                return other.run_id
        return ""

    def _is_published(self, stage: str) -> bool:
        return self._output.artifact(stage).is_dir()

    def _in_use(self, run_id: str) -> bool:
        return self._output.run(run_id).in_use()

    def _stop(self) -> None:
        """Stop what still runs after an interruption and record it; does nothing after a normal end."""
        if self._jobs_in("running"):
            self._monitor.stopping(self._executor.stopping)
        try:
            self._executor.stop()
        finally:
            self._settle()

    def _settle(self) -> None:
        """Record the runs that ended or were not started; an error is retried by the next sweep."""
        for outcome in self._executor.poll():
            self._set_state(outcome.run_id, "waiting" if outcome.error else "finished")
