"""Images, and networks and data sets to measure them with, all made in no time."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from stbench.data.dataset import Dataset
from stbench.evaluate.feature_networks import FeatureNetwork
from stbench.evaluate.image_sets import open_images
from stbench.evaluate.statistics import ImageStatistics, measure_images


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


def measured(images: np.ndarray, file: Path, *networks: FeatureNetwork, **options: int) -> ImageStatistics:
    """Save images as an npz and measure it."""
    np.savez(file, images)
    return measure_images(open_images(file), networks, **options)


def with_extractor(dataset: Dataset, extractor: str, **changes: object) -> Dataset:
    """A copy of a data set that is measured by another extractor, with other attributes replaced."""
    other = copy.copy(dataset)
    for name, value in {"extractor": extractor, **changes}.items():
        setattr(other, name, value)
    return other
