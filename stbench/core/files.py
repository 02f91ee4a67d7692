"""Files too large for one piece of memory, written whole or not at all; a full disk in one line.

Knows of bytes, arrays and pictures, not of networks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from stbench.core.errors import UserError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a write ends in where no more fits: the disk, a quota, a limit on the size of a file."""


@contextmanager
def room_for(path: Path, remedy: str = "free some space and give the same command again") -> Iterator[None]:
    """Turns a full disk into a UserError that names `path`; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(f"cannot write {path}: {error.strerror}; {remedy}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the place of `path` when the block ends, and leaves no trace if it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with room_for(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_array(path: Path, array: np.ndarray) -> None:
    """One npy file, whole or not at all."""
    array = np.ascontiguousarray(array)
    with whole_file(path) as file:
        # not np.save: on a full disk its error does not say so
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.tobytes())


def write_npz(
    path: Path, shape: tuple[int, ...], parts: Iterable[np.ndarray], others: Mapping[str, np.ndarray]
) -> None:
    """An npz as ADM's: arr_0 uint8 of `shape`, joined from `parts` one at a time, and other arrays by name.

    Uncompressed, as numpy's own savez writes it, so that `numpy.load` reads it.
    """
    with whole_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for part in parts:
                member.write(np.ascontiguousarray(part).tobytes())
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_pictures(folder: Path, count: int, parts: Iterable[np.ndarray], texts: Mapping[str, str]) -> None:
    """A folder of PNG files numbered in order, from uint8 parts (B,H,W,3), and text files by name.

    It appears when it is complete.
    """
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    digits = max(6, len(str(count - 1)))
    number = 0
    try:
        with room_for(folder):
            temporary.mkdir(parents=True)
            for part in parts:
                for image in part:
                    Image.fromarray(image).save(temporary / f"{number:0{digits}d}.png")
                    number += 1
            for name, text in texts.items():
                (temporary / name).write_text(text)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_whole(data: bytes, file: Path) -> None:
    """Write a file, whole or not at all; nothing is left behind when the disk is full."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the rename itself survive a power cut
    finally:
        os.close(folder)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace `path` so that a reader, or a power cut, finds the old file or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def require_room(folder: Path, needed: int) -> None:
    """Raise a UserError unless so many bytes are free where `folder` lies."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no room in {folder}: about {needed / 2**20:.1f} MiB are needed, {free / 2**20:.1f} MiB are "
            f"free; free some, or give another folder"
        )


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Turn a full disk into one line; what was written before stays good."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"the disk of {folder} is full ({error.strerror}); free some room and type the same command: "
            f"finished shards are kept"
        ) from error
