"""Memory: what a device has, whether a computation fits it, and when freed memory is returned.

Estimates are lower bounds: what is refused here would certainly fail, or be killed by the kernel.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

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


def keep_freed_memory(keep: bool = True) -> None:
    """Let this process keep up to 1 GiB that it frees, for its next allocations. No effect without glibc.

    By default glibc returns the activations of every training step to the kernel, which then clears the same
    pages again in the next step. `keep=False` returns to that. Allocations of more than 32 MiB are always
    returned: on the heap they would leave holes that smaller ones fill, and the process would keep growing.
    """
    mallopt = _glibc("mallopt")
    # Off: the value that glibc's own adjustment ends at.
    for parameter, value in ((_TRIM_THRESHOLD, 2**30 if keep else 2**26), (_MMAP_THRESHOLD, 2**25)):
        mallopt(parameter, value)


def return_freed_memory() -> None:
    """Return the memory that this process has freed to the kernel. No effect without glibc."""
    _glibc("malloc_trim")(0)


def _glibc(name: str) -> Callable[..., object]:
    """A function of glibc, or one that does nothing."""
    try:
        return cast(Callable[..., object], getattr(ctypes.CDLL(None), name))
    except (AttributeError, OSError, TypeError):
        return lambda *arguments: None


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from malloc.h."""
