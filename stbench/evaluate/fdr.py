"""FDr: Frechet distances in several feature spaces, relative to those of real images (arXiv 2604.28190)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from stbench.data.dataset import Dataset
from stbench.data.spec import FDR6
from stbench.evaluate.extractors import EXTRACTOR_BATCH, extract_features
from stbench.evaluate.metrics import (
    feature_statistics,
    frechet_distance,
    image_statistics,
)


def ratio_name(extractors: Iterable[str]) -> str:
    """Return "fdr6" for exactly the six published extractors, "fdr" for any others."""
    return "fdr6" if set(extractors) == set(FDR6) else "fdr"


def mean_ratio(distances: Sequence[float], real: Sequence[float]) -> float:
    """Return the mean of distances / real; NaN if a distance of real images is zero."""
    ratios = [own / other if other else math.nan for own, other in zip(distances, real, strict=True)]
    return math.fsum(ratios) / len(ratios)


def frechet_ratio(
    images: Tensor,
    dataset: Dataset,
    extractors: Mapping[str, nn.Module],
    *,
    cache_dir: Path,
    device: torch.device | str = "cpu",
    batch: int = EXTRACTOR_BATCH,
) -> dict[str, float]:
    """Compute FDr of uint8 images (N,c,H,W): the mean over extractors of FD(images) / FD(held-out images).

    Both Frechet distances are to the training images. The extractors run on `device` on `batch` images at a
    time; the statistics of the real images are cached in `cache_dir`. Returns the value under `ratio_name`.
    """
    distances: list[float] = []
    real: list[float] = []
    for extractor in extractors.values():
        train, heldout = (
            image_statistics(x, extractor, cache_dir=cache_dir, device=device, batch=batch)
            for x in (dataset.references["train"](), dataset.heldout_images())
        )
        own = feature_statistics(extract_features(extractor, images.cpu(), batch=batch, device=device)[0])
        for found, side in ((distances, own), (real, heldout)):
            found.append(frechet_distance(side["mu"], side["sigma"], train["mu"], train["sigma"]))
    return {ratio_name(extractors): mean_ratio(distances, real)}
