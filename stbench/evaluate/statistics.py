"""One pass of the measuring networks over a set of images: moments of every feature space, and kept rows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stbench.core.device import arithmetic
from stbench.core.errors import UserError
from stbench.evaluate.adm_formulas import Moments
from stbench.evaluate.feature_networks import Network
from stbench.evaluate.image_sets import ImageSet

Fit = tuple[Tensor, Tensor]
"""Mean (D,) and covariance (D,D), float64, on the host."""
ROWS = 10_000
"""Images of a reference whose rows are kept for precision, recall and KID (as many as ADM's files hold)."""


@dataclass(frozen=True)
class Survey:
    """What is known of a set of images after one pass."""

    name: str
    digest: str
    """sha256 of size and pixels, in order."""
    count: int
    size: tuple[int, int]
    """(H,W)."""
    fits: Mapping[str, Fit]
    """By feature space."""
    rows: Tensor
    """Inception's pool features (M,2048) float32 of the kept images."""
    logits: Tensor
    """Inception's logits (M,1008) float32 of the kept images."""


@torch.no_grad()
def survey(
    images: ImageSet,
    networks: Sequence[Network],
    *,
    keep: int | None = None,
    batch: int = 64,
    device: torch.device | str = "cpu",
    report: Callable[[int], None] = lambda done: None,
) -> Survey:
    """Run the networks, which lie on `device`, over all images; `keep` evenly spaced rows stay, None all.

    Convolutions and products run in true float32, not TF32. Raises UserError for fewer than two images.
    """
    count = len(images)
    if count < 2:
        raise UserError(f"{images.name} holds {count} image(s); statistics want at least 2, and rather 50000")
    kept = evenly_spaced(count, keep)
    digest = hashlib.sha256(f"{images.size}".encode())
    moments = {space: Moments() for network in networks for space in network.spaces}
    rows: dict[str, list[Tensor]] = {"pool": [], "logits": []}
    start = 0
    with arithmetic("fp32", torch.device(device)):
        for part in images.batches(batch):
            digest.update(part.contiguous().numpy().tobytes())
            found: dict[str, Tensor] = {}
            for network in networks:
                found |= network(part.to(device))
            for space, moment in moments.items():
                moment.add(found[space])
            here = kept[(kept >= start) & (kept < start + len(part))] - start
            for space in rows.keys() & found.keys():
                rows[space].append(found[space].cpu()[here])
            start += len(part)
            report(start)
    held = {space: torch.cat(parts) if parts else torch.zeros(0, 0) for space, parts in rows.items()}
    return Survey(
        name=images.name,
        digest=digest.hexdigest(),
        count=count,
        size=images.size,
        fits={space: moment.finish() for space, moment in moments.items()},
        rows=held["pool"],
        logits=held["logits"],
    )


def evenly_spaced(count: int, keep: int | None) -> Tensor:
    """`keep` row numbers of `count`, ascending and evenly spaced, so that sets sorted by class keep all."""
    if keep is None or keep >= count:
        return torch.arange(count)
    return torch.arange(keep) * count // keep
