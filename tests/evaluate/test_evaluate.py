"""Metrics against independent formulas, the reference cache, generation, held-out loss, grid and protocol."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_statistics_to_metric

from stbench.config.spec import EvalSpec
from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.core.errors import UserError
from stbench.data.dataset import Dataset, get_dataset
from stbench.diffusion import LinearFlow
from stbench.diffusion.sample import Guidance
from stbench.evaluate import extractors
from stbench.evaluate import generate as generation
from stbench.evaluate import metrics as measuring
from stbench.evaluate.extractors import extract_features, get_extractor, tensors_hash
from stbench.evaluate.generate import (
    block_noise,
    draw_labels,
    generate,
    save_grid,
    step_noise,
    validation_loss,
)
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
from stbench.evaluate.points import protocol_of
from stbench.models.assets import asset_manifest

EXTRACTOR = get_extractor("stbench-digits")


class Stand(Backbone):
    """Predicts a fixed linear map of x, y and t; keeps the times it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.info = BackboneInfo("stand", "custom", 1, 1, 16, 2, 4, 8, 10)
        self.times: list[Tensor] = []

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        self.times.append(t)
        return (0.5 * x + 0.1 * y.view(-1, 1, 1, 1) * t.float().view(-1, 1, 1, 1)), {}


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return get_dataset("digits")


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def draw(digits: Dataset, n: int = 60, **changes: object) -> tuple[Tensor, Tensor]:
    options = {
        "labels": "balanced",
        "seed": 0,
        "sampler": "euler",
        "steps": 2,
        "guidance": Guidance(),
    } | changes
    return generate(Stand(), LinearFlow(), digits, n=n, device="cpu", **options)  # type: ignore[arg-type]


def test_classifier_reaches_the_stated_accuracy(digits: Dataset) -> None:
    _, logits = extract_features(EXTRACTOR, digits.heldout_images())
    accuracy = float((logits.argmax(1) == digits.heldout()[1]).double().mean())
    figures = asset_manifest()["assets"]["digits_classifier"]
    assert accuracy == pytest.approx(figures["heldout_accuracy"], abs=0.004)
    assert accuracy > 0.97


def test_features_have_64_dimensions_and_logits_ten() -> None:
    features, logits = extract_features(EXTRACTOR, torch.zeros(3, 1, 32, 32, dtype=torch.uint8), batch=2)
    assert (features.shape, logits.shape, features.dtype) == ((3, 64), (3, 10), torch.float64)


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


def test_fid_of_identical_sets_is_zero_and_never_negative(digits: Dataset, cache_dir: Path) -> None:
    assert 0.0 <= compute_metrics(digits.train_images(), digits, ["fid"], cache_dir=cache_dir)["fid"] < 1e-4


def test_fid_of_shifted_features_is_the_squared_shift() -> None:
    own = feature_statistics(
        torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    )
    assert frechet_distance(own["mu"], own["sigma"], own["mu"] + 2.0, own["sigma"]) == pytest.approx(20.0)


def test_inception_score_of_ten_even_splits(digits: Dataset, cache_dir: Path) -> None:
    images = digits.heldout_images()[:290]
    logits = extract_features(EXTRACTOR, images)[1].numpy()[np.random.RandomState(2020).permutation(290)]
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    scores = [np.exp((s * np.log(s / s.mean(0))).sum(1).mean()) for s in np.split(p, 10)]
    assert compute_metrics(images, digits, ["is"], cache_dir=cache_dir)["is"] == pytest.approx(
        np.mean(scores), rel=1e-6
    )


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
    found = compute_metrics(
        digits.train_images()[:50], digits, ["nn_distance", "nn_distance_heldout"], cache_dir=cache_dir
    )
    assert found["nn_distance"] < 1e-6 < 0.05 < found["nn_distance_heldout"]


