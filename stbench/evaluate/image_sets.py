"""Image sets to measure, read in batches and in a fixed order: ADM npz files, folders, prepared data sets."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, final

import numpy as np
import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.files import absolute_path
from stbench.core.npy import read_header
from stbench.data.crop import SUFFIXES, UnreadableImage, decode_image, reason
from stbench.data.listing import list_files
from stbench.data.open import open_data
from stbench.data.shards import MANIFEST
from stbench.data.spec import DataSpec
from stbench.data.split import REFERENCE

SETTINGS = "settings.json"
"""File that `stbench sample` writes next to its PNG files."""
EXPECTED_ARRAY = "arr_0 uint8 (N,H,W,3)"
NPZ_ERRORS = (
    zipfile.BadZipFile,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
    zlib.error,
    lzma.LZMAError,
)
"""Exceptions that reading a damaged, encrypted or exotic npz raises."""
MAX_TEXT = 1 << 20
"""Largest text in an npz, in bytes."""


class ImageSet(ABC):
    """Images of one size, in a fixed order."""

    name: str
    """Path, for messages."""
    size: tuple[int, int]
    """(H,W)."""
    ignored: Mapping[str, int] = MappingProxyType({})
    """Suffix -> number of files in the same folder that are not images."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def batches(self, batch: int) -> Iterator[Tensor]:
        """Yield uint8 (B,3,H,W) on the CPU; the last batch may be smaller.

        Raises UserError for a damaged file.
        """


@final
class NpzImages(ImageSet):
    """The array arr_0 of an npz, uint8 (N,H,W,3).

    Read batch by batch: 50,000 images of 256x256 would take 10 GB.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        with open_npz_array(path, "arr_0") as (_, shape, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise UserError(
                    f"{path}: expected {EXPECTED_ARRAY}, found arr_0 {dtype} {shape}; "
                    "save images in 0..255, channels last"
                )
        self._length, self.size = shape[0], (shape[1], shape[2])

    def __len__(self) -> int:
        return self._length

    def batches(self, batch: int) -> Iterator[Tensor]:
        """Yield the images in file order."""
        height, width = self.size
        # The member of the zip archive is a stream: batches must be read in order.
        with open_npz_array(self.path, "arr_0") as (file, _, _):
            for start in range(0, self._length, batch):
                count = min(batch, self._length - start)
                yield torch.from_numpy(self._read(file, count, height, width)).permute(0, 3, 1, 2)
            # Reading to the end compares the checksum of the archive, also of a shape that was too small.
            if self._read_bytes(file, 1):
                raise damaged_npz(self.path, "arr_0 is longer than its shape")

    def _read_bytes(self, file: IO[bytes], count: int) -> bytes:
        try:
            return file.read(count)
        except NPZ_ERRORS as error:
            raise damaged_npz(self.path, error) from error

    def _read(self, file: IO[bytes], count: int, height: int, width: int) -> np.ndarray:
        expected = count * height * width * 3
        content = self._read_bytes(file, expected)
        if len(content) < expected:
            raise damaged_npz(self.path, "arr_0 ends early")
        return np.frombuffer(bytearray(content), np.uint8).reshape(count, height, width, 3)


@contextmanager
def open_npz_array(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Open array `name` of an npz as (stream of its bytes, shape, dtype), without reading the data.

    Raises UserError if the array is missing or in Fortran order, or if the file is damaged.
    """
    with open_npz(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            found = ", ".join(member.removesuffix(".npy") for member in archive.namelist()) or "nothing"
            expected, remedy = (
                (EXPECTED_ARRAY, "save it with arr_0=images") if name == "arr_0" else (name, "make it again")
            )
            raise UserError(f"{path}: expected {expected}, found {found}; {remedy}")
        with archive.open(f"{name}.npy") as file:
            # np.load would read the whole array; the header alone gives shape and type.
            try:
                shape, fortran, dtype = read_header(file)
            except NPZ_ERRORS as error:
                raise damaged_npz(path, f"{name}: {error}") from error
            if fortran and len(shape) > 1:
                raise UserError(f"{path}: expected {name} in C order, found Fortran order; save it again")
            yield file, shape, dtype


def read_npz_text(path: Path, name: str) -> str:
    """Read a string that `numpy.savez` stored as an array. Raises UserError for anything else."""
    with open_npz_array(path, name) as (file, shape, dtype):
        if dtype.kind != "U" or shape != () or dtype.itemsize > MAX_TEXT:
            raise damaged_npz(path, f"{name}: expected one string, found {dtype} of shape {shape}")
        try:
            return str(np.frombuffer(file.read(), dtype)[0])
        except (*NPZ_ERRORS, IndexError) as error:
            raise damaged_npz(path, f"{name}: {error}") from error


def open_npz(path: Path) -> zipfile.ZipFile:
    """Open an npz as a zip archive.

    Raises UserError if it is missing, truncated or another kind of file, or if its table of contents is
    damaged.
    """
    if not path.is_file():
        raise UserError(f"{path} not found; expected an npz with {EXPECTED_ARRAY}, or a folder of images")
    try:
        archive = zipfile.ZipFile(path)
        # Opening a member compares its name with that in the table of contents: a damaged name would
        # otherwise be a missing array, which is valid.
        for member in archive.infolist():
            archive.open(member).close()
        if len(set(archive.namelist())) < len(archive.namelist()):
            raise ValueError("two arrays of one name")
    except NPZ_ERRORS as error:
        raise damaged_npz(path, error) from error
    return archive


def damaged_npz(path: Path, why: object) -> UserError:
    """Return the error for an npz that cannot be read."""
    reason = " ".join(str(why).split())[:160] or type(why).__name__
    return UserError(f"{path} is truncated, damaged or not an npz file ({reason}); make it again")


@final
class FolderImages(ImageSet):
    """All images in a folder and its subfolders, sorted by path and converted to RGB.

    With `crop`, each image is centre-cropped to that many pixels, as ADM crops ImageNet; otherwise all images
    must have one size.
    """

    def __init__(self, path: Path, crop: int | None = None) -> None:
        self.name, self._crop = str(path), crop
        # Everything that is not an image is counted, except our own settings file.
        names, left_out = list_files(path)
        found = [path / name for name in names]
        self._files = sorted(file for file in found if file.suffix.lower() in SUFFIXES)
        others = {file for file in found if file.name != SETTINGS}.difference(self._files)
        self.ignored = {**Counter(file.suffix.lower() or file.name for file in others), **left_out}
        if not self._files:
            raise UserError(
                f"{path} contains no images; expected files that end in {', '.join(sorted(SUFFIXES))}"
            )
        self.size = read_image(self._files[0], crop).shape[:2]

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, batch: int) -> Iterator[Tensor]:
        """Yield the images sorted by path."""
        for start in range(0, len(self._files), batch):
            images = [self._read(file) for file in self._files[start : start + batch]]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def _read(self, file: Path) -> np.ndarray:
        image = read_image(file, self._crop)
        if image.shape[:2] != self.size:
            (h, w), (first_h, first_w) = image.shape[:2], self.size
            raise UserError(
                f"expected images of one size, found {self._files[0].name} of {first_w}x{first_h} and {file} "
                f"of {w}x{h}; crop them first, or let `stbench data statistics` crop them with --size"
            )
        return image


