"""Slurm executor: the runs of a sweep as job arrays, submitted through submitit.

Every submission has a folder of its own, `.sweep/slurm/TOKEN`, and the job name `stbench-TOKEN`. Its list of
runs is written before it is submitted, so a sweep that is killed at any time finds its jobs again by their
name. How a run ended is read from a file that its job writes; Slurm is asked only which jobs still exist,
with `squeue`, because not every cluster keeps accounts for `sacct`.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stbench.core.errors import UserError
from stbench.core.files import absolute_path, atomic_write
from stbench.core.safe_load import parse_json, read_text
from stbench.core.text import visible
from stbench.runs.folder import OutputFolder
from stbench.sweep.executor import Executor, Job, Outcome, last_line
from stbench.sweep.slurm_commands import Slurm
from stbench.sweep.slurm_job import RunJob
from stbench.sweep.slurm_request import SlurmRequest

MAX_ARRAY = 1000
"""Jobs of one array; Slurm's default limit is 1001."""
LOOK_SECONDS, ASK_SECONDS, GRACE_SECONDS = 1.0, 10.0, 20.0
"""Between looks for files of ended runs; between calls of squeue; how long a network file system may hide the
file of a job that Slurm no longer has."""

ENDED = (
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)
"""States of jobs that will not continue. Any other state may lead to an outcome."""
_TOKEN = re.compile("[0-9a-f]{12}")


@dataclass
class _Submitted:
    folder: Path
    index: int
    log_start: int = 0
    """Size of the log of the run before."""
    job_id: str = ""
    state: str = "PENDING"
    gone_since: float | None = None
    """When Slurm was first seen not to have the job any more."""

    @property
    def outcome(self) -> Path:
        return outcome_file(self.folder, self.index)


def outcome_file(folder: Path, index: int) -> Path:
    """File in which a job says how its run ended."""
    return folder / f"outcome-{index}.json"


