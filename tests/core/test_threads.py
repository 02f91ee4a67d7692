"""Independent computations in host threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from stbench.core.threads import map_in_threads


@pytest.fixture(autouse=True)
def cores() -> Iterator[int]:
    """Four cores for torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield 4
    assert torch.get_num_threads() == 4
    torch.set_num_threads(before)


def test_results_are_in_order_and_no_thread_records_gradients() -> None:
    network = nn.Linear(3, 3)
    rows = torch.randn(40, 3)
    parts = map_in_threads(lambda i: network(rows[i : i + 1]), range(40), network=network, limit=3)
    assert not any(part.requires_grad for part in parts)
    assert torch.allclose(torch.cat(parts), network(rows).detach(), atol=1e-6)


@pytest.mark.parametrize(
    ("limit", "items", "threads"), [(2, 9, 2), (9, 9, 4), (9, 3, 3), (1, 9, 1), (0, 2, 1)]
)
def test_threads_share_the_cores(limit: int, items: int, threads: int) -> None:
    together = threading.Barrier(threads)

    def call(item: int) -> tuple[int, int]:
        if item < threads:  # every thread has to take one of these
            together.wait(timeout=30)
        return threading.get_ident(), torch.get_num_threads()

    found = map_in_threads(call, range(items), network=nn.Identity(), limit=limit)
    assert len({thread for thread, _ in found}) == threads
    assert {number for _, number in found} == {4 // threads}


def test_an_error_is_raised_and_stops_the_other_threads() -> None:
    network = nn.Identity()
    started = threading.Event()

    def call(item: int) -> None:
        if item == 0:
            started.wait(timeout=30)
            raise ValueError("part 0")
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            started.set()
            network(torch.zeros(1))

    begun = time.monotonic()
    with pytest.raises(ValueError, match="part 0"):
        map_in_threads(call, range(8), network=network, limit=4)
    assert time.monotonic() - begun < 20
    assert not network._forward_pre_hooks


def test_an_interrupt_stops_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Identity()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def call(item: int) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            network(torch.zeros(1))

    begun = time.monotonic()
    monkeypatch.setattr("concurrent.futures.Future.result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        map_in_threads(call, range(8), network=network, limit=4)
    assert time.monotonic() - begun < 20
