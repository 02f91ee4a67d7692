"""Reading ahead in one thread of this process: the next batch is read while the current one trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import final

import torch
from torch import Tensor


@final
class Prefetch:
    """Batches that were announced, being read or ready. What was not announced is simply not found."""

    def __init__(self, load: Callable[[Tensor], Tensor]) -> None:
        """`load(rows (B,))` reads a batch (B,...); it is only ever called in the thread."""
        self._load = load
        self._pool: ThreadPoolExecutor | None = None
        self._batches: list[tuple[Tensor, Future[Tensor]]] = []

    def announce(self, batches: Sequence[Tensor]) -> None:
        """Begin to read these batches of rows (B,), in this order; forget all others."""
        if self._pool is None:  # a data set that never trains needs no thread
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="stbench-prefetch")
        known, self._batches = self._batches, []
        for rows in batches:
            future = next((f for r, f in known if torch.equal(r, rows)), None)
            self._batches.append((rows, future or self._pool.submit(self._load, rows)))

    def take(self, rows: Tensor) -> Tensor | None:
        """Rows (B,) that are a stretch of an announced batch, waiting for them if need be; else None."""
        if not len(rows):
            return None
        for batch, future in self._batches:
            for start in torch.nonzero(batch == rows[0]).flatten().tolist():
                if torch.equal(batch[start : start + len(rows)], rows):
                    return future.result()[start : start + len(rows)]
        return None
