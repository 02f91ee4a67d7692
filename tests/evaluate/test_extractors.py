"""Feature extractors: the digits classifier, the device they run on, what Inception sees of grey images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from stbench.core.errors import UserError
from stbench.data.dataset import Dataset
from stbench.evaluate.extractors import DigitsExtractor, extract_features, get_extractor
from stbench.evaluate.metrics import compute_metrics
from stbench.models.assets import asset_manifest
from tests.measuring import with_extractor

EXTRACTOR = get_extractor("stbench-digits")


class DeviceRecorder(DigitsExtractor):  # type: ignore[misc]
    """The digits extractor; records the devices it is moved to, and fails for a single image."""

    def __init__(self, name: str, features_list: Sequence[str], **options: object) -> None:
        super().__init__(name, features_list, **options)
        self.devices: list[str] = []

    def to(self, device: Any) -> DeviceRecorder:  # type: ignore[override]
        self.devices.append(str(device))
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if len(images) == 1:
            raise RuntimeError("out of memory")
        return super().forward(images)


if "device-recorder" not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor("device-recorder", DeviceRecorder)


class GreyInception(FeatureExtractorInceptionV3):
    """Inception's type without its weights; returns the mean of every channel."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images.float().mean((2, 3)), images.float().amax((2, 3))


def test_the_classifier_reaches_the_stated_accuracy(digits: Dataset) -> None:
    _, logits = extract_features(EXTRACTOR, digits.heldout_images())
    accuracy = float((logits.argmax(1) == digits.heldout()[1]).double().mean())
    stated = asset_manifest()["assets"]["digits_classifier"]
    assert accuracy == pytest.approx(stated["heldout_accuracy"], abs=0.004)
    assert accuracy > 0.97


def test_features_have_64_dimensions_and_logits_ten() -> None:
    features, logits = extract_features(EXTRACTOR, torch.zeros(3, 1, 32, 32, dtype=torch.uint8), batch=2)
    assert (features.shape, logits.shape, features.dtype) == ((3, 64), (3, 10), torch.float64)


def test_building_an_extractor_leaves_the_global_random_state_unchanged() -> None:
    before = torch.get_rng_state()
    get_extractor.__wrapped__("stbench-digits")
    assert torch.equal(torch.get_rng_state(), before)


def test_an_extractor_returns_to_the_cpu_even_after_an_error(digits: Dataset) -> None:
    recorder: Any = get_extractor.__wrapped__("device-recorder")
    extract_features(recorder, digits.heldout_images()[:4], device="cpu:0")
    assert recorder.devices == ["cpu:0", "cpu"]
    with pytest.raises(RuntimeError, match="out of memory"):
        extract_features(recorder, digits.heldout_images()[:1], device="cpu:0")
    assert recorder.devices[2:] == ["cpu:0", "cpu"]


def test_metrics_extract_samples_and_reference_on_the_given_device(digits: Dataset, tmp_path: Path) -> None:
    recorder: Any = get_extractor("device-recorder")
    images, dataset = digits.heldout_images(), with_extractor(digits, "device-recorder")
    found = compute_metrics(images, dataset, ["fid"], cache_dir=tmp_path, device="cpu:0")
    assert recorder.devices == ["cpu:0", "cpu"] * 2
    assert found == compute_metrics(images, digits, ["fid"], cache_dir=tmp_path)


def test_inception_gets_grey_images_as_three_channels(digits: Dataset) -> None:
    images = digits.heldout_images()[:5]
    inception: FeatureExtractorBase = GreyInception()
    features, _ = extract_features(inception, images)
    assert torch.equal(features, images.float().mean((2, 3)).double().expand(-1, 3))


def test_an_unknown_extractor_is_a_user_error() -> None:
    with pytest.raises(UserError, match="unknown feature extractor 'stbench-digit'; did you mean"):
        get_extractor("stbench-digit")
