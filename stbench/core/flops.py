"""Model FLOPs by formula: the cost of one image, two FLOPs per multiply-add.

Torch's own counter runs once per (module, input shape) on the meta device, where attention decomposes into
matrix products that it counts. Costs are linear in the batch size, so one image is enough. A backward pass
counts as two forward passes; element-wise operations, the optimiser and the EMA are not counted
(docs/protocol.md).
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Structure = tuple[tuple[Any, ...], ...]

# Weak keys: the cache must not keep a finished stage's network alive.
_by_module: weakref.WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], int]] = weakref.WeakKeyDictionary()
_twins: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
_by_structure: dict[tuple[Structure, tuple[Any, ...]], int] = {}


def count(call: Callable[[], object]) -> int:
    """Count the FLOPs of one call, including any backward pass it runs."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def forward_flops(module: nn.Module, call: Callable[[nn.Module], object], key: tuple[Any, ...]) -> int:
    """Count the FLOPs of `call(copy of module on the meta device)`, cached under `key`.

    The cache is shared with modules of the same structure, so `key` must identify what `call` does.
    """
    known = _by_module.setdefault(module, {})
    if key not in known:
        structure = _structure(module)
        known[key] = _by_structure.get((structure, key), 0) if structure else 0
        known[key] = known[key] or _count_on_meta(module, call)
        if structure:
            _by_structure[structure, key] = known[key]
    return known[key]


def _count_on_meta(module: nn.Module, call: Callable[[nn.Module], object]) -> int:
    twin = _twins.get(module) or meta_twin(module)
    with torch.no_grad():
        return count(lambda: call(twin))


def meta_twin(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device. No data is copied."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.to("meta")
    return copy.deepcopy(module, memo).to("meta")


def keep_twin(module: nn.Module) -> None:
    """Count the FLOPs of a module on a copy that is made now: it is going to be sharded."""
    _twins[module] = meta_twin(module)


def _structure(module: nn.Module) -> Structure | None:
    """Describe what the FLOPs of a forward pass can depend on: classes, attributes and tensor shapes.

    Returns None if an attribute is not plain data or a hook is registered; such a module is counted alone.
    """
    rows = []
    for name, part in module.named_modules():
        if any(getattr(part, hooks) for hooks in _HOOKS):
            return None
        attributes = {k: v for k, v in vars(part).items() if k not in _MODULE_INTERNALS}
        tensors = (
            {k: v for k, v in attributes.items() if isinstance(v, Tensor)} | part._parameters | part._buffers
        )
        others = {k: v for k, v in attributes.items() if k not in tensors}
        if not _is_plain(others):
            return None
        shapes = tuple((k, None if tensor is None else tuple(tensor.shape)) for k, tensor in tensors.items())
        rows.append((name, type(part), repr(others), shapes))
    return tuple(rows)


_MODULE_INTERNALS = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def _is_plain(value: Any) -> bool:
    """Whether `repr(value)` says everything about the value."""
    if isinstance(value, Mapping):
        return all(_is_plain(k) and _is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return all(_is_plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    return value is None or isinstance(value, (bool, int, float, str, torch.dtype))
