"""Time of the Frechet distance at 2048 dimensions: symmetric eigenvalues, scipy's root, torch-fidelity.

All three in one run, on the statistics of 2,500 rows each, and they must agree.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from scipy.linalg import sqrtm
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

from stbench.evaluate.metrics import frechet_distance
from stbench.evaluate.statistics import Moments

pytestmark = pytest.mark.benchmark
WIDTH, ROWS = 2048, 2500


@pytest.fixture(scope="module")
def fits() -> tuple[Moments, Moments]:
    draws = torch.Generator().manual_seed(0)
    scale = torch.linspace(2.0, 0.01, WIDTH, dtype=torch.float64)
    both = []
    for shift in (0.0, 0.05):
        rows = torch.randn(ROWS, WIDTH, generator=draws, dtype=torch.float64) * scale + shift
        both.append((rows.mean(0), torch.cov(rows.T)))
    return both[0], both[1]


def symmetric(one: Moments, two: Moments) -> float:
    return frechet_distance(*one, *two)


def scipy_root(one: Moments, two: Moments) -> float:
    (mu1, sigma1), (mu2, sigma2) = ([x.numpy() for x in fit] for fit in (one, two))
    root = sqrtm(sigma1 @ sigma2)
    root = root[0] if isinstance(root, tuple) else root
    return float(((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2.0 * np.trace(np.real(root)))


def torch_fidelity(one: Moments, two: Moments) -> float:
    both = [{"mu": mu.numpy(), "sigma": sigma.numpy()} for mu, sigma in (one, two)]
    return float(fid_statistics_to_metric(*both, False)[KEY_METRIC_FID])


@pytest.mark.parametrize("form", [symmetric, scipy_root, torch_fidelity])
def test_frechet_distance(
    benchmark: BenchmarkFixture, fits: tuple[Moments, Moments], form: Callable[[Moments, Moments], float]
) -> None:
    benchmark.group = f"Frechet distance at {WIDTH} dimensions"
    found = benchmark.pedantic(form, args=fits, rounds=1)
    assert found == pytest.approx(symmetric(*fits), rel=1e-6)
