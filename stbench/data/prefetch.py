"""Read the next batch in a background thread while the current one is trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final

import torch
from torch import Tensor


@final
class Prefetch:
    """Batches of rows that are being read, or have been read, in one background thread."""

    def __init__(self, load: Callable[[Tensor], Tensor]) -> None:
        """Read batches with `load(rows (B,)) -> (B,...)`, which is only called in the thread."""
        self._load = load
        self._pool: ThreadPoolExecutor | None = None
        self._batches: list[tuple[Tensor, Future[Tensor]]] = []

    def schedule(self, batches: Sequence[Tensor]) -> None:
        """Start to read these batches of rows (B,), in this order, and drop all others."""
        if self._pool is None:  # started late: a data set that is only evaluated needs no thread
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="stbench-prefetch")
        known, self._batches = self._batches, []
        for rows in batches:
            future = next((f for r, f in known if torch.equal(r, rows)), None)
            self._batches.append((rows, future or self._pool.submit(self._load, rows)))

    def take(self, rows: Tensor) -> Tensor | None:
        """Return the data of `rows` (B,), or None unless they are a contiguous part of a scheduled batch.

        A rank takes its slice of the global batch. Waits until the batch has been read.
        """
        if not len(rows):
            return None
        for batch, future in self._batches:
            # A row may occur several times in a batch, so every occurrence of the first one is tried.
            for start in torch.nonzero(batch == rows[0]).flatten().tolist():
                if torch.equal(batch[start : start + len(rows)], rows):
                    return future.result()[start : start + len(rows)]
        return None
