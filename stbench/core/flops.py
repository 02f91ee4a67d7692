"""Model FLOPs by formula: what one image costs a module, two FLOPs per multiply-add.

The formula is torch's own counter run once per (module, input shape) on the meta device, where attention
decomposes into counted matrix products; costs are linear in the batch, so one image is enough. Backward
counts as twice the forward; element-wise work, the optimiser and the EMA count as nothing (docs/protocol.md).
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

_cache: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()


def count(call: Callable[[], object]) -> int:
    """FLOPs of one call, forward and whatever backward it runs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def forward_flops(module: nn.Module, call: Callable[[nn.Module], object], key: tuple[Any, ...]) -> int:
    """FLOPs of `call(module)` on the meta device, remembered under `key` for this module."""
    known = _cache.setdefault(module, {})
    if key not in known:
        twin = copy.deepcopy(module).to("meta")
        with torch.no_grad():
            known[key] = count(lambda: call(twin))
    return known[key]