def test_accuracy_compares_with_the_labels_asked_for(digits: Dataset, cache_dir: Path) -> None:
    images, labels = digits.heldout_images(), digits.heldout()[1]
    assert (
        compute_metrics(images, digits, ["accuracy"], cache_dir=cache_dir, labels=labels)["accuracy"] > 0.97
    )
    assert (
        compute_metrics(images, digits, ["accuracy"], cache_dir=cache_dir, labels=(labels + 1) % 10)[
            "accuracy"
        ]
        < 0.03
    )
    assert compute_metrics(images, digits, ["accuracy", "is"], cache_dir=cache_dir).keys() == {"is"}


def test_metrics_that_do_not_fit_a_data_set_are_left_out(
    digits: Dataset, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = digits.heldout_images()[:50], digits.heldout()[1][:50]
    monkeypatch.setattr(measuring, "MAX_PIXEL_VALUES", 32 * 32 - 1)
    assert "nn_distance" not in compute_metrics(images, digits, ["fid", "nn_distance"], cache_dir=cache_dir)
    other = copy.copy(digits)
    other.classes = 1000
    assert "accuracy" not in compute_metrics(
        images, other, ["fid", "accuracy"], cache_dir=cache_dir, labels=labels
    )


def test_validation_loss_is_the_same_in_parts(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = validation_loss(Stand(), LinearFlow(), digits, seed=0, device="cpu")
    monkeypatch.setattr(generation, "HELDOUT_BATCH", 100)
    assert validation_loss(Stand(), LinearFlow(), digits, seed=0, device="cpu") == pytest.approx(whole)


def test_every_listed_metric_is_computed_and_finite(digits: Dataset, cache_dir: Path) -> None:
    images, labels = digits.heldout_images()[:120], digits.heldout()[1][:120]
    found = compute_metrics(
        images, digits, (*BASIC_METRICS, *EXTRA_METRICS), cache_dir=cache_dir, labels=labels
    )
    assert list(found) == list(METRICS)
    assert np.isfinite(list(found.values())).all()
    assert (
        compute_metrics(images, digits, (*BASIC_METRICS, *EXTRA_METRICS), cache_dir=cache_dir, labels=labels)
        == found
    )


def test_unknown_names_and_too_few_images_are_user_errors(digits: Dataset, cache_dir: Path) -> None:
    with pytest.raises(UserError, match="unknown metric 'fidd'; did you mean 'fid'"):
        compute_metrics(digits.heldout_images(), digits, ["fidd"], cache_dir=cache_dir)
    with pytest.raises(UserError, match="at least 10 images, found 9"):
        compute_metrics(digits.heldout_images()[:9], digits, ["is"], cache_dir=cache_dir)
    with pytest.raises(UserError, match="unknown feature extractor 'stbench-digit'"):
        get_extractor("stbench-digit")


class Watched(nn.Module):
    """An extractor of three-channel images that keeps where it was sent and what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def to(self, device: Any) -> Self:  # type: ignore[override]
        self.sent.append(str(device))
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        self.shapes.append(tuple(images.shape))
        if len(images) == 1:
            raise RuntimeError("a full device")
        return images.float().mean((2, 3)), images.float().amax((2, 3))


def test_the_extractor_goes_to_the_device_and_comes_back(
    digits: Dataset, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: Any = Watched()
    extract_features(watched, digits.heldout_images()[:4], device="cpu:0")
    assert watched.sent == ["cpu:0", "cpu"]
    with pytest.raises(RuntimeError, match="a full device"):
        extract_features(watched, digits.heldout_images()[:1], device="cpu:0")
    assert watched.sent[2:] == ["cpu:0", "cpu"]
    asked: list[Any] = []

    def recorded(*args: Any, device: Any) -> tuple[Tensor, Tensor]:
        asked.append(device)
        return extract_features(*args, device="cpu")

    monkeypatch.setattr(measuring, "extract_features", recorded)
    images = digits.heldout_images()
    found = compute_metrics(images, digits, ["fid"], cache_dir=cache_dir / "elsewhere", device="cuda:3")
    assert asked == ["cuda:3", "cuda:3"] and found == compute_metrics(
        images, digits, ["fid"], cache_dir=cache_dir
    )


def test_inception_sees_grey_images_as_three_channels(
    digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched: Any = Watched()
    images = digits.heldout_images()[:5]
    extract_features(watched, images)
    monkeypatch.setattr(extractors, "FeatureExtractorInceptionV3", Watched)
    features, _ = extract_features(watched, images)
    assert watched.shapes == [(5, 1, 32, 32), (5, 3, 32, 32)]
    assert torch.equal(features, images.float().mean((2, 3)).double().expand(-1, 3))


def test_cached_reference_is_used(digits: Dataset, tmp_path: Path) -> None:
    reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    found = load_file(path)
    planted = {key: torch.full_like(found[key], 7.0) for key in ("features", "mu", "sigma")}
    save_file(planted, path, {"sha256": tensors_hash(list(planted.values()))})
    assert reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)["mu"].unique().tolist() == [
        7.0
    ]


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_damaged_reference_is_made_anew(damage: str, digits: Dataset, tmp_path: Path) -> None:
    whole = reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-100] if damage == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
    again = reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)
    assert all(torch.equal(again[key], whole[key]) for key in whole)
    assert path.read_bytes() == content


def test_references_are_kept_apart(digits: Dataset, tmp_path: Path) -> None:
    train = reference_statistics(digits, "train", EXTRACTOR, cache_dir=tmp_path)
    every = reference_statistics(digits, "all", EXTRACTOR, cache_dir=tmp_path)
    assert (len(train["features"]), len(every["features"])) == (1500, 1797)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("sampler", ["euler", "euler-maruyama"])
def test_generation_repeats_and_leaves_the_global_random_state_alone(sampler: str, digits: Dataset) -> None:
    before = torch.get_rng_state()
    first, labels = draw(digits, sampler=sampler)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, _ = draw(digits, sampler=sampler)
    assert (first.dtype, first.shape, labels.shape) == (torch.uint8, (60, 1, 32, 32), (60,))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw(digits, sampler=sampler, seed=1)[0])


@pytest.mark.parametrize("sampler", ["euler", "euler-maruyama"])
def test_batch_and_number_do_not_change_an_image(sampler: str, digits: Dataset) -> None:
    images, _ = draw(digits, 110, sampler=sampler)
    parts, _ = draw(digits, 110, sampler=sampler, batch=50)
    fewer, _ = draw(digits, 70, sampler=sampler)
    assert (images.int() - parts.int()).abs().max() <= 1
    assert (images[:70].int() - fewer.int()).abs().max() <= 1


def test_noise_differs_between_images_and_between_steps(digits: Dataset) -> None:
    images, _ = draw(digits, 100)
    assert len(images.flatten(1).unique(dim=0)) == 100
    assert not torch.equal(images, draw(digits, 100, sampler="euler-maruyama")[0])


def test_each_draw_of_a_sampler_and_the_initial_noise_are_independent() -> None:
    noise = step_noise(0, start=50, stop=110, shape=(4, 8, 8))
    draws = torch.stack(
        [noise(0), noise(1), block_noise(0, "evaluation", start=50, stop=110, shape=(4, 8, 8))]
    ).flatten(1)
    assert torch.equal(noise(1), noise(1))
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.05


def test_evaluation_noise_is_what_published_figures_were_drawn_from() -> None:
    """Other noise would be another protocol under the same hash."""
    drawn = (
        block_noise(0, "evaluation", start=0, stop=100, shape=(4, 8, 8)),
        step_noise(0, start=50, stop=100, shape=(4, 8, 8))(3),
    )
    hashes = [hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:16] for noise in drawn]
    assert hashes == ["c137e30fc8caa64a", "6fb927de0fb8b99b"]


def test_building_an_extractor_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    get_extractor.__wrapped__("stbench-digits")
    assert torch.equal(torch.get_rng_state(), before)


def test_guidance_reaches_the_sampler(digits: Dataset) -> None:
    assert not torch.equal(draw(digits)[0], draw(digits, guidance=Guidance(2.0))[0])


def test_balanced_labels_are_even_and_random_ones_seeded() -> None:
    assert draw_labels("balanced", 1000, classes=10, seed=0).bincount().tolist() == [100] * 10
    assert torch.equal(
        draw_labels("random", 50, classes=10, seed=3), draw_labels("random", 50, classes=10, seed=3)
    )
    assert not torch.equal(
        draw_labels("random", 50, classes=10, seed=3), draw_labels("random", 50, classes=10, seed=4)
    )
    with pytest.raises(UserError, match="'balanced' or 'random'"):
        draw_labels("even", 50, classes=10, seed=0)


def test_validation_loss_is_by_bin_of_time_at_fixed_noise(digits: Dataset) -> None:
    before, network = torch.get_rng_state(), Stand()
    found = validation_loss(network, LinearFlow(), digits, seed=0, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == len(network.times) == 10
    assert all(((t >= i / 10) & (t < (i + 1) / 10)).all() for i, t in enumerate(network.times))
    assert not torch.allclose(network.times[1] - network.times[0], torch.tensor(0.1, dtype=torch.float64))
    assert validation_loss(Stand(), LinearFlow(), digits, seed=0, device="cpu") == found
    assert validation_loss(Stand(), LinearFlow(), digits, seed=1, device="cpu") != found


def test_validation_loss_of_a_zero_prediction_is_the_size_of_the_velocity(digits: Dataset) -> None:
    class Zero(Stand):
        def forward_intermediates(
            self, x: Tensor, *args: Tensor, **options: object
        ) -> tuple[Tensor, Features]:  # type: ignore[override]
            return torch.zeros_like(x), {}

    expected = 1.0 + float(digits.heldout()[0].square().mean())
    found = validation_loss(Zero(), LinearFlow(), digits, seed=0, device="cpu")
    assert found == pytest.approx([expected] * 10, rel=0.02)


def test_grid_puts_images_in_rows_and_doubles_their_pixels(tmp_path: Path) -> None:
    images = (torch.arange(12) * 20).to(torch.uint8).view(12, 1, 1, 1).expand(12, 1, 4, 4)
    save_grid(images, tmp_path / "deep" / "grid.png", columns=5)
    picture = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert picture.shape == (2 * (3 * 5 + 1), 2 * (5 * 5 + 1), 3)
    corners = picture[2::10, 2::10, 0][:3, :5].flatten()
    assert corners[:12].tolist() == list(range(0, 240, 20))
    assert (picture[12:20, 12:20] == 120).all() and (picture[10:12] == 96).all()


def test_grid_writes_colour(tmp_path: Path) -> None:
    image = torch.tensor([10, 20, 30]).to(torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    save_grid(image, tmp_path / "grid.png", columns=1)
    assert np.asarray(Image.open(tmp_path / "grid.png"))[3, 3].tolist() == [10, 20, 30]


def test_every_field_of_a_protocol_moves_its_hash(digits: Dataset) -> None:
    protocol = protocol_of(digits, EvalSpec(points=[1], samples=1000, sampler="euler", steps=20))
    assert len(protocol.hash) == 8 and protocol.hash == replace(protocol).hash
    changed = [
        replace(protocol, **{f.name: 7 if f.type == "int" else "other"}).hash  # type: ignore[arg-type]
        for f in fields(protocol)
    ]
    assert len({protocol.hash, *changed}) == len(changed) + 1
    assert set(protocol.fields()) == {
        "reference",
        "extractor",
        "samples",
        "labels",
        "seed",
        "sampler",
        "steps",
        "channels",
        "decoder",
        "rounding",
        "weights",
    }
