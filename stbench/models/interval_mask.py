"""Losses restricted to an interval of times: which samples are computed, and how errors are averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from stbench.core.objective import Noised
from stbench.core.recipe import Step
from stbench.models import align
from stbench.models.align import Clock, Interval

Mask = Literal["samples", "inside-mean", "released"]
"""How an interval restricts a loss: to the samples inside it, with two ways to average, or as released."""


def select_rows(step: Step, interval: Interval, *, mask: Mask, time: Clock) -> tuple[Tensor, Tensor]:
    """Return the rows to compute (n,) on the batch's device, and whether each row is inside (B,) on the host.

    The released mask needs every row.
    """
    inside = align.in_interval(step.objective, step.noised.t_host, interval, native=time == "native")
    rows = torch.arange(len(inside)) if mask == "released" else inside.nonzero().squeeze(1)
    return rows.to(step.noised.x_t.device, non_blocking=True), inside


def take(values: Tensor, rows: Tensor) -> Tensor:
    """Return the rows (n,...) of `values` (B,...), without a copy if these are all rows."""
    return values if len(rows) == len(values) else values[rows]


def noised_rows(noised: Noised, rows: Tensor, inside: Tensor) -> Noised:
    """Return the training points of the rows (n,) that `select_rows` returned."""
    if len(rows) == len(inside):
        return noised
    x_t, t, x0, noise = (value[rows] for value in (noised.x_t, noised.t, noised.x0, noised.noise))
    return replace(noised, x_t=x_t, t=t, t_host=noised.t_host[inside], x0=x0, noise=noise)


def apply_mask(error: Tensor, rows: Tensor, inside: Tensor, *, mask: Mask) -> Tensor:
    """Return values (B,) whose mean is the loss, from the errors (n,) of the rows (n,).

    "samples" averages the errors inside the interval over the full batch, "inside-mean" over the n samples
    inside (0 if there are none), so that its weight depends on the batch of each forward pass. "released"
    multiplies every error by the share of samples inside, the result of a (B,) loss times a (B,1,1,1) mask.
    """
    if mask == "released":
        return align.released_mask(error, inside)
    value = align.masked(error, rows, len(inside))
    return value * (len(inside) / max(1, len(rows))) if mask == "inside-mean" else value
