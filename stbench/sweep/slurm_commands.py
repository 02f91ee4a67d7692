"""The commands of Slurm that a sweep needs: submit through submitit, list with squeue, cancel."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from stbench.core.errors import UserError
from stbench.core.text import visible
from stbench.sweep.slurm_job import RunJob
from stbench.sweep.slurm_request import SlurmRequest

MAX_REQUEUES = 1000
"""Times that a job may reach its time limit and resume."""
TIMEOUT = 60.0
"""Seconds that a command may take; a busy controller is slow."""
PROGRAMS = ("sbatch", "srun", "squeue", "scancel")


@dataclass(frozen=True)
class Found:
    """A job that Slurm knows."""

    token: str
    """Name of the folder of its submission."""
    index: int
    """Its place in the array; 0 without an array."""
    job_id: str
    state: str


class Slurm:
    """The Slurm of this machine's commands. The jobs of a submission are named after its folder."""

    def submit(self, folder: Path, request: SlurmRequest, jobs: Sequence[RunJob]) -> None:
        """Submit the jobs as one job array; submitit's files go to `folder`.

        Raises:
            UserError: sbatch refused them.
        """
        submitit = require_slurm()
        executor = submitit.AutoExecutor(folder, cluster="slurm", slurm_max_num_timeout=MAX_REQUEUES)
        executor.update_parameters(name=job_name(folder.name), **request.parameters())
        try:
            with redirect_stderr(StringIO()):  # submitit prints what sbatch printed; the error below says it
                executor.submit_array(jobs)
        except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
            reason = visible(lines[-1].removeprefix("sbatch: ").removeprefix("error: "))
            raise UserError(
                f"sbatch refused the jobs: {reason}; "
                f"check --partition, --time-limit, --gpus-per-job and --slurm"
            ) from error

    def find(self, tokens: Iterable[str]) -> list[Found] | None:
        """The jobs of submissions that Slurm still lists, ended ones included; None if squeue fails."""
        names = ",".join(map(job_name, tokens))
        command = ["squeue", "--me", "--noheader", "--array", "--states=all", f"--name={names}"]
        try:
            done = subprocess.run(
                [*command, "--format=%j|%K|%i|%T"], capture_output=True, text=True, timeout=TIMEOUT
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode != 0:
            return None
        rows = (line.strip().split("|") for line in done.stdout.splitlines())
        return [
            Found(name.removeprefix("stbench-"), int(index) if index.isdecimal() else 0, job_id, state)
            for name, index, job_id, state in rows
        ]

    def cancel(self, token: str) -> None:
        """Cancel the jobs of a submission."""
        subprocess.run(["scancel", "--me", f"--name={job_name(token)}"], timeout=TIMEOUT)


def job_name(token: str) -> str:
    """Name of the jobs of a submission."""
    return f"stbench-{token}"


def require_slurm() -> Any:
    """The module submitit.

    Raises:
        UserError: It is not installed, or this machine has no commands of Slurm.
    """
    try:
        import submitit
    except ImportError:
        raise UserError(
            "--executor slurm needs submitit; install it with: pip install 'stbench[slurm]'"
        ) from None
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"--executor slurm needs the commands of Slurm, but {missing[0]} was not found; "
            f"use a login node of the cluster, or --executor local"
        )
    return submitit
