"""Sets of images to measure: an npz as ADM's, a folder, a prepared data set; in batches, in order."""

from __future__ import annotations

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
from PIL import Image
from torch import Tensor

from stbench.core.errors import UserError
from stbench.data.crop import SUFFIXES, UNREADABLE, centre_crop
from stbench.data.open import open_data
from stbench.data.shards import MANIFEST, REFERENCE
from stbench.data.spec import DataSpec

SETTINGS = "settings.json"
"""What `stbench sample` writes beside its PNG files."""
WANTED = "arr_0 uint8 (N,H,W,3)"
DAMAGED = (zipfile.BadZipFile, EOFError, OSError, ValueError, zlib.error)
"""What reading a damaged npz raises."""


class ImageSet(ABC):
    """Images of one size, in a fixed order."""

    name: str
    """Path, for messages."""
    size: tuple[int, int]
    """(H,W)."""
    ignored: Mapping[str, int] = MappingProxyType({})
    """Suffixes of files beside them that are not taken for images, and how many each."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def batches(self, batch: int) -> Iterator[Tensor]:
        """uint8 (B,3,H,W) on the host, B = `batch` but in the last. Raises UserError for what is damaged."""


@final
class NpzImages(ImageSet):
    """arr_0 of an npz, uint8 (N,H,W,3), read piece by piece: a file of 50,000 images needs no 10 GB."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        with open_member(path, "arr_0") as (_, shape, dtype):
            if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or 0 in shape:
                raise UserError(
                    f"{path}: expected {WANTED}, found arr_0 {dtype} {shape}; "
                    "write images in 0..255, channels last"
                )
        self._length, self.size = shape[0], (shape[1], shape[2])

    def __len__(self) -> int:
        return self._length

    def batches(self, batch: int) -> Iterator[Tensor]:
        """The images in file order."""
        height, width = self.size
        with open_member(self.path, "arr_0") as (file, _, _):
            for start in range(0, self._length, batch):
                count = min(batch, self._length - start)
                yield torch.from_numpy(self._read(file, count, height, width)).permute(0, 3, 1, 2)

    def _read(self, file: IO[bytes], count: int, height: int, width: int) -> np.ndarray:
        wanted = count * height * width * 3
        try:
            content = file.read(wanted)
        except DAMAGED as error:
            raise damaged(self.path, error) from error
        if len(content) < wanted:
            raise damaged(self.path, "arr_0 ends early")
        return np.frombuffer(bytearray(content), np.uint8).reshape(count, height, width, 3)


@contextmanager
def open_member(path: Path, name: str) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Array `name` of an npz as (stream of its bytes, shape, dtype). Raises UserError if it is not there."""
    with open_npz(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            found = ", ".join(member.removesuffix(".npy") for member in archive.namelist()) or "nothing"
            wanted, remedy = (
                (WANTED, "save it with arr_0=images") if name == "arr_0" else (name, "make it again")
            )
            raise UserError(f"{path}: expected {wanted}, found {found}; {remedy}")
        with archive.open(f"{name}.npy") as file:
            try:
                version = np.lib.format.read_magic(file)
                first = version == (1, 0)
                read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(file)
            except DAMAGED as error:
                raise damaged(path, error) from error
            if fortran and len(shape) > 1:
                raise UserError(f"{path}: expected {name} in C order, found Fortran order; save it again")
            yield file, shape, dtype


def open_npz(path: Path) -> zipfile.ZipFile:
    """The archive. Raises UserError if the file is missing, cut off or something else."""
    if not path.is_file():
        raise UserError(f"{path} is not there; expected an npz with {WANTED}, or a folder of images")
    try:
        return zipfile.ZipFile(path)
    except DAMAGED as error:
        raise damaged(path, error) from error


def damaged(path: Path, why: object) -> UserError:
    """The error for an npz that cannot be read."""
    return UserError(f"{path} is cut off, damaged or no npz ({why}); make it again")


@final
class FolderImages(ImageSet):
    """All images at or under a folder, by path; every mode but 16 bits becomes RGB.

    With `crop`, each is centre-cropped to that many pixels as ADM crops ImageNet; else all are of one size.
    """

    def __init__(self, path: Path, crop: int | None = None) -> None:
        self.name, self._crop = str(path), crop
        held = [file for file in path.rglob("*") if file.is_file()]
        self._files = sorted(file for file in held if file.suffix.lower() in SUFFIXES)
        others = {file for file in held if file.name != SETTINGS}.difference(self._files)
        self.ignored = dict(Counter(file.suffix.lower() or file.name for file in others))
        if not self._files:
            raise UserError(
                f"{path} holds no images; expected files that end in {', '.join(sorted(SUFFIXES))}"
            )
        self.size = read_image(self._files[0], crop).shape[:2]

    def __len__(self) -> int:
        return len(self._files)

    def batches(self, batch: int) -> Iterator[Tensor]:
        """The images by path."""
        for start in range(0, len(self._files), batch):
            images = [self._same_size(file) for file in self._files[start : start + batch]]
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def _same_size(self, file: Path) -> np.ndarray:
        image = read_image(file, self._crop)
        if image.shape[:2] != self.size:
            (h, w), (first_h, first_w) = image.shape[:2], self.size
            raise UserError(
                f"{file} is {w}x{h} but {self._files[0].name} is {first_w}x{first_h}; "
                "expected images of one size: crop them first, or have `data statistics` do it by --size"
            )
        return image


def read_image(file: Path, crop: int | None = None) -> np.ndarray:
    """uint8 (H,W,3). Raises UserError for a file that is no whole 8-bit image."""
    try:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise UserError(
                    f"{file}: expected 8 bits a channel, found mode {image.mode}; convert it first"
                )
            colours = image.convert("RGB")
            return np.array(colours if crop is None else centre_crop(colours, crop))
    except UNREADABLE as error:
        raise UserError(f"cannot read image {file} ({error}); delete or replace it") from error


@final
class StoredImages(ImageSet):
    """The reference images of a prepared data set: up to 10,000 training images whose pixels are kept."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._held = open_data(DataSpec(path=str(path.resolve())))
        self._rows = np.flatnonzero(self._held.split == REFERENCE)
        if not len(self._rows):
            raise UserError(f"{path} keeps no reference images; prepare it again with --references 10000")
        self.size = self._held.image_shape[1:]

    def __len__(self) -> int:
        return len(self._rows)

    def batches(self, batch: int) -> Iterator[Tensor]:
        """The images by row."""
        for start in range(0, len(self._rows), batch):
            images = torch.from_numpy(self._held.pixels(self._rows[start : start + batch]))
            yield images.expand(-1, 3, -1, -1)


def open_images(path: Path, crop: int | None = None) -> ImageSet:
    """A prepared data set, a folder of images or an npz, by what lies at `path`; `crop` is for a folder.

    Raises UserError for anything else.
    """
    folder = path.is_dir() and not (path / MANIFEST).is_file()
    if crop is not None and not folder:
        raise UserError(f"{path} is no folder of images: its images have their size; leave --size out")
    if folder:
        return FolderImages(path, crop)
    return StoredImages(path) if path.is_dir() else NpzImages(path)
