"""ADM's formulas against numpy, scipy and scikit-learn on synthetic features."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.special import softmax
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from stbench.evaluate.adm_formulas import RunningMoments, inception_score_in_order, precision_recall
from stbench.evaluate.metrics import frechet_distance


def features(seed: int, count: int, width: int, shift: float = 0.0) -> Tensor:
    """Correlated rows (count,width) with a mean far from zero."""
    draws = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=draws, dtype=torch.float64) / width**0.5
    return torch.randn(count, width, generator=draws, dtype=torch.float64) @ mixing + 30.0 + shift


def fit(rows: Tensor, batch: int = 7) -> tuple[Tensor, Tensor]:
    moments = RunningMoments()
    for part in torch.split(rows, batch):
        moments.add(part)
    return moments.finish()


@pytest.mark.parametrize("batch", [1, 7, 90, 500])
def test_running_moments_equal_numpys_mean_and_covariance(batch: int) -> None:
    rows = features(0, 90, 12)
    mean, covariance = fit(rows, batch)
    assert np.allclose(mean, rows.numpy().mean(0), rtol=1e-13)
    assert np.allclose(covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_running_moments_of_float32_rows_are_float64() -> None:
    rows = features(1, 4000, 5).float() * 1e3
    expected = np.cov(rows.double().numpy(), rowvar=False)
    assert np.allclose(fit(rows, 64)[1], expected, rtol=1e-10)


@pytest.mark.parametrize("count", [400, 20], ids=["full rank", "fewer rows than features"])
def test_frechet_distance_equals_that_by_a_matrix_root(count: int) -> None:
    a, b = features(2, count, 40), features(3, count, 40, 0.2)
    (mu1, sigma1), (mu2, sigma2) = fit(a), fit(b)
    root = sqrtm(sigma1.numpy() @ sigma2.numpy())
    root = np.real(root[0] if isinstance(root, tuple) else root)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2) - 2.0 * np.trace(root)
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_distance_is_symmetric_and_zero_to_itself() -> None:
    one, two = fit(features(4, 100, 16)), fit(features(5, 100, 16))
    assert frechet_distance(*one, *two) == pytest.approx(frechet_distance(*two, *one), rel=1e-10)
    assert 0.0 <= frechet_distance(*one, *one) < 1e-9


def test_inception_score_depends_on_the_order_of_the_images() -> None:
    logits = features(6, 230, 9) * 0.5
    p = softmax(logits.numpy(), axis=1)
    scores = []
    for start in range(0, 230, 100):  # splits of 100, 100 and 30
        part = p[start : start + 100]
        scores.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert inception_score_in_order(logits, split=100) == pytest.approx(np.mean(scores), rel=1e-12)
    shuffled = logits[torch.randperm(230, generator=torch.Generator().manual_seed(0))]
    assert inception_score_in_order(shuffled, split=100) != pytest.approx(np.mean(scores), rel=1e-6)
    assert inception_score_in_order(shuffled) == pytest.approx(inception_score_in_order(logits), rel=1e-12)


def inside(points: Tensor, centres: Tensor, k: int) -> float:
    """Share of points in any centre's ball, by scikit-learn."""
    neighbours = NearestNeighbors(n_neighbors=k + 1).fit(centres.numpy())
    radii = neighbours.kneighbors(centres.numpy())[0][:, k]
    distances = np.linalg.norm(points.numpy()[:, None] - centres.numpy()[None], axis=2)
    return float((distances <= radii).any(1).mean())


@pytest.mark.parametrize("block", [5000, 64, 33])
@pytest.mark.parametrize("k", [3, 1])
def test_precision_and_recall_agree_with_scikit_learn(block: int, k: int) -> None:
    samples, references = features(7, 150, 6), features(8, 210, 6, 0.7)
    found = precision_recall(samples, references, neighbours=k, block=block)
    assert found == pytest.approx((inside(samples, references, k), inside(references, samples, k)), abs=1e-12)
    assert 0.0 < found[1] < 1.0 and found[0] != found[1]


def test_precision_and_recall_are_one_for_equal_sets_and_zero_for_distant_sets() -> None:
    rows = features(9, 60, 6)
    assert precision_recall(rows, rows) == (1.0, 1.0)
    assert precision_recall(rows, rows + 1e3) == (0.0, 0.0)


def adm_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The distances of ADM's evaluator in numpy, whose float16 sums have float16 steps."""
    u, v = a.astype(np.float16), b.astype(np.float16)
    norms = [np.square(x).astype(np.float32).sum(1).astype(np.float16) for x in (u, v)]
    product = (u.astype(np.float32) @ v.astype(np.float32).T).astype(np.float16)
    return np.maximum(norms[0][:, None] - np.float16(2) * product + norms[1][None], np.float16(0))


def test_precision_and_recall_in_fp16_are_those_of_rounded_distances() -> None:
    """Pool features are positive with squared norms of hundreds, where float16 has steps of 1/4 and more."""
    generator = torch.Generator().manual_seed(0)
    samples, references = torch.randn(2, 400, 64, generator=generator).abs() * 3.0
    a, b = samples.float().numpy(), references.float().numpy()
    radii = [np.sort(adm_distances(x, x), axis=1)[:, 3] for x in (a, b)]
    between = adm_distances(a, b)
    expected = ((between <= radii[1]).any(1).mean(), (radii[0] >= between.T).any(1).mean())
    found = precision_recall(samples, references, fp16=True)
    assert found == pytest.approx(expected, abs=1e-12)
    exact = precision_recall(samples, references)
    assert found != exact and found == pytest.approx(exact, abs=0.05)
    assert precision_recall(samples, references, fp16=True, block=70) == found


def test_distances_that_overflow_fp16_are_not_rounded() -> None:
    samples, references = features(12, 60, 8).abs() * 200.0, features(13, 70, 8).abs() * 200.0
    exact = precision_recall(samples, references)
    assert precision_recall(samples, references, fp16=True) == exact
