"""Model FLOPs by formula: the cost of one image, two FLOPs per multiply-add.

Torch's own counter runs once per (module, input shape) on the meta device, where attention decomposes into
matrix products that it counts. Costs are linear in the batch size, so one image is enough. A backward pass
counts as two forward passes; element-wise operations, the optimiser and the EMA are not counted
(docs/protocol.md).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Weak keys: the cache must not keep a finished stage's network alive.
_cache: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()


def count(call: Callable[[], object]) -> int:
    """Count the FLOPs of one call, including any backward pass it runs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def forward_flops(module: nn.Module, call: Callable[[nn.Module], object], key: tuple[Any, ...]) -> int:
    """Count the FLOPs of `call(copy of module on the meta device)`, cached under `key` for this module."""
    known = _cache.setdefault(module, {})
    if key not in known:
        twin = copy.deepcopy(module).to("meta")
        with torch.no_grad():
            known[key] = count(lambda: call(twin))
    return known[key]
