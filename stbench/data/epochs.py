"""The order in which images are trained on: one permutation per epoch, with random mirroring."""

from __future__ import annotations

from functools import lru_cache
from typing import final

import torch
from torch import Tensor

from stbench.core.rng import generator


@final
class Epochs:
    """The endless sequence of permutations of `size` images. A batch may contain the end of one epoch and
    the start of the next.

    Rows 0..size-1 are the images; with `flip`, rows size..2*size-1 are their mirror images in the same order.
    """

    def __init__(self, size: int, flip: bool) -> None:
        self._size, self._flip = size, flip
        # Consecutive batches are from the same epoch, or from two.
        self._epoch = lru_cache(maxsize=4)(self._permutation)

    def rows(self, seed: int, start: int, count: int) -> Tensor:
        """Return the rows (count,) int64 from position `start` on, without drawing the epochs before it."""
        stop = start + count
        parts = []
        for epoch in range(start // self._size, (stop - 1) // self._size + 1):
            begin = epoch * self._size
            parts.append(self._epoch(seed, epoch)[max(start - begin, 0) : stop - begin])
        return torch.cat(parts)

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        """Return the rows of one epoch (size,): every image once, as it is or mirrored."""
        seen = epoch * self._size
        rows = torch.randperm(self._size, generator=generator(seed, "data", seen))
        if self._flip:
            rows += self._size * torch.randint(2, (self._size,), generator=generator(seed, "flip", seen))
        return rows
