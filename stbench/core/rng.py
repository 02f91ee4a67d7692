"""Random numbers keyed by (seed, stream, images seen), never by rank or order of calls.

Every number that a step needs is drawn on the host for the *global* batch, and the caller keeps its rows. A
resumed run, or a run split over ranks or micro-batches, therefore draws the same numbers as an uninterrupted
run in one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


def key(seed: int, stream: str, images_seen: int = 0) -> int:
    """Return a 63-bit seed from (seed, stream name, images seen), the same on every platform."""
    digest = hashlib.sha256(f"{seed}/{stream}/{images_seen}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, stream: str, images_seen: int = 0) -> torch.Generator:
    """Return a new host generator for one stream at one point of the run."""
    return torch.Generator().manual_seed(key(seed, stream, images_seen))


@contextmanager
def seeded_globals(
    seed: int, stream: str, images_seen: int = 0, device: torch.device | str = "cpu"
) -> Iterator[None]:
    """Seed torch's global generators, of the host and of `device`, for a `with` block, and restore them.

    Nothing of stbench draws from them. A plug-in that does, such as a backbone with dropout, then draws the
    same numbers in a resumed run as in an uninterrupted one.
    """
    device = torch.device(device)
    index = (device.index or 0) if device.type == "cuda" else None
    with torch.random.fork_rng(devices=[] if index is None else [index]):
        number = key(seed, stream, images_seen)
        torch.default_generator.manual_seed(number)
        if index is not None:
            torch.cuda.default_generators[index].manual_seed(number)
        yield


@dataclass(frozen=True)
class Rng:
    """The random numbers of one step: draws for `global_batch` rows, returns rows `start:stop`.

    The engine uses the streams "data", "posterior", "t", "noise" and "label-drop". A recipe uses a stream
    with its own name, so that its draws do not change those of other streams.
    """

    seed: int
    images_seen: int
    global_batch: int
    start: int = 0
    stop: int | None = None

    def generator(self, stream: str) -> torch.Generator:
        """Return a new host generator of this step for one stream."""
        return generator(self.seed, stream, self.images_seen)

    def _rows(self, drawn: Tensor) -> Tensor:
        return drawn[self.start : self.stop]

    def normal(self, stream: str, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal float32 numbers (B, *shape) on the host; B is the number of rows returned."""
        return self._rows(torch.randn((self.global_batch, *shape), generator=self.generator(stream)))

    def uniform(self, stream: str) -> Tensor:
        """Draw uniform float64 numbers (B,) in [0,1) on the host."""
        return self._rows(
            torch.rand(self.global_batch, generator=self.generator(stream), dtype=torch.float64)
        )

    def integers(self, stream: str, high: int) -> Tensor:
        """Draw uniform int64 numbers (B,) in [0, high) on the host."""
        return self._rows(torch.randint(high, (self.global_batch,), generator=self.generator(stream)))
