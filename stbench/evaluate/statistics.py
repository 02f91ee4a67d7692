"""Statistics of a set of images: moments of every feature space, kept features and logits, in one pass."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stbench.core.device import arithmetic
from stbench.core.errors import UserError
from stbench.evaluate.adm_formulas import RunningMoments
from stbench.evaluate.feature_networks import FeatureNetwork
from stbench.evaluate.image_sets import ImageSet
from stbench.evaluate.progress import Report, ignore

Moments = tuple[Tensor, Tensor]
"""Mean (D,) and covariance (D,D), float64, on the CPU."""
REFERENCE_FEATURES = 10_000
"""Reference images whose features are kept for precision, recall and KID; ADM's files contain as many."""


@dataclass(frozen=True)
class ImageStatistics:
    """The result of one pass over a set of images."""

    name: str
    digest: str
    """sha256 of size and pixels, in order."""
    count: int
    size: tuple[int, int]
    """(H,W)."""
    moments: Mapping[str, Moments]
    """By feature space."""
    features: Tensor
    """Inception's pool features (M,2048) float32 of the kept images."""
    logits: Tensor
    """Inception's logits (M,1008) float32 of the kept images."""


@torch.no_grad()
def measure_images(
    images: ImageSet,
    networks: Sequence[FeatureNetwork],
    *,
    keep: int | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    report: Report = ignore,
) -> ImageStatistics:
    """Run the networks over all images and collect their statistics.

    The networks must be on `device`; they compute in true float32, not TF32. Features and logits are kept for
    `keep` evenly spaced images, None for all. `report` is called with the number of images measured so far.
    Raises UserError for fewer than two images.
    """
    count = len(images)
    if count < 2:
        raise UserError(
            f"expected at least 2 images in {images.name}, found {count}; published scores use 50000"
        )

    # Accumulators: moments of every space, and rows of the kept images.
    kept = evenly_spaced(count, keep)
    digest = hashlib.sha256(f"{images.size}".encode())
    moments = {space: RunningMoments() for network in networks for space in network.spaces}
    rows: dict[str, list[Tensor]] = {"pool": [], "logits": []}
    start = 0
    with arithmetic("fp32", torch.device(device)):
        for part in images.batches(batch):
            # Every network sees the batch once, and all its features enter the moments.
            digest.update(part.contiguous().numpy().tobytes())
            found: dict[str, Tensor] = {}
            for network in networks:
                found |= network(part.to(device))
            for space, moment in moments.items():
                moment.add(found[space])

            # Features and logits stay for the kept images of this batch only.
            here = kept[(kept >= start) & (kept < start + len(part))] - start
            for space in rows.keys() & found.keys():
                rows[space].append(found[space].cpu()[here])
            start += len(part)
            report(start)
    stacked = {space: torch.cat(parts) if parts else torch.zeros(0, 0) for space, parts in rows.items()}
    return ImageStatistics(
        name=images.name,
        digest=digest.hexdigest(),
        count=count,
        size=images.size,
        moments={space: moment.finish() for space, moment in moments.items()},
        features=stacked["pool"],
        logits=stacked["logits"],
    )


def evenly_spaced(count: int, keep: int | None) -> Tensor:
    """Return `keep` ascending, evenly spaced row numbers of `count`; None keeps all.

    Even spacing keeps every class of a set that is sorted by class.
    """
    if keep is None or keep >= count:
        return torch.arange(count)
    return torch.arange(keep) * count // keep
