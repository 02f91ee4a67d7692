"""What the conformance checks share: how a violation is raised, and how values are compared."""

from __future__ import annotations

import torch
from torch import Tensor

Inputs = tuple[Tensor, Tensor, Tensor]
"""x_t (B,C,H,W), t (B,) and labels (B,)."""


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with `message` unless `condition` is true."""
    if not condition:
        raise AssertionError(message)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether a equals b up to float32 rounding, relative to the largest value of b."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
