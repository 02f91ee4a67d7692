"""Randomness keyed by (seed, stream, images seen): never by rank and never by the order of calls.

Every number a step needs is drawn on the host for the *global* batch, and the caller keeps its rows. A
resumed run, and a run split over ranks or micro-batches, therefore sees the numbers the plain run would have
seen.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


def key(seed: int, stream: str, images_seen: int = 0) -> int:
    """A 63-bit seed from (seed, stream name, images seen); the same on every platform."""
    digest = hashlib.sha256(f"{seed}/{stream}/{images_seen}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stream: str, images_seen: int = 0) -> torch.Generator:
    """A fresh host generator for one stream at one point of the run."""
    return torch.Generator().manual_seed(key(seed, stream, images_seen))


@dataclass(frozen=True)
class Rng:
    """The random numbers of one step: draws for `global_batch` rows, keeps rows `start:stop`.

    Streams used by the engine: "data", "posterior", "t", "noise", "label-drop". A recipe that needs numbers
    of its own names its own stream (by convention the recipe's name), so it never disturbs the others.
    """

    seed: int
    images_seen: int
    global_batch: int
    start: int = 0
    stop: int | None = None

    def generator(self, stream: str) -> torch.Generator:
        """A fresh host generator of this step for one stream."""
        return generator(self.seed, stream, self.images_seen)

    def _rows(self, drawn: Tensor) -> Tensor:
        return drawn[self.start : self.stop]

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 (B, *shape) on the host, B = rows kept."""
        return self._rows(torch.randn((self.global_batch, *shape), generator=self.generator(stream)))

    def uniform(self, stream: str) -> Tensor:
        """Uniform float64 (B,) in [0,1) on the host."""
        return self._rows(
            torch.rand(self.global_batch, generator=self.generator(stream), dtype=torch.float64)
        )

    def integers(self, stream: str, high: int) -> Tensor:
        """Uniform int64 (B,) in [0, high) on the host."""
        return self._rows(torch.randint(high, (self.global_batch,), generator=self.generator(stream)))