class SlurmExecutor(Executor):
    """Submits the runs that can start as a job array. The jobs go on if the sweep ends; `adopt` finds them.

    Args:
        root: The output folder, on a file system that all nodes share.
        request: What every job needs.
        slurm: The commands of Slurm.
        clock: Seconds of a monotonic clock.
    """

    stopping = (
        "the jobs stay in Slurm; rerun the same command to follow them, or cancel them with scancel, "
        "which lets the runs save"
    )

    def __init__(
        self,
        root: Path,
        request: SlurmRequest,
        *,
        slurm: Slurm | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._output, self._request = OutputFolder(absolute_path(root)), request
        self._slurm, self._clock = slurm or Slurm(), clock
        self._waiting: list[Job] = []
        self._submitted: dict[str, _Submitted] = {}
        self._refused: list[Outcome] = []
        self._last_look = self._last_ask = float("-inf")

    def adopt(self, jobs: Sequence[Job]) -> list[str]:
        """Take over the jobs of earlier sweeps; deletes the files of submissions that have ended."""
        folders = self._submissions()
        found = self._slurm.find([folder.name for folder in folders]) if folders else []
        if found is None:
            raise UserError(
                "squeue does not answer, so jobs of an earlier sweep cannot be found; try again later"
            )
        live = {(job.token, job.index): job for job in found if job.state not in ENDED}
        requested = {job.run_id for job in jobs}
        for folder in folders:
            for index, run_id in enumerate(_listed_runs(folder, self._output.path)):
                job = live.get((folder.name, index))
                if job is not None and run_id in requested and not outcome_file(folder, index).exists():
                    self._submitted[run_id] = _Submitted(folder, index, 0, job.job_id, job.state)
            if not any(token == folder.name for token, _ in live):
                shutil.rmtree(folder, ignore_errors=True)
        return list(self._submitted)

    def has_free_slot(self) -> bool:
        """Whether another job can be submitted without exceeding the jobs at a time.

        The first array holds every run that can start, and Slurm keeps to the limit. Later ones are only as
        large as the limit allows next to the jobs before them.
        """
        if len(self._waiting) >= MAX_ARRAY:
            return False
        most = self._request.most
        return most is None or not self._submitted or len(self._submitted) + len(self._waiting) < most

    def submit(self, job: Job) -> None:
        """Add the job to the next array."""
        self._waiting.append(job)

    def flush(self) -> None:
        """Submit the array."""
        jobs, self._waiting = self._waiting, []
        if not jobs:
            return
        folder = self._output.slurm / secrets.token_hex(6)
        content = {"output": str(self._output.path), "runs": [job.run_id for job in jobs]}
        folder.mkdir(parents=True)
        atomic_write(folder / "runs.json", json.dumps(content, indent=1) + "\n")
        functions = [
            RunJob(job.arguments, self._output.run_log(job.run_id), outcome_file(folder, index))
            for index, job in enumerate(jobs)
        ]
        try:
            self._slurm.submit(folder, self._request, functions)
        except BaseException as error:
            if not isinstance(
                error, UserError
            ):  # Ctrl-C: Slurm may have the jobs, but not all files they need
                self._slurm.cancel(folder.name)
            self._refused += [Outcome(job.run_id, str(error) or "not submitted") for job in jobs]
            raise
        for index, job in enumerate(jobs):
            log_start = _size(self._output.run_log(job.run_id))
            self._submitted[job.run_id] = _Submitted(folder, index, log_start)
        self._last_ask = self._clock()

    def poll(self) -> list[Outcome]:
        """Outcomes of the runs whose job has written one, or has disappeared without."""
        outcomes, self._refused = self._refused, []
        now = self._clock()
        if now - self._last_look >= LOOK_SECONDS:
            self._last_look = now
            written = ((run_id, _read_outcome(job)) for run_id, job in self._submitted.items())
            outcomes += [Outcome(run_id, error) for run_id, error in written if error is not None]
        if now - self._last_ask >= ASK_SECONDS and self._submitted:
            self._last_ask = now
            self._ask(now)
            outcomes += [
                Outcome(run_id, self._disappeared(run_id, job))
                for run_id, job in self._submitted.items()
                if job.gone_since is not None
                and now - job.gone_since >= GRACE_SECONDS
                and run_id not in {outcome.run_id for outcome in outcomes}
            ]
        for outcome in outcomes:
            self._submitted.pop(outcome.run_id, None)
        return outcomes

    def stop(self) -> None:
        """Leave the jobs to Slurm."""

    def _submissions(self) -> list[Path]:
        folder = self._output.slurm
        return [
            path for path in sorted(folder.glob("*")) if _TOKEN.fullmatch(path.name) and not path.is_symlink()
        ]

    def _ask(self, now: float) -> None:
        """Update what Slurm knows of the jobs; if it does not answer, everything stays as it is."""
        found = self._slurm.find({job.folder.name for job in self._submitted.values()})
        if found is None:
            return
        by_place = {(job.token, job.index): job for job in found}
        for submitted in self._submitted.values():
            job = by_place.get((submitted.folder.name, submitted.index))
            if job is not None:
                submitted.job_id, submitted.state = job.job_id, job.state
            if job is not None and job.state not in ENDED:
                submitted.gone_since = None
            elif submitted.gone_since is None:
                submitted.gone_since = now

    def _disappeared(self, run_id: str, job: _Submitted) -> str:
        """Error of a run whose job has ended without an outcome."""
        state = f"ended as {job.state}" if job.state in ENDED else "disappeared"
        name = f"Slurm job {job.job_id}" if job.job_id else "its Slurm job"
        line = last_line(self._output.run_log(run_id), job.log_start)
        return f"{name} {state}" + (
            f" after: {line}" if line else f" before it started the run; see {job.folder}"
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _listed_runs(folder: Path, output: Path) -> list[str]:
    """Run ids of a submission in the order of its array; [] if the folder is not one, or was copied."""
    with suppress(OSError, ValueError):
        content = parse_json(read_text(folder / "runs.json"))
        if isinstance(content, dict) and content.get("output") == str(output):
            runs = content.get("runs")
            return [str(run_id) for run_id in runs] if isinstance(runs, list) else []
    return []


def _read_outcome(job: _Submitted) -> str | None:
    """Error of an ended run, "" if it finished; None while it has not ended."""
    with suppress(OSError, ValueError):
        content = parse_json(read_text(job.outcome))
        if isinstance(content, dict):
            return visible(str(content.get("error", "")))
    return None
