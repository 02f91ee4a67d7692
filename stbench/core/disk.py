"""Disk space: errors of a full disk that say what is missing, and checks before a long write."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stbench.core.errors import UserError

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""Errors of a write that does not fit: the disk, the user's quota, the limit on the size of a file."""


@dataclass
class Needed:
    """What a write needs, for the message about a full disk."""

    bytes: int = 0
    exact: bool = False
    """Whether `bytes` is the size of the whole file, and not only of what was written so far."""
    free: int | None = None
    """Bytes that the disk had for the file; None for what is free now."""


@contextmanager
def disk_full_errors(path: Path, needed: Needed | None = None) -> Iterator[None]:
    """Turn the OSError of a full disk into a UserError that names `path`; other errors pass through.

    The message says how much space the write needs, if that is known, and how much is free.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        missing = _missing(path, needed or Needed(), limited=error.errno != errno.ENOSPC)
        raise UserError(
            f"cannot write {path}: {error.strerror}{missing}; free some space and rerun the same command"
        ) from error


def _missing(path: Path, needed: Needed, *, limited: bool) -> str:
    """Describe the space that is needed and, unless a quota or a limit is the reason, what is free."""
    parts = []
    if needed.bytes:
        parts.append(f"{'' if needed.exact else 'more than '}{_text(needed.bytes)} needed")
    if not limited:
        free = free_space(path) if needed.free is None else needed.free
        parts.append(f"{_text(free)} free on its disk")
    return f" ({', '.join(parts)})" if parts else ""


def _text(count: int) -> str:
    """Format a number of bytes."""
    if count < 1 << 10:
        return f"{count} bytes"
    power = min((count.bit_length() - 1) // 10, 3)
    return f"{count / (1 << 10 * power):.4g} {('', 'KiB', 'MiB', 'GiB')[power]}"


def free_space(path: Path) -> int:
    """Free bytes on the disk of a path, which need not exist; 0 if that cannot be found out."""
    for folder in (path, *path.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(folder).free
    return 0


def require_free_space(folder: Path, needed: int) -> None:
    """Raise a UserError unless `needed` bytes are free on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"not enough disk space in {folder}: about {needed / 2**20:.1f} MiB needed, "
            f"{free / 2**20:.1f} MiB free; free some space or choose another folder"
        )
