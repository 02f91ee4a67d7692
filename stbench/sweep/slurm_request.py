"""What a sweep asks of Slurm for each of its jobs: from options to the parameters of submitit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stbench.core.errors import UserError
from stbench.core.safe_load import shown

DEFAULT_TIME = "1-00:00:00"
MAX_MINUTES = 60 * 24 * 365

_TIME = re.compile(r"(?:(\d{1,4})-)?(\d{1,5}):([0-5]\d):([0-5]\d)|(\d{1,7})", re.ASCII)
_KEY = re.compile(r"[a-z][a-z0-9_-]{0,63}", re.ASCII)

OWN = {
    "partition": "--partition",
    "time": "--time-limit",
    "nodes": "--nodes-per-job",
    "gpus": "--gpus-per-job",
    "array": "--jobs",
}
"""Parameters of sbatch that have an option of their own here."""
FIXED = (
    *("job-name", "output", "error", "open-mode", "input", "chdir", "wrap", "wait", "parsable", "test-only"),
    *("ntasks", "ntasks-per-node", "ntasks-per-gpu", "gpus-per-task", "requeue", "no-requeue", "signal"),
)
"""Parameters of sbatch on which the sweep relies."""
GPU_REQUESTS = ("gres", "gpus-per-node")
"""Parameters that replace the plain request for GPUs, where a cluster wants their type: gres=gpu:a100:4."""


@dataclass(frozen=True)
class SlurmRequest:
    """Resources and limits of the jobs of a sweep, one run each."""

    gpus: int = 1
    """GPUs of a job on all of its nodes together; each has a task of its own. 0 is one task without a GPU."""
    nodes: int = 1
    partition: str | None = None
    minutes: int = 24 * 60
    """Time limit. A run that reaches it saves, and its job is queued again."""
    most: int | None = None
    """Jobs at a time; None leaves it to Slurm."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """Other parameters of sbatch by their long name, and `setup` and `signal-delay-s` of submitit."""

    def __post_init__(self) -> None:
        if self.gpus % self.nodes:
            raise UserError(
                f"--gpus-per-job must be a multiple of --nodes-per-job, got {self.gpus} and {self.nodes}; "
                f"for example --gpus-per-job {self.nodes * max(1, self.gpus // self.nodes)}"
            )
        if self.nodes > 1 and not self.gpus:
            raise UserError("--nodes-per-job needs GPUs, got --gpus-per-job 0; leave --nodes-per-job out")

    @property
    def tasks_per_node(self) -> int:
        """One task per GPU: srun starts that many ranks of the run on each node."""
        return max(1, self.gpus // self.nodes)

    def describe(self, device: str) -> str:
        """One line about the jobs, for --dry-run."""
        gpus = f"{self.gpus} GPU{'s' * (self.gpus != 1)} per run" if self.gpus else "no GPU"
        most = f"at most {self.most} at a time" if self.most else "as many at a time as Slurm allows"
        return f"Slurm jobs with {gpus}, {most}, on {device}"

    def parameters(self) -> dict[str, Any]:
        """The request as keyword arguments of submitit's `AutoExecutor.update_parameters`."""
        extra = dict(self.extra)
        setup, delay = extra.pop("setup", None), extra.pop("signal-delay-s", None)
        # One failed rank must end the others. Since Slurm 22.05, srun does not inherit --cpus-per-task.
        srun = ["--kill-on-bad-exit=1"]
        if "cpus-per-task" in extra:
            srun.append(f"--cpus-per-task={extra['cpus-per-task']}")
        typed_gpus = any(name in extra for name in GPU_REQUESTS)
        others = {name: True if value == "true" else value for name, value in extra.items()}
        values = {
            "nodes": self.nodes,
            "tasks_per_node": self.tasks_per_node,
            "gpus_per_node": self.gpus // self.nodes if self.gpus and not typed_gpus else None,
            "timeout_min": self.minutes,
            "slurm_partition": self.partition,
            "slurm_array_parallelism": self.most,
            "slurm_setup": [setup] if setup else None,
            "slurm_signal_delay_s": int(delay) if delay else None,
            "slurm_srun_args": srun,
            "slurm_additional_parameters": {"requeue": True, **others},
        }
        return {name: value for name, value in values.items() if value is not None}


def parse_minutes(text: str) -> int:
    """Minutes of a time limit: "90", "12:30:00" or "2-00:00:00", rounded up.

    Raises:
        UserError: The text is anything else, or more than a year.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise UserError(
            f"--time-limit must be minutes, H:MM:SS or D-HH:MM:SS, got {shown(text)}; for example 12:00:00"
        )
    days, hours, minutes, seconds, plain = (int(part or 0) for part in found.groups())
    total = plain + days * 24 * 60 + hours * 60 + minutes + (seconds > 0)
    if not 1 <= total <= MAX_MINUTES:
        raise UserError(f"--time-limit must be 1 minute to 1 year, got {shown(text)}; for example 12:00:00")
    return total


def parse_extra(settings: Sequence[str]) -> dict[str, str]:
    """Parameters of --slurm KEY=VALUE, by their name with hyphens.

    Raises:
        UserError: A setting is malformed or given twice, or is one that the sweep itself sets.
    """
    found: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        name = name.strip().removeprefix("--").replace("_", "-")
        if not equals or not value or not _KEY.fullmatch(name) or not value.isprintable():
            raise UserError(
                f"--slurm must be KEY=VALUE, got {shown(setting)}; for example account=my-project"
            )
        if name in OWN:
            raise UserError(f"--slurm {name} has an option of its own; use {OWN[name]}")
        if name in FIXED:
            raise UserError(f"--slurm {name} is set by the sweep and cannot be changed; leave it out")
        if name in found:
            raise UserError(f"--slurm {name} is given twice; use only one of them")
        if name == "signal-delay-s" and not (value.isascii() and value.isdecimal() and len(value) <= 5):
            raise UserError(
                f"--slurm {name} must be a number of seconds, got {shown(value)}; for example 300"
            )
        found[name] = value
    return found
