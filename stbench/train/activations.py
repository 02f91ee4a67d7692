"""The memory that one training step allocates, measured on the meta device, where nothing is allocated."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors on a device that operations in the block create and that are alive."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.live = 0
        self.peak = 0
        self._storages: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operation and count the storages of its outputs that are new."""
        known = {id(t.untyped_storage()) for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for output in tree_flatten(outputs)[0]:
            if isinstance(output, Tensor) and output.device.type == self.device.type:
                storage = output.untyped_storage()
                if id(storage) not in known and storage not in self._storages:  # an in-place result or view
                    self._count(storage)
        return outputs

    def _count(self, storage: Any) -> None:
        size = storage.nbytes()
        self._storages[storage] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size).atexit = False

    def _release(self, size: int) -> None:
        self.live -= size


class _FusedAttention(torch.autograd.Function):
    """What a fused attention kernel keeps for its backward pass: inputs, output and one number per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output (B,heads,N,head width)."""
        b, heads, n, width = q.shape
        output = q.new_empty(b, n, heads, width).transpose(1, 2)  # the layout in which kernels write it
        ctx.save_for_backward(q, k, v, output, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        """Return gradients of the shapes of q, k and v."""
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


LOWERED = frozenset(
    {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__}
)
"""Operations that autocast runs in bfloat16, as far as backbones, heads and encoders use them."""


class MetaKernels(TorchFunctionMode):
    """Makes operations on the meta device allocate what they allocate on a GPU.

    There, attention runs in a fused kernel, which does not store the scores, while torch's kernel for the
    meta device does. And autocast converts the inputs of matrix products, but does not support that device:
    the block must run under ``torch.autocast("cpu")``, which changes nothing on the meta device, but says
    where autocast is on.
    """

    def __init__(self) -> None:
        super().__init__()
        self._converted: dict[Tensor, Tensor] = {}
        self._is_on = False

    def __enter__(self) -> MetaKernels:
        """Start to convert."""
        self._is_on = True
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        """Stop to convert."""
        self._is_on = False
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def covering(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that runs under this mode also during a backward pass, which suspends it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with contextlib.nullcontext() if self._is_on else self:
                return function(*args, **kwargs)

        return call

    def drop_converted(self) -> int:
        """Forget the converted parameters, as autocast does at its end; returns their size in bytes."""
        size = sum(value.numel() * value.element_size() for value in self._converted.values())
        self._converted.clear()
        return size

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Convert the inputs as autocast does, then call the operation or what stands for it."""
        kwargs = kwargs or {}
        is_attention = func is F.scaled_dot_product_attention
        if torch.is_autocast_enabled("cpu") and (is_attention or func in LOWERED):
            args = [self._lower(value) for value in args]
            kwargs = {name: self._lower(value) for name, value in kwargs.items()}
        if is_attention and args[0].is_meta:
            return _FusedAttention.apply(*args[:3])
        return func(*args, **kwargs)

    def _lower(self, value: Any) -> Any:
        """Return a float32 tensor as bfloat16. A parameter is converted once, as autocast's cache does."""
        if not isinstance(value, Tensor) or not value.is_meta or value.dtype != torch.float32:
            return value
        if not isinstance(value, torch.nn.Parameter) or not value.requires_grad:
            return value.bfloat16()
        if value not in self._converted:
            self._converted[value] = value.bfloat16()
        return self._converted[value]
