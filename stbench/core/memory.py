"""Refuse a computation that cannot fit the memory of its device before anything is allocated.

Estimates are lower bounds: what is refused here would certainly fail, or be killed by the kernel.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from stbench.core.errors import UserError

_CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Limits of a container, in versions 2 and 1 of control groups."""


def total_memory(device: torch.device) -> int:
    """Bytes of memory of a GPU, or of the host as far as this process may use it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CGROUP:
        try:
            sizes.append(int(file.read_text()))
        except (OSError, ValueError):  # no such version, or no limit ("max")
            continue
    return min(sizes)


def require_memory(device: torch.device, needed: int, what: str, remedy: str) -> None:
    """Raise a UserError if `needed` bytes for `what` are more than the device has."""
    available = total_memory(device)
    if needed > available:
        raise UserError(
            f"not enough memory on {device}: {what} at least {needed / 2**30:.1f} GiB, it has "
            f"{available / 2**30:.1f} GiB; {remedy}"
        )
