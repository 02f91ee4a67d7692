"""`EncodedImages`: images as rows of moments or pixels, and the three ways in which rows are stored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from stbench.data.repa_layout import RepaFolder
from stbench.data.shards import Kind, ShardedRows


class StoredRows(ABC):
    """Stored rows, with one or two views (the image, its mirror image) per row."""

    nbytes: int
    """Size of all rows in bytes."""

    @abstractmethod
    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        """Return views (B,), 0 or 1, of rows (B,): (B,...), float16 moments or uint8 pixels."""

    @abstractmethod
    def parts(self) -> Iterator[np.ndarray]:
        """Yield all rows in order, a part (n,V,...) at a time."""


@dataclass(frozen=True)
class EncodedImages:
    """Images in a fixed order, encoded as moments or pixels, with labels and split."""

    kind: Kind
    shape: tuple[int, ...]
    """Shape of a stored view: (2C,h,w) for moments, (c,H,W) for pixels."""
    image_shape: tuple[int, int, int]
    classes: int
    labels: np.ndarray
    """(N,) int64."""
    split: np.ndarray
    """(N,) TRAIN, HELDOUT or REFERENCE."""
    vae: str
    vae_sha256: str
    scale: float
    shift: float
    flip: bool
    """Whether training mirrors images at random by default."""
    has_mirrored: bool
    """Whether mirror images are stored or can be computed."""
    in_memory: bool
    fingerprint: str
    rows: StoredRows
    pixels: Callable[[np.ndarray], np.ndarray]
    """Pixels, uint8 (m,c,H,W), of rows (m,): of held-out and reference rows, of any if `has_all_pixels`."""
    has_all_pixels: bool


@final
class MappedRows(StoredRows):
    """Memory-mapped shards of a prepared data set."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays, self._shards = arrays, ShardedRows(arrays)
        self.nbytes = self._shards.nbytes

    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        """See `StoredRows.read`."""
        return self._shards.read(rows, view)

    def parts(self) -> Iterator[np.ndarray]:
        """Yield the shards."""
        yield from self._arrays


@final
class RepaRows(StoredRows):
    """The moment files of REPA's layout, one per image."""

    def __init__(self, folder: RepaFolder) -> None:
        self._folder = folder
        self.nbytes = 2 * len(folder.ids) * int(np.prod(folder.shape))

    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        """See `StoredRows.read`."""
        # There are no mirror images, so `view` is 0.
        out = np.empty((len(rows), *self._folder.shape), np.float16)
        for place, row in enumerate(rows):
            out[place] = self._folder.moments(int(row))
        return out

    def parts(self) -> Iterator[np.ndarray]:
        """Yield the images one by one."""
        for row in range(len(self._folder.ids)):
            yield self._folder.moments(row)[None, None]


@final
class MemoryRows(StoredRows):
    """Rows that were encoded on the fly."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self.nbytes = rows, rows.nbytes

    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        """See `StoredRows.read`."""
        return self._rows[rows, view]

    def parts(self) -> Iterator[np.ndarray]:
        """Yield all rows at once."""
        yield self._rows
