"""Forward passes of teachers and encoders: their precision, and the number of their rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from stbench.core.phases import phase

PADDED_SHARES = (0.375, 0.625, 1.0)
"""Shares of the largest number of rows to which the rows of a compiled teacher are padded: one graph each.

The interval [0.4, 0.7], in which some losses apply, contains 0.3 of the samples on average.
"""


@contextmanager
def frozen_forward(x: Tensor, precision: str) -> Iterator[None]:
    """Disable gradients, and set autocast on the device of x to `precision`, whatever the student's is."""
    enabled = precision == "bf16" and not x.is_meta
    kind = "cuda" if x.is_cuda else "cpu"
    with phase("teachers"), torch.no_grad(), torch.autocast(kind, torch.bfloat16, enabled=enabled):
        yield


def pad_rows(x: Tensor, most: int) -> Tensor:
    """Repeat the first row of x (b,...) until the number of rows is one of PADDED_SHARES of `most`.

    More than `most` rows are padded to a share of a multiple of it.
    """
    whole = -(-x.shape[0] // most) * most
    sizes = [math.ceil(share * whole) for share in PADDED_SHARES]
    missing = next(size for size in sizes if size >= x.shape[0]) - x.shape[0]
    return torch.cat([x, x[:1].expand(missing, *x.shape[1:])])
