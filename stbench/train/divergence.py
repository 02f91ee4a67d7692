"""Divergence: find losses, weights and optimiser states that are not finite, and say what is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.runs.stage_folder import StageFolder
from stbench.train.sharding import own_part


class LossMonitor:
    """Collects the losses of every step on the device and reads them only when asked."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._names: list[list[str]] = []
        self._values: list[Tensor] = []

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Remember scalars of a step. Does not synchronise the device."""
        self._steps.append(step)
        self._names.append(list(values))
        self._values.append(torch.stack([value.detach().double() for value in values.values()]))

    def first_bad(self) -> tuple[int, dict[str, float]] | None:
        """The first step since the last call with a value that is not finite, and its values; None without.

        Synchronises the device.
        """
        columns = zip(self._steps, self._names, self._values, strict=True)
        rows = [(step, dict(zip(names, values.tolist(), strict=True))) for step, names, values in columns]
        self._steps, self._names, self._values = [], [], []
        return next((row for row in rows if not all(map(math.isfinite, row[1].values()))), None)


def first_bad_tensor(networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> str | None:
    """Name of a tensor of the training state with a value that is not finite; None without.

    Of a sharded state, this rank's part.

    Synchronises the device once.
    """
    named = list(_state_tensors(networks, optimizer))
    if not named:
        return None
    finite = torch.stack([value.isfinite().all() for _, value in named]).tolist()
    return next((name for (name, _), good in zip(named, finite, strict=True) if not good), None)


def _state_tensors(
    networks: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> Iterable[tuple[str, Tensor]]:
    device: torch.device | None = None
    for name, network in networks.items():
        for key, entry in network.state_dict().items():
            value = own_part(entry)
            if value.is_floating_point():
                device = value.device
                yield f"{name}.{key}", value
    for index, moments in enumerate(optimizer.state.values()):
        for key, entry in moments.items():
            value = own_part(entry)
            # The step count of AdamW may be on the host.
            if isinstance(value, Tensor) and value.is_floating_point() and value.device == device:
                yield f"optimizer.{index}.{key}", value


def diverged(reason: str, *, run: Path, folder: StageFolder, is_last: bool, lr: float) -> UserError:
    """The error of a run whose training diverged.

    Args:
        reason: What is not finite, and where.
        run: The run folder.
        folder: The checkpoints of the stage.
        is_last: Whether `stbench sample` samples from this stage.
        lr: Learning rate of the run.
    """
    states, weights = folder.states(), folder.weight_files("ema")
    kept = f"the last good state is kept in {states[-1]}" if states else "no state was saved before it"
    if weights and is_last:
        look = f"look at the EMA weights after step {max(weights)} with `stbench sample {run}`"
    else:
        look = f"look at the run with `stbench show {run}`"
    return UserError(f"{reason}; {kept}: {look}; try a smaller learning rate, --set train.lr={lr / 2:g}")
