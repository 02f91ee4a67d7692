"""The metrics of a run's evaluation against independent formulas, and the cache of reference statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torch import nn
from torch_fidelity.metric_fid import fid_statistics_to_metric

from stbench.core.errors import UserError
from stbench.data.dataset import Dataset
from stbench.evaluate.extractors import extract_features, get_extractor, tensors_hash
from stbench.evaluate.metrics import (
    BASIC_METRICS,
    EXTRA_METRICS,
    METRICS,
    compute_metrics,
    feature_statistics,
    frechet_distance,
    kernel_distance,
    nearest_distance,
    reference_statistics,
)
from tests.datafiles import EXTRACTOR as COLOUR_EXTRACTOR
from tests.measuring import with_extractor

EXTRACTOR = get_extractor("stbench-digits")
ALL = (*BASIC_METRICS, *EXTRA_METRICS)
OF_HELDOUT_DIGITS = {
    "fid": 1.2304417056250259,
    "fid_all": 0.8675254740358014,
    "is": 6.117670722874227,
    "accuracy": 1.0,
    "kid": -0.21121768951416015,
    "mind": 4.765022839720383,
    "precision": 0.7845118045806885,
    "recall": 0.918666660785675,
    "nn_distance": 0.1165186568157548,
    "nn_distance_heldout": 0.1165186568157548,
}
"""Every metric of the held-out digits, as recorded runs were evaluated."""


def test_fid_agrees_with_a_matrix_root_and_with_torch_fidelity(digits: Dataset, cache_dir: Path) -> None:
    images = digits.heldout_images()
    features = extract_features(EXTRACTOR, images)[0]
    other = extract_features(EXTRACTOR, digits.train_images())[0]
    a, b = features.numpy(), other.numpy()
    sa, sb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = sqrtm(sa @ sb).real
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(sa + sb - 2 * root)
    found = compute_metrics(images, digits, ["fid", "fid_all"], cache_dir=cache_dir)
    assert found["fid"] == pytest.approx(expected, rel=1e-5)
    assert found["fid_all"] < found["fid"]
    ours, theirs = ({"mu": x.mean(0), "sigma": np.cov(x, rowvar=False)} for x in (a, b))
    assert found["fid"] == pytest.approx(
        fid_statistics_to_metric(ours, theirs, False)["frechet_inception_distance"], rel=1e-5
    )


def test_fid_of_identical_sets_is_zero_and_not_negative(digits: Dataset, cache_dir: Path) -> None:
    assert 0.0 <= compute_metrics(digits.train_images(), digits, ["fid"], cache_dir=cache_dir)["fid"] < 1e-4


def test_fid_of_shifted_features_is_the_squared_shift() -> None:
    features = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = feature_statistics(features)
    assert frechet_distance(own["mu"], own["sigma"], own["mu"] + 2.0, own["sigma"]) == pytest.approx(20.0)


def test_inception_score_of_ten_even_splits(digits: Dataset, cache_dir: Path) -> None:
    images = digits.heldout_images()[:290]
    logits = extract_features(EXTRACTOR, images)[1].numpy()[np.random.RandomState(2020).permutation(290)]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = [np.exp((s * np.log(s / s.mean(0))).sum(1).mean()) for s in np.split(p, 10)]
    found = compute_metrics(images, digits, ["is"], cache_dir=cache_dir)
    assert found["is"] == pytest.approx(np.mean(scores), rel=1e-6)


def test_kid_of_whole_sets_is_the_unbiased_mmd() -> None:
    draws = torch.Generator().manual_seed(0)
    x, y = (torch.randn(40, 6, generator=draws, dtype=torch.float64) + shift for shift in (0.0, 0.3))
    kxx, kyy, kxy = ((a @ b.T / 6 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    off = (kxx.sum() - kxx.trace() + kyy.sum() - kyy.trace()) / (40 * 39)
    assert kernel_distance(x, y) == pytest.approx(float(off - 2 * kxy.mean()), rel=1e-4)


def test_precision_and_recall_by_brute_force(digits: Dataset, cache_dir: Path) -> None:
    images = digits.heldout_images()[:100]
    a, b = (extract_features(EXTRACTOR, x)[0].numpy() for x in (images, digits.train_images()))

    def share_inside(points: np.ndarray, centres: np.ndarray) -> float:
        radius = np.sort(cdist(centres, centres), axis=1)[:, 3]
        return float((cdist(points, centres) <= radius).any(1).mean())

    found = compute_metrics(images, digits, ["precision", "recall"], cache_dir=cache_dir)
    assert found["recall"] == pytest.approx(share_inside(b, a), abs=2e-3)
    assert found["precision"] == pytest.approx(share_inside(a, b), abs=1e-2)
    assert found["recall"] != found["precision"]


def test_nearest_distance_is_the_rms_over_pixels() -> None:
    references = torch.tensor([0, 255]).to(torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    images = torch.tensor([51, 255]).to(torch.uint8).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    assert nearest_distance(images, references) == pytest.approx(0.1, abs=1e-6)


def test_copied_training_images_show_as_memorised(digits: Dataset, cache_dir: Path) -> None:
    names = ["nn_distance", "nn_distance_heldout"]
    found = compute_metrics(digits.train_images()[:50], digits, names, cache_dir=cache_dir)
    assert found["nn_distance"] < 1e-6 < 0.05 < found["nn_distance_heldout"]


def test_accuracy_compares_predictions_with_the_labels(digits: Dataset, cache_dir: Path) -> None:
    images, labels = digits.heldout_images(), digits.heldout()[1]
    right = compute_metrics(images, digits, ["accuracy"], cache_dir=cache_dir, labels=labels)
    wrong = compute_metrics(images, digits, ["accuracy"], cache_dir=cache_dir, labels=(labels + 1) % 10)
    assert wrong["accuracy"] < 0.03 < 0.97 < right["accuracy"]
    assert compute_metrics(images, digits, ["accuracy", "is"], cache_dir=cache_dir).keys() == {"is"}


def test_metrics_that_do_not_fit_a_data_set_are_left_out(digits: Dataset, tmp_path: Path) -> None:
    """Pixel distances of images larger than 64x64, and accuracy where the extractor has other classes."""
    small, labels = digits.heldout_images()[:50], digits.heldout()[1][:50]
    large = nn.functional.interpolate(small, size=65).expand(-1, 3, -1, -1)
    dataset = with_extractor(digits, COLOUR_EXTRACTOR, references={"train": lambda: large}, classes=1000)
    names = ["is", "nn_distance", "nn_distance_heldout", "accuracy"]
    assert compute_metrics(large, dataset, names, cache_dir=tmp_path, labels=labels).keys() == {"is"}
    assert compute_metrics(small, digits, names, cache_dir=tmp_path, labels=labels).keys() == set(names)


def test_every_listed_metric_is_computed_and_finite(digits: Dataset, cache_dir: Path) -> None:
    images, labels = digits.heldout_images()[:120], digits.heldout()[1][:120]
    found = compute_metrics(images, digits, ALL, cache_dir=cache_dir, labels=labels)
    assert list(found) == list(METRICS)
    assert np.isfinite(list(found.values())).all()
    assert compute_metrics(images, digits, ALL, cache_dir=cache_dir, labels=labels) == found


def test_metrics_of_the_heldout_digits_do_not_change(digits: Dataset, cache_dir: Path) -> None:
    """Another value would be another metric under the name in recorded runs.

    Features are in float32 and round differently on other processors: FID by 1.8e-7 from AMD to Intel.
    """
    images, labels = digits.heldout_images(), digits.heldout()[1]
    found = compute_metrics(images, digits, ALL, cache_dir=cache_dir, labels=labels)
    assert found.pop("kid") == pytest.approx(OF_HELDOUT_DIGITS["kid"], rel=1e-3)
    assert found == pytest.approx({k: v for k, v in OF_HELDOUT_DIGITS.items() if k != "kid"}, rel=1e-6)


def test_unknown_names_and_too_few_images_are_user_errors(digits: Dataset, cache_dir: Path) -> None:
    with pytest.raises(UserError, match="unknown metric 'fidd'; did you mean 'fid'"):
        compute_metrics(digits.heldout_images(), digits, ["fidd"], cache_dir=cache_dir)
    with pytest.raises(UserError, match="at least 10 images, found 9"):
        compute_metrics(digits.heldout_images()[:9], digits, ["is"], cache_dir=cache_dir)


def test_cached_reference_statistics_are_used(digits: Dataset, tmp_path: Path) -> None:
    reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    found = load_file(path)
    planted = {key: torch.full_like(found[key], 7.0) for key in ("features", "mu", "sigma")}
    save_file(planted, path, {"sha256": tensors_hash(list(planted.values()))})
    again = reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)
    assert again["mu"].unique().tolist() == [7.0]


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_reference_statistics_are_recomputed(damage: str, digits: Dataset, tmp_path: Path) -> None:
    whole = reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-100] if damage == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
    again = reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert path.read_bytes() == content


def test_reference_sets_are_cached_separately(digits: Dataset, tmp_path: Path) -> None:
    train = reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)
    every = reference_statistics(digits, "all", EXTRACTOR, cache_dir=tmp_path)
    assert (len(train["features"]), len(every["features"])) == (1500, 1797)
    assert len(list(tmp_path.iterdir())) == 2
