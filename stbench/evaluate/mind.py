"""MIND: the sliced 2-Wasserstein distance between two sets of features (Berthet et al., arXiv 2605.06797)."""

from __future__ import annotations

import torch
from torch import Tensor

from stbench.core.rng import generator

PROJECTIONS = 1000
"""Random directions, as in torch-fidelity (main, 2026-05)."""
SCALE = 3.0
"""Factor of the feature dimension in front of the mean over directions (paper and torch-fidelity)."""
BLOCK = 100
"""Directions per block: with 50,000 rows a block takes 40 MB."""


def monge_distance(
    samples: Tensor, references: Tensor, *, seed: int = 0, projections: int = PROJECTIONS
) -> float:
    """Compute the MIND of features (N,D) to references (M,D): 3 D E_u W2^2(<u,samples>, <u,references>).

    The mean is over `projections` directions u, uniform on the unit sphere. In one dimension, and for sets of
    equal size, the squared 2-Wasserstein distance is the mean squared difference of the sorted values. Of the
    larger set, as many random rows are used as the smaller one has. Rows and directions are drawn from the
    streams "mind-rows" and "mind" of `seed`; the arithmetic is float64.
    """
    count, width = min(len(samples), len(references)), samples.shape[1]
    # torch-fidelity draws rows and directions from one stream, and computes in float32.
    samples, references = (_random_rows(x.double(), count, seed) for x in (samples, references))
    normal = torch.randn(projections, width, generator=generator(seed, "mind"), dtype=torch.float64)
    directions = normal / normal.norm(dim=1, keepdim=True)

    total = 0.0
    for block in torch.split(directions.to(samples.device), BLOCK):
        a, b = ((block @ x.T).sort(dim=1).values for x in (samples, references))
        total += float((a - b).square().mean(1).sum())
    return SCALE * width * total / projections


def _random_rows(rows: Tensor, count: int, seed: int) -> Tensor:
    """Return `count` different rows of (N,D) in random order; all of them, in order, if there are no more."""
    if len(rows) == count:
        return rows
    chosen = torch.randperm(len(rows), generator=generator(seed, "mind-rows"))[:count]
    return rows[chosen.to(rows.device)]
