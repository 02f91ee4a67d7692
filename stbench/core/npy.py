"""Read npy files that may be damaged or hostile: any defect is a ValueError of one line.

numpy's own parser raises whatever its tokenizer raises for a damaged header, and a header may promise an
array of any size. No pickled object is ever read.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

KINDS = "biufSU"
"""Kinds of dtypes that are read: booleans, integers, floats, byte strings and text."""


class Header(NamedTuple):
    """What the header of an npy file says."""

    shape: tuple[int, ...]
    fortran: bool
    """Whether the first index varies fastest."""
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(stream: IO[bytes]) -> Header:
    """Read the header of an npy file and leave the stream at the first byte of its data.

    Raises ValueError for anything but a header of an array of numbers or strings, OSError if reading fails.
    """
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"npy version {version[0]}.{version[1]} is not supported")
        first = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except OSError:
        raise
    except Exception as error:  # the header is parsed as Python source, which may raise anything
        raise ValueError(f"not an npy header: {_one_line(error)}") from error
    if dtype.kind not in KINDS:
        raise ValueError(f"expected numbers or strings, found dtype {_one_line(dtype)}")
    if any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"expected a shape of lengths, found {_one_line(shape)}")
    return Header(shape, bool(fortran), dtype)


def map_npy(path: Path) -> np.ndarray:
    """Open an npy file, memory-mapped read-only.

    Raises ValueError if the file is damaged or has another size than its header says, OSError if it cannot be
    read.
    """
    with path.open("rb") as file:
        header = read_header(file)
        start, size = file.tell(), file.seek(0, io.SEEK_END)
    _require_size(header, size - start)
    if not header.nbytes:  # an empty file cannot be mapped
        return np.empty(header.shape, header.dtype)
    order = "F" if header.fortran else "C"
    return np.memmap(path, header.dtype, "r", start, header.shape, order)  # type: ignore[call-overload,no-any-return]


def read_npy(path: Path) -> np.ndarray:
    """Read an npy file into memory. Raises ValueError and OSError as `map_npy` does."""
    stream = io.BytesIO(path.read_bytes())
    header = read_header(stream)
    content = bytearray(stream.read())
    _require_size(header, len(content))
    array = np.frombuffer(content, header.dtype) if content else np.empty(0, header.dtype)
    return array.reshape(header.shape, order="F" if header.fortran else "C")


def _require_size(header: Header, found: int) -> None:
    if found != header.nbytes:
        raise ValueError(f"expected {header.nbytes} bytes after the header, found {found}")


def _one_line(value: object) -> str:
    text = str(value) or type(value).__name__
    return " ".join(text.split())[:160]
