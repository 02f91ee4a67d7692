"""`--devices N`: run a command in several processes; and which of them reports an error."""

from __future__ import annotations

import os
import sys

import typer

from stbench.core.errors import UserError


def start_ranks(devices: int | None, device: str, *, dry_run: bool = False) -> None:
    """Run this command in `devices` processes and exit with their exit code, if it is more than one.

    Returns in these processes, in those that torchrun or srun has started, and for one device.

    Raises:
        UserError: If there are fewer GPUs, or if a rank was killed or lost.
    """
    if devices is None or devices == 1 or dry_run:
        return
    from stbench.core.device import pick_device
    from stbench.train import launch

    if launch.detect() is not None:
        return
    chosen = pick_device(device)
    if chosen.type == "cuda":
        _require_gpus(devices)
    arguments = ["-m", "stbench.cli.child", str(os.getpid()), *sys.argv[1:]]
    raise typer.Exit(launch.launch(devices, arguments))


def _require_gpus(devices: int) -> None:
    import torch

    found = torch.cuda.device_count()
    if devices > found:
        raise UserError(
            f"--devices {devices} needs {devices} GPUs, found {found}; use --devices {found}, or --device cpu"
        )


def is_main() -> bool:
    """Whether this process is rank 0, or no rank."""
    launch = sys.modules.get("stbench.train.launch")
    return launch is None or launch.rank() == 0


def reports(error: BaseException) -> bool:
    """Whether this process should print an error, which several ranks may have."""
    launch = sys.modules.get("stbench.train.launch")
    if launch is None:  # not a rank
        return True
    return bool(launch.claims_error(lost=is_lost_rank(error)))


def is_lost_rank(error: BaseException) -> bool:
    """Whether an exception says that another rank has died or does not respond."""
    world = sys.modules.get("stbench.core.world")
    return world is not None and bool(world.is_lost_rank(error))


def describe(error: BaseException) -> str:
    """One sentence about such an exception."""
    return str(sys.modules["stbench.core.world"].describe_lost_rank(error))
