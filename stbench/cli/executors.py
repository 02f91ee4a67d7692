"""Where the runs of a sweep are executed: options of `stbench sweep`, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stbench.core.errors import UserError
from stbench.core.limits import MAX_JOB_GPUS, MAX_JOB_NODES
from stbench.core.safe_load import shown

if TYPE_CHECKING:
    from stbench.sweep.executor import Executor
    from stbench.sweep.slurm_request import SlurmRequest


class ExecutorChoice(str, Enum):
    """Choices of --executor."""

    local = "local"
    slurm = "slurm"


ExecutorOption = Annotated[
    ExecutorChoice,
    typer.Option("--executor", help="Where the runs are executed: this machine, or job arrays of Slurm."),
]
GpusPerJob = Annotated[
    int | None,
    typer.Option(min=0, max=MAX_JOB_GPUS, help="Slurm: GPUs of each run, with one rank per GPU; default: 1."),
]
NodesPerJob = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_JOB_NODES, help="Slurm: nodes that share the GPUs of a run; default: 1."),
]
Partition = Annotated[str | None, typer.Option(help="Slurm: partition; default: the cluster's.")]
TimeLimit = Annotated[
    str | None,
    typer.Option(
        help="Slurm: time limit of a job as minutes, H:MM:SS or D-HH:MM:SS; default: one day. A run that "
        "reaches it saves, and its job is queued again."
    ),
]
SlurmSettings = Annotated[
    list[str],
    typer.Option(
        "--slurm",
        help="Slurm: any other parameter of sbatch as KEY=VALUE, such as account=NAME, qos=NAME, mem=64G, "
        "cpus-per-task=8, gres=gpu:a100:4; repeatable.",
    ),
]


@dataclass(frozen=True)
class Place:
    """Where the runs are executed."""

    executor: Executor
    device: str
    """Value of --device of each run."""
    precision: str | None
    """Precision of the runs that name none; None if it depends on a GPU that is not in this machine."""
    description: str


def local_place(output: Path, device: str, jobs: int | None) -> Place:
    """This machine."""
    from stbench.core.device import default_precision, pick_device
    from stbench.sweep.executor import LocalExecutor
    from stbench.sweep.slots import local_slots

    found = pick_device(device)
    slots = local_slots(found, jobs)
    executor = LocalExecutor(output, slots)
    return Place(executor, found.type, default_precision(found), f"{len(slots)} at a time on {found.type}")


def slurm_place(output: Path, device: str, request: SlurmRequest) -> Place:
    """A Slurm cluster, whose nodes may have GPUs even if this machine has none.

    Raises:
        UserError: --device is not auto, cpu or cuda; or submitit or Slurm is missing.
    """
    import torch

    from stbench.core.device import default_precision
    from stbench.sweep.slurm import SlurmExecutor
    from stbench.sweep.slurm_commands import require_slurm

    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"with --executor slurm, --device must be auto, cpu or cuda, got {shown(device)}")
    if device == "cuda" and not request.gpus:
        raise UserError(
            "--device cuda needs GPUs, got --gpus-per-job 0; use --gpus-per-job 1 or --device cpu"
        )
    require_slurm()
    chosen = ("cuda" if request.gpus else "cpu") if device == "auto" else device
    known = chosen == "cpu" or torch.cuda.is_available()
    precision = default_precision(torch.device(chosen)) if known else None
    return Place(SlurmExecutor(output, request), chosen, precision, request.describe(chosen))


def slurm_request(
    choice: ExecutorChoice,
    *,
    gpus: int | None,
    nodes: int | None,
    partition: str | None,
    time_limit: str | None,
    jobs: int | None,
    settings: list[str],
) -> SlurmRequest | None:
    """What each job needs; None with the local executor.

    Raises:
        UserError: An option of Slurm was given without --executor slurm, or is invalid.
    """
    from stbench.sweep.slurm_request import DEFAULT_TIME, SlurmRequest, parse_extra, parse_minutes

    typed: dict[str, Any] = {
        "--gpus-per-job": gpus,
        "--nodes-per-job": nodes,
        "--partition": partition,
        "--time-limit": time_limit,
        "--slurm": settings or None,
    }
    if choice is ExecutorChoice.local:
        for name, value in typed.items():
            if value is not None:
                raise UserError(f"{name} needs --executor slurm; add it, or leave {name} out")
        return None
    return SlurmRequest(
        gpus=1 if gpus is None else gpus,
        nodes=nodes or 1,
        partition=partition,
        minutes=parse_minutes(time_limit or DEFAULT_TIME),
        most=jobs,
        extra=parse_extra(settings),
    )
