"""Measures of representations, as published. X (M,D) and Y (M,E) are features of M images.

All compute in float64 and return Python numbers; a constant feature gives NaN where the measure is undefined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PENALTY = 1.0
"""Inverse strength C of the L2 penalty of the linear probe, scikit-learn's default."""


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of X and Y, in [0,1].

    ||Y'X||_F^2 / (||X'X||_F ||Y'Y||_F) on features centred over the images (Kornblith et al., "Similarity of
    Neural Network Representations Revisited", ICML 2019, eq. 5). Invariant to rotations and to the scale.
    """
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    norms = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    return _ratio(torch.linalg.norm(y.T @ x).square(), norms)


def cknna(x: Tensor, y: Tensor, k: int = 10) -> float:
    """Centred kernel nearest-neighbour alignment of X and Y: CKA restricted to mutual nearest neighbours.

    Kernels are cosines, set to zero where image j is not among the k nearest neighbours of i in both spaces;
    HSIC is the unbiased estimate (Huh et al., "The Platonic Representation Hypothesis", ICML 2024, appendix,
    and its released code; k=10 as in REPA). With k = M-1 this is the unbiased CKA.

    Raises:
        ValueError: If there are fewer than 4 images, or k is not in 2..M-1.
    """
    count = len(x)
    if count < 4 or not 2 <= k < count:
        raise ValueError(f"expected at least 4 images and 2 <= k < images, found {count} images and k={k}")
    kernels = [_cosines(z) for z in (x, y)]
    near = [_neighbours(kernel, k) for kernel in kernels]

    def alignment(i: int, j: int) -> Tensor:
        both = near[i] * near[j]
        return unbiased_hsic(both * kernels[i], both * kernels[j])

    return _ratio(alignment(0, 1), (alignment(0, 0) * alignment(1, 1)).sqrt())


def unbiased_hsic(k: Tensor, m: Tensor) -> Tensor:
    """Unbiased HSIC of two kernel matrices (M,M), a scalar; their diagonals are ignored.

    Song et al., "Feature Selection via Dependence Maximization", JMLR 2012, eq. 5.
    """
    count = len(k)
    k, m = (z - torch.diag(z.diagonal()) for z in (k, m))
    products = (k * m.T).sum()
    sums = k.sum() * m.sum() / ((count - 1) * (count - 2))
    rows = 2.0 * (k.sum(0) @ m.sum(1)) / (count - 2)
    return (products + sums - rows) / (count * (count - 3))


def effective_rank(covariance: Tensor) -> float:
    """Effective rank of centred features with this covariance (D,D), in [1,D].

    exp(-sum p log p), where p are the singular values of the feature matrix divided by their sum (Roy and
    Vetterli, "The effective rank: A measure of effective dimensionality", EUSIPCO 2007). The singular values
    are the square roots of the eigenvalues of the covariance, up to a factor that cancels.
    """
    values = torch.linalg.eigvalsh(covariance.double()).clamp(min=0.0).sqrt()
    if not float(values.sum()) > 0.0:
        return math.nan
    p = values / values.sum()
    return math.exp(-float(torch.special.xlogy(p, p).sum()))


def class_separation(x: Tensor, labels: Tensor) -> float:
    """Between-class divided by within-class variance of X, tr(S_b) / tr(S_w).

    A separability criterion of discriminant analysis (Fukunaga, "Introduction to Statistical Pattern
    Recognition", 1990, section 10.2), as a ratio of traces. NaN if every class has one image.
    """
    x = x.double()
    _, classes, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    means = torch.zeros(len(counts), x.shape[1], dtype=x.dtype, device=x.device)
    means = means.index_add_(0, classes, x) / counts[:, None]
    within = (x - means[classes]).square().sum()
    between = (counts[:, None] * (means - x.mean(0)).square()).sum()
    return _ratio(between, within)


@dataclass(frozen=True)
class Probe:
    """Result of a linear probe on held-out images."""

    accuracy: float
    """Share of correctly classified held-out images."""
    error: float
    """Binomial standard error of the accuracy."""
    train_accuracy: float


def linear_probe(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int
) -> Probe:
    """Fit a linear classifier on features (n,D), and return its accuracy on held-out features (m,D).

    Multinomial logistic regression on standardised features, minimised with L-BFGS from zero; the penalty on
    the weights is that of scikit-learn with C=1 (linear probes: Alain and Bengio, "Understanding intermediate
    layers using linear classifier probes", 2016). Labels (n,) and (m,) are in 0..classes-1.
    """
    mean, std = train.double().mean(0), train.double().std(0)
    std = torch.where(std > 1e-12, std, torch.ones_like(std))
    a, b = ((z.double() - mean) / std for z in (train, test))
    weight = torch.zeros(classes, a.shape[1], dtype=a.dtype, device=a.device, requires_grad=True)
    bias = torch.zeros(classes, dtype=a.dtype, device=a.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weight, bias],
        max_iter=200,
        tolerance_grad=1e-4,
        tolerance_change=1e-7,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        penalty = 0.5 / PENALTY * weight.square().sum() / len(a)
        loss = F.cross_entropy(a @ weight.T + bias, train_labels) + penalty
        torch.autograd.backward(loss)
        return loss

    with torch.enable_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]

    def accuracy(features: Tensor, labels: Tensor) -> float:
        found = (features @ weight.T + bias).argmax(1)
        return float((found == labels).double().mean())

    share = accuracy(b, test_labels)
    return Probe(share, math.sqrt(share * (1.0 - share) / len(b)), accuracy(a, train_labels))


def pca_rgb(tokens: Tensor) -> Tensor:
    """First three principal components of tokens (n,N,D) as colours (n,N,3) in [0,1].

    The components are those of all tokens together. Each is cut at its 1st and 99th percentile and scaled to
    [0,1]. Its sign makes the largest weight positive; a missing component, with D < 3, is 0.5.
    """
    flat = tokens.double().flatten(0, 1)
    flat = flat - flat.mean(0)
    _, vectors = torch.linalg.eigh(flat.T @ flat)
    top = vectors.flip(1)[:, :3]
    signs = top.gather(0, top.abs().argmax(0, keepdim=True)).sign()
    values = flat @ (top * signs)
    low, high = (torch.quantile(values, q, dim=0) for q in (0.01, 0.99))
    span = high - low
    scaled = torch.where(span > 1e-12, (values - low) / span.clamp(min=1e-12), torch.full_like(values, 0.5))
    scaled = F.pad(scaled, (0, 3 - scaled.shape[1]), value=0.5)
    return scaled.clamp(0.0, 1.0).view(*tokens.shape[:2], 3)


def _cosines(x: Tensor) -> Tensor:
    unit = F.normalize(x.double(), dim=-1)
    return unit @ unit.T


def _neighbours(kernel: Tensor, k: int) -> Tensor:
    """The k largest entries of each row as ones, without the diagonal (M,M)."""
    others = kernel.clone().fill_diagonal_(-math.inf)
    return torch.zeros_like(kernel).scatter_(1, others.topk(k, dim=1).indices, 1.0)


def _ratio(numerator: Tensor, denominator: Tensor) -> float:
    return float(numerator / denominator) if float(denominator) > 0.0 else math.nan
