"""Networks that measure images: random weights under the published names, and stand-ins that cost nothing."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from stbench.evaluate.feature_networks import FeatureNetwork
from stbench.evaluate.image_sets import open_images
from stbench.evaluate.statistics import ImageStatistics, measure_images


class Unloaded(FeatureExtractorInceptionV3):
    """torch-fidelity's graph, which loads nothing."""

    def load_state_dict(self, state: Mapping[str, object], **options: object) -> None:  # type: ignore[override]
        """Leave the weights as they are."""


def random_inception(file: Path) -> tuple[Path, str]:
    """Write Inception weights that keep the features alive; returns the file and its sha256."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Unloaded("random", ["2048"], feature_extractor_weights_path=empty)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.normal_(net.fc.weight, std=0.05)
        nn.init.normal_(net.fc.bias)
    torch.save(net.state_dict(), file)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


def random_dino(file: Path) -> Path:
    """Write the weights of timm's smallest DINOv2, randomly initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
    save_file(net.state_dict(), file)
    return file


class CheapNetwork(FeatureNetwork):
    """Features that cost nothing: "pool" are 48 fixed projections, "spatial" the first 40 of them."""

    spaces: ClassVar[Mapping[str, int | None]] = {"pool": 48, "spatial": 40}

    def __init__(self, label: str = "cheap 0") -> None:
        super().__init__()
        self.label = label

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        draws = torch.Generator().manual_seed(0)
        flat = images.flatten(1).double() / 255.0
        pool = torch.tanh(flat @ torch.randn(flat.shape[1], 48, generator=draws, dtype=torch.float64) / 20)
        return {"pool": pool.float(), "spatial": pool[:, :40].float(), "logits": pool[:, :9].float() * 4}


def pictures(seed: int, count: int, size: int = 24) -> np.ndarray:
    """Smooth noise, uint8 (count,size,size,3), brighter with the seed."""
    draws = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 4, 4, generator=draws) * 200 + 10 * seed
    large = nn.functional.interpolate(small, size=(size, size), mode="bilinear")
    return large.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def measured(images: np.ndarray, file: Path, network: FeatureNetwork, **options: int) -> ImageStatistics:
    """Save images as an npz and measure it."""
    np.savez(file, images)
    return measure_images(open_images(file), [network], **options)
