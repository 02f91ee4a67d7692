"""What floating-point arithmetic a block of code runs in, on any device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stbench.core.errors import UserError


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Runs a block in "fp32", "tf32" or "bf16", and puts torch's switches back."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = precision == "tf32"
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def pick_device(name: str) -> torch.device:
    """ "auto", "cpu", "cuda" or "cuda:N" as a device that is there; else a UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device '{name}'; expected auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device '{name}' is not supported; expected auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        raise UserError(f"device '{name}' is not here: {count} CUDA device(s) found; try --device cpu")
    return device


def pick_devices(names: str) -> list[torch.device]:
    """One device or several: "cuda:0,cuda:1", "all" for every CUDA device, "cpu,cpu" for two processes.

    Raises UserError for one that is not there and for a mixture of kinds.
    """
    if names == "all":
        names = ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count())) or "cuda:0"
    devices = [pick_device(name.strip()) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise UserError(f"expected devices of one kind, found {names}; a CPU and a GPU draw other pixels")
    return devices


def default_precision(device: torch.device) -> str:
    """bf16 on a GPU that multiplies it natively, else fp32.

    On a CPU always fp32: with the same avx512_bf16 flag bf16 steps took 0.6 times as long as fp32 on one
    processor and 1.45 times on another, and runs of two precisions cannot stand in one table.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return "fp32"
