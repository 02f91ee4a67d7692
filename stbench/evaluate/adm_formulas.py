"""The formulas of ADM's evaluator on features: streaming moments, inception score, precision and recall.

Dhariwal and Nichol 2021; Kynkäänniemi et al. 2019 for precision and recall. Everything is in float64 unless
stated otherwise, and nothing here knows about images, networks or files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

SPLIT = 5000
"""Images per split of the inception score (ADM)."""
NEIGHBOURS = 3
"""k of precision and recall (ADM)."""
BLOCK = 5000
"""Rows per block of pairwise distances; two float64 blocks take 400 MB."""


@final
class RunningMoments:
    """Mean and covariance of rows that arrive in batches, equal to numpy's `mean` and `cov` of all rows.

    Accumulates sums of squares about the running mean, so that large means do not cancel (Chan, Golub and
    LeVeque 1983).
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Add rows (B,D)."""
        rows = rows.double()
        mean = rows.mean(0)
        centred = rows - mean
        scatter, batch = centred.T @ centred, len(rows)
        if self.count == 0:
            self._mean, self._scatter, self.count = mean, scatter, batch
            return
        # Merge the batch: its own scatter, plus the scatter of the two means about their common mean.
        total, shift = self.count + batch, mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * batch / total)
        self._mean = self._mean + shift * (batch / total)
        self.count = total

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the mean (D,) and the covariance (D,D), divided by N-1, on the CPU."""
        return self._mean.cpu(), (self._scatter / (self.count - 1)).cpu()


def inception_score_in_order(logits: Tensor, split: int = SPLIT) -> float:
    """Compute ADM's inception score of logits (N,K): the mean over splits of exp of the mean KL divergence.

    Splits are consecutive rows and the last one may be shorter. Nothing is shuffled, so the score depends on
    the order of the images.
    """
    scores = []
    for part in torch.split(logits.double(), split):
        # KL(p || mean p) from log-softmax: p log p stays finite where p underflows
        log_p = part.log_softmax(1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0, keepdim=True).log())).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(
    samples: Tensor,
    references: Tensor,
    *,
    neighbours: int = NEIGHBOURS,
    block: int = BLOCK,
    fp16: bool = False,
) -> tuple[float, float]:
    """Compute improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Precision is the share of samples (N,D) inside any reference's ball, recall the share of references (M,D)
    inside any sample's ball. The radius of a ball is the distance to the k-th nearest neighbour in its own
    set; the boundary belongs to the ball. Distances are computed in blocks: 50,000 rows would need 20 GB.
    They are float64, or rounded as in ADM's evaluator with `fp16`, which changes the third decimal.
    """
    # Radii are compared as squares, so that no root rounds a point across a boundary.
    distances = _squared_distances_fp16 if fp16 else _squared_distances
    samples, references = samples.double(), references.double()

    def share_inside(points: Tensor, centres: Tensor) -> float:
        radii = _squared_radii(centres, neighbours, block=block, distances=distances)
        return _share_inside(points, centres, radii, block=block, distances=distances)

    return share_inside(samples, references), share_inside(references, samples)


Distances = Callable[[Tensor, Tensor], Tensor]
"""Squared distances (N,M) of rows (N,D) and (M,D)."""


def _squared_radii(rows: Tensor, neighbours: int, *, block: int, distances: Distances) -> Tensor:
    """Return the squared distance (N,) of every row to its k-th nearest other row."""
    radii = []
    for part in torch.split(rows, block):
        nearest = torch.empty(len(part), 0, dtype=rows.dtype, device=rows.device)
        # Carry the k + 1 nearest so far from block to block.
        for others in torch.split(rows, block):
            both = torch.cat([nearest, distances(part, others)], dim=1)
            # k + 1, because every row is its own nearest neighbour
            nearest = both.topk(min(neighbours + 1, both.shape[1]), dim=1, largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _share_inside(
    points: Tensor, centres: Tensor, squared_radii: Tensor, *, block: int, distances: Distances
) -> float:
    """Return the share of points (N,D) inside any ball around centres (M,D)."""
    inside = []
    for part in torch.split(points, block):
        found = torch.zeros(len(part), dtype=torch.bool, device=points.device)
        for others, radii in zip(torch.split(centres, block), torch.split(squared_radii, block), strict=True):
            found |= (distances(part, others) <= radii).any(1)
        inside.append(found)
    return float(torch.cat(inside).double().mean())


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared distances (N,M) of rows (N,D) and (M,D), by the same expansion as ADM."""
    # |a-b|^2 = |a|^2 + |b|^2 - 2ab; rounding can make it slightly negative for equal rows
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2.0).clamp(min=0.0)


def _squared_distances_fp16(a: Tensor, b: Tensor) -> Tensor:
    """Return squared distances (N,M) with the roundings of ADM's evaluator, in float64.

    ADM casts the features to float16 and computes |a|^2 - 2ab + |b|^2 with every result rounded to float16.
    The sums are accumulated in float32 here, as on a GPU. If a distance overflows, ADM uses float32 for the
    block; float64 is used here.
    """
    low_a, low_b = a.half().float(), b.half().float()
    squares_a, squares_b = (x.square().half().float().sum(1).half() for x in (low_a, low_b))
    twice = (2.0 * (low_a @ low_b.T).half().float()).half()
    found = (squares_a[:, None] - twice) + squares_b
    if not bool(found.isfinite().all()):
        return _squared_distances(a, b)
    return found.clamp(min=0.0).double()
