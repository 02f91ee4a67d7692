"""Devices and floating-point precision."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from stbench.core.errors import UserError
from stbench.core.safe_load import shorten


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Allow or forbid TF32 in matrix products and convolutions of a block, then restore torch's switches."""
    switches: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = enabled
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast context of a precision: bfloat16 for "bf16", disabled otherwise."""
    if not is_autocast_available(device.type):  # the meta device
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


@contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Run a block in "fp32", "tf32" or "bf16" arithmetic and restore torch's switches afterwards."""
    with tf32(precision == "tf32"), autocast(precision, device):
        yield


def upload(x: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to a device. The host does not wait for a GPU to finish its earlier work.

    A copy from memory that is not pinned waits, also with non_blocking, unless it is small.
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def pick_device(name: str) -> torch.device:
    """The device named "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        UserError: If the name is unknown or the device does not exist.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, colon, index = name.partition(":")
    if colon and (kind != "cuda" or not re.fullmatch("[0-9]{1,3}", index)):
        raise UserError(f"unknown device {shorten(name)}; use auto, cpu, cuda or cuda:N")
    if kind not in ("cpu", "cuda"):
        raise UserError(f"unknown device {shorten(name)}; use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count()
    if kind == "cuda" and int(index or 0) >= count:
        raise UserError(f"device '{name}' does not exist: found {count} CUDA device(s); try --device cpu")
    return torch.device(kind, int(index)) if colon else torch.device(kind)


def pick_devices(names: str) -> list[torch.device]:
    """One or more devices: "cuda:0,cuda:1", "all" for every CUDA device, "cpu,cpu" for two processes.

    Raises:
        UserError: If a device does not exist, or the devices are of different types.
    """
    if names == "all":
        names = ",".join(f"cuda:{index}" for index in range(torch.cuda.device_count())) or "cuda:0"
    devices = [pick_device(name.strip()) for name in names.split(",")]
    if len({device.type for device in devices}) > 1:
        raise UserError(
            f"devices must be of one type, got {names}; a CPU and a GPU would generate different images"
        )
    return devices


def default_precision(device: torch.device) -> str:
    """bf16 on a GPU with native bfloat16 matrix products, otherwise fp32.

    On a CPU always fp32: with the same avx512_bf16 flag, a bf16 step took 0.6 times as long as an fp32 step
    on one processor and 1.45 times on another, and runs of different precisions cannot share a table.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    return "fp32"
