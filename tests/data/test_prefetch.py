"""Reading batches ahead."""

from __future__ import annotations

import torch
from torch import Tensor

from stbench.data.prefetch import Prefetch


def test_each_scheduled_batch_is_read_once_and_parts_of_it_are_found() -> None:
    read: list[list[int]] = []

    def load(rows: Tensor) -> Tensor:
        read.append(rows.tolist())
        return rows * 10

    ahead = Prefetch(load)
    batches = [torch.tensor([4, 2, 4, 9]), torch.tensor([1, 7, 7, 3])]
    ahead.schedule(batches)
    ahead.schedule([batches[1], torch.tensor([5, 6])])
    found = ahead.take(torch.tensor([7, 3]))
    assert found is not None and found.tolist() == [70, 30]
    assert ahead.take(torch.tensor([4, 9])) is None
    assert ahead.take(torch.tensor([7, 1])) is None
    assert read[:2] == [[4, 2, 4, 9], [1, 7, 7, 3]]
    last = ahead.take(torch.tensor([5, 6]))
    assert last is not None and last.tolist() == [50, 60] and len(read) == 3