def read_image(file: Path, crop: int | None = None) -> np.ndarray:
    """Read an image as uint8 (H,W,3). Raises UserError for an unreadable file and for more than 8 bits."""
    try:
        return decode_image(file.read_bytes(), 3, crop).transpose(1, 2, 0)
    except (UnreadableImage, OSError) as error:
        raise UserError(f"cannot read image {file} ({reason(error)}); delete or replace it") from error


@final
class PreparedImages(ImageSet):
    """The reference images of a prepared data set: up to 10,000 training images stored with their pixels."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._data = open_data(DataSpec(path=str(absolute_path(path))))
        self._rows = np.flatnonzero(self._data.split == REFERENCE)
        if not len(self._rows):
            raise UserError(f"{path} has no reference images; prepare it again with --references 10000")
        self.size = self._data.image_shape[1:]

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, batch: int) -> Iterator[Tensor]:
        """Yield the images by row."""
        for start in range(0, len(self._rows), batch):
            images = torch.from_numpy(self._data.pixels(self._rows[start : start + batch]))
            yield images.expand(-1, 3, -1, -1)  # grey sets become RGB


def open_images(path: Path, crop: int | None = None) -> ImageSet:
    """Open the images at `path`: a prepared data set, a folder of images, or an npz file.

    `crop` applies to folders only. Raises UserError for anything else.
    """
    # A prepared data set is a folder too, recognised by its manifest.
    folder = path.is_dir() and not (path / MANIFEST).is_file()
    if crop is not None and not folder:
        raise UserError(f"--size crops a folder of images, found {path}; drop --size")
    if folder:
        return FolderImages(path, crop)
    return PreparedImages(path) if path.is_dir() else NpzImages(path)
