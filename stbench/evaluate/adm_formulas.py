"""Formulas of ADM's evaluator on features: streaming moments, inception score, precision and recall.

Dhariwal and Nichol 2021; Kynkäänniemi et al. 2019 for precision and recall. All in float64.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

SPLIT = 5000
"""Images in a split of the inception score (ADM)."""
NEIGHBOURS = 3
"""k of precision and recall (ADM)."""
BLOCK = 5000
"""Rows of a block of distances; two blocks of float64 are 400 MB."""


@final
class Moments:
    """Mean and covariance of rows that arrive in batches, as numpy's `mean` and `cov` of all of them.

    Chan, Golub and LeVeque 1983: sums of squares about the running mean, so nothing cancels.
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean = self._scatter = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Take in rows (B,D)."""
        rows = rows.double()
        mean = rows.mean(0)
        centred = rows - mean
        scatter, batch = centred.T @ centred, len(rows)
        if self.count == 0:
            self._mean, self._scatter, self.count = mean, scatter, batch
            return
        total, shift = self.count + batch, mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.count * batch / total)
        self._mean = self._mean + shift * (batch / total)
        self.count = total

    def finish(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D,D), divided by N-1, on the host."""
        return self._mean.cpu(), (self._scatter / (self.count - 1)).cpu()


def inception_score_in_order(logits: Tensor, split: int = SPLIT) -> float:
    """ADM's inception score of logits (N,K): mean over consecutive splits of exp of the mean KL divergence.

    Nothing is shuffled and the last split may be shorter, so the order of the file counts.
    """
    scores = []
    for part in torch.split(logits.double(), split):
        log_p = part.log_softmax(1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(0, keepdim=True).log())).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def precision_recall(
    samples: Tensor, references: Tensor, neighbours: int = NEIGHBOURS, block: int = BLOCK
) -> tuple[float, float]:
    """Shares of samples (N,D) in the references' balls and of references (M,D) in the samples' balls.

    A ball reaches to the k-th nearest neighbour in its own set, the edge included. Blocks of distances, so
    50,000 rows need no 20 GB.
    """
    samples, references = samples.double(), references.double()
    precision = _covered(samples, references, _radii(references, neighbours, block), block)
    recall = _covered(references, samples, _radii(samples, neighbours, block), block)
    return precision, recall


def _radii(rows: Tensor, neighbours: int, block: int) -> Tensor:
    """Squared distance (N,) of every row to its k-th nearest other row."""
    radii = []
    for part in torch.split(rows, block):
        nearest = torch.empty(len(part), 0, dtype=rows.dtype, device=rows.device)
        for others in torch.split(rows, block):
            both = torch.cat([nearest, _squared(part, others)], dim=1)
            # one more than k, because every row is nearest to itself
            nearest = both.topk(min(neighbours + 1, both.shape[1]), dim=1, largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _covered(points: Tensor, centres: Tensor, radii: Tensor, block: int) -> float:
    inside = []
    for part in torch.split(points, block):
        found = torch.zeros(len(part), dtype=torch.bool, device=points.device)
        for others, reach in zip(torch.split(centres, block), torch.split(radii, block), strict=True):
            found |= (_squared(part, others) <= reach).any(1)
        inside.append(found)
    return float(torch.cat(inside).double().mean())


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances (N,M) of rows (N,D) and (M,D), by the product that ADM uses."""
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return torch.addmm(squares, a, b.T, alpha=-2.0).clamp(min=0.0)
