"""Atomic and durable file writes, exclusive folder locks and file hashes.

Every file that stbench keeps is written here. A reader finds the old file or the new one, never a part of it,
also after a power cut. This module knows bytes and arrays, not what they mean.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock, Timeout, lock_descriptor

from stbench.core.disk import DISK_FULL, Needed, disk_full_errors, free_space
from stbench.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np

LOCK = ".lock"
"""Name of the lock file in a locked folder. It contains the process id of its last owner."""

LOCK_LENGTH = 20
"""Longest content of a lock."""

LOCK_WAIT = 0.1
"""Seconds that `lock_folder` waits: longer than the instant for which `is_locked` takes the lock."""

BLOCK = 1 << 22
"""Bytes read at a time when a file is hashed."""


# --- Atomic writes ---


@contextmanager
def atomic_file(path: Path, size: int | None = None) -> Iterator[IO[bytes]]:
    """Open a binary file that replaces `path` when the block ends; if the block fails, `path` is unchanged.

    Parent folders are created. File and folder are synced, so the new file survives a power cut. Raises
    UserError if the disk is full; `size`, the bytes that will be written if that is known, is part of the
    message.
    """
    temporary, needed = temporary_path(path), Needed(size or 0, exact=size is not None)
    with disk_full_errors(path, needed):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.unlink(missing_ok=True)  # never written through: it may be a link
            with open(temporary, "xb") as file:
                try:
                    yield file
                finally:
                    needed.bytes = max(needed.bytes, file.tell())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException as error:
            with suppress(OSError):
                if isinstance(error, OSError) and error.errno in DISK_FULL:
                    needed.free = free_space(path) + temporary.stat().st_size
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Create a temporary folder that is renamed to `path` when the block ends, deleted if the block fails.

    `path` must not exist or must be an empty folder. Files in it are synced only if they are written with the
    functions of this module. Raises UserError if the disk is full.
    """
    temporary = temporary_path(path)
    with disk_full_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            temporary.rename(path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(path.parent)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace the content of `path` atomically and durably; text is written as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    with atomic_file(path, len(data)) as file:
        file.write(data)


def write_array(path: Path, array: np.ndarray) -> str:
    """Write an npy file atomically, without a second copy in memory; returns the file's sha256."""
    import numpy as np  # not at the top: `compare` uses this module and must start fast

    with atomic_file(path, array.nbytes) as file:
        hashing = _HashingFile(file)
        # numpy writes to a real file through C, where a full disk is an OSError without an errno.
        np.lib.format.write_array(hashing, np.ascontiguousarray(array), allow_pickle=False)  # type: ignore[arg-type]
    return hashing.digest.hexdigest()


def remove_unfinished(folder: Path, target: str | None = None, *, recursive: bool = False) -> None:
    """Delete the temporary files and folders that a killed process left in `folder`.

    Only those of the file or folder named `target`, if it is given. Call it while the folder is locked.
    """
    pattern = f".{escape(target) if target else '*'}.[0-9]*.tmp"
    for path in list(folder.rglob(pattern) if recursive else folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Where `path` is written first: beside it, because a rename is atomic only within a file system."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _HashingFile:
    """A binary file that hashes what is written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        """Write and hash."""
        self.digest.update(data)
        return self._file.write(data)


# --- Paths ---


def absolute_path(path: str | Path) -> Path:
    """The absolute path without symbolic links, with `~` expanded.

    Unlike `Path.resolve` and `Path.expanduser`, it raises no error for a loop of links or an unknown user;
    such a path does not exist. Raises UserError for a NUL character, which no path contains.
    """
    if "\0" in str(path):
        raise UserError(f"expected a path, got {str(path)!r}; remove the NUL character")
    return Path(os.path.realpath(os.path.expanduser(path)))


# --- Hashes ---


def hash_file(*paths: Path) -> str:
    """sha256 of a file's bytes, as hex; of several files, of their bytes one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


# --- Locks ---


@contextmanager
def lock_folder(folder: Path, remedy: str) -> Iterator[None]:
    """Own `folder`, which is created, for a `with` block. The kernel frees the lock of a killed process.

    Raises a UserError that names the owning process, and ends with `remedy`, if the folder is in use, or if
    its lock is not a file of its own.
    """
    file = folder / LOCK
    with disk_full_errors(file):
        folder.mkdir(parents=True, exist_ok=True)
    _require_lock_file(file)
    lock = FileLock(file, timeout=LOCK_WAIT, on_acquired=_write_owner)
    try:
        with disk_full_errors(file):
            lock.acquire()
    except Timeout:
        with file.open("rb") as opened:
            owner = _owner(opened.fileno()) or "unknown"
        raise UserError(f"{folder} is in use by process {owner}; {remedy}") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process owns `folder` now. Raises UserError if its lock is not a file of its own."""
    _require_lock_file(folder / LOCK)
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    except PermissionError:  # the folder of another user; network file systems lock only what is writable
        descriptor = os.open(folder / LOCK, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return not lock_descriptor(descriptor, blocking=False)
    finally:
        os.close(descriptor)


def _require_lock_file(file: Path) -> None:
    """Raise UserError for a link, a device and the like, whose target another folder or person may own."""
    try:
        found = file.lstat()
    except FileNotFoundError:
        return
    regular, linked = stat.S_ISREG(found.st_mode), stat.S_ISLNK(found.st_mode)
    if not regular or found.st_nlink > 1:
        what = "a link" if linked or regular else "not a file"
        raise UserError(f"{file} is {what}, which cannot be used as a lock; delete it")


def _write_owner(descriptor: int) -> None:
    """Write the process id into the lock, unless it contains something else."""
    if _owner(descriptor) is None:
        return
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
    except OSError as error:  # the first file that is written names itself
        if error.errno not in DISK_FULL:
            raise


def _owner(descriptor: int) -> str | None:
    """The process id in a lock; "" if it is empty, None if it contains something else."""
    content = os.pread(descriptor, LOCK_LENGTH + 1, 0).strip()
    return content.decode() if len(content) <= LOCK_LENGTH and (not content or content.isdigit()) else None
