"""Independent computations in host threads, each with its share of the cores.

torch divides every operation among all cores. The operations of a small network are so short that waiting for
each other costs more than the second core gains; threads that compute whole images wait only at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any, TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Stopped(Exception):
    """Another thread failed, or the user interrupted the computation."""


def map_in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], *, network: nn.Module, limit: int
) -> list[Result]:
    """Return `function(item)` for every item, in order, computed without gradients in up to `limit` threads.

    There are never more threads than cores that torch uses. The first exception of a thread is raised here.
    After it, and after Ctrl-C, the other threads end at their next forward pass of `network`. `function`
    must not change anything that other calls read, and must not enter torch's process-wide switches, such as
    `stbench.core.device.tf32`; enter them around this call.
    """
    cores = torch.get_num_threads()
    workers = max(1, min(cores, limit, len(items)))
    stop = Event()

    def check(*_: Any) -> None:
        if stop.is_set():
            raise _Stopped

    def call(item: Item) -> Result:
        # Gradient mode belongs to a thread: a new one records the operations.
        with torch.no_grad():
            return function(item)

    if workers == 1:
        return [call(item) for item in items]
    # The children too: guidance calls the network's own method, which skips the hooks of the network itself.
    hooks = [module.register_forward_pre_hook(check) for module in (network, *network.children())]
    # A thread takes this number over with its first operation; it cannot be set for one thread alone.
    torch.set_num_threads(max(1, cores // workers))
    try:
        with ThreadPoolExecutor(workers, thread_name_prefix="stbench-part") as pool:
            futures = [pool.submit(call, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(cores)
        for hook in hooks:
            hook.remove()
