"""Features of all blocks of a network on fixed images, noise and times, reduced as they are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.device import arithmetic
from stbench.core.objective import Noised, Objective
from stbench.core.rng import generator
from stbench.data.dataset import Dataset

BATCH = 64
"""Images per network call."""


@dataclass(frozen=True)
class ImageSet:
    """Images that every network is shown, with one noise per image."""

    latents: Tensor
    """Normalised posterior means (M,C,h,w)."""
    labels: Tensor
    """True labels (M,)."""
    name: str
    """ "train" or "heldout"; part of the key of the noise."""
    rows: Tensor
    """Positions (M,) in the training set or among the held-out images, on the host."""

    @cached_property
    def noise(self) -> Tensor:
        """Standard normal noise (M,C,h,w). That of an image does not depend on which others are chosen."""
        shape = self.latents.shape[1:]
        stream = f"inspect/{self.name}"
        drawn = [torch.randn(shape, generator=generator(0, stream, row)) for row in self.rows.tolist()]
        return torch.stack(drawn).to(self.latents.device)

    def at(self, objective: Objective, tau: float) -> Noised:
        """All images at one flow-equivalent time."""
        t = objective.t_of_tau(torch.tensor([tau], dtype=torch.float64))
        return objective.at(self.latents, self.noise, t.expand(len(self.latents)))

    def take(self, positions: Tensor | slice) -> ImageSet:
        """Some of the images, by position on the host."""
        return ImageSet(self.latents[positions], self.labels[positions], self.name, self.rows[positions])

    def split(self, count: int) -> list[ImageSet]:
        """The images in parts of at most `count`."""
        return [self.take(slice(start, start + count)) for start in range(0, len(self.rows), count)]


def spread(size: int, count: int) -> Tensor:
    """Return min(size, count) evenly spaced positions in 0..size-1, ascending, on the host."""
    count = min(size, count)
    return torch.arange(count) * size // max(count, 1)


def training_images(dataset: Dataset, count: int) -> ImageSet:
    """At most `count` training images, evenly spaced."""
    rows = spread(dataset.size, count)
    zero = torch.zeros(len(rows), dataset.channels, dataset.input_size, dataset.input_size)
    return ImageSet(dataset.latents(rows, zero).float(), dataset.labels(rows), "train", rows)


def heldout_images(dataset: Dataset, count: int) -> ImageSet:
    """At most `count` held-out images, evenly spaced."""
    latents, labels = dataset.heldout()
    rows = spread(len(labels), count)
    return ImageSet(latents[rows].float(), labels[rows], "heldout", rows)


def unlabelled(info: BackboneInfo, count: int, device: torch.device) -> Tensor:
    """Labels (count,) that say nothing of the images: the null label, or class 0 without one."""
    return torch.full((count,), info.classes if info.null_label else 0, device=device)


@dataclass(frozen=True)
class Reduced:
    """The tokens (M,N,D) of one block, reduced to what the measures need, float64."""

    pooled: Tensor
    """Mean over tokens (M,D)."""
    covariance: Tensor
    """Covariance (D,D) of all M*N tokens."""
    norm: float
    """Mean Euclidean norm of a token."""


class _Sums:
    """Running sums over the tokens of one block."""

    def __init__(self) -> None:
        self.pooled: list[Tensor] = []
        self.total: Tensor | float = 0.0
        self.products: Tensor | float = 0.0
        self.norms = 0.0
        self.count = 0

    def add(self, tokens: Tensor) -> None:
        """Add tokens (b,N,D)."""
        tokens = tokens.double()
        flat = tokens.flatten(0, 1)
        self.pooled.append(tokens.mean(1))
        self.total = self.total + flat.sum(0)
        self.products = self.products + flat.T @ flat
        self.norms += float(flat.norm(dim=1).sum())
        self.count += len(flat)

    def finish(self) -> Reduced:
        assert isinstance(self.total, Tensor)
        mean = self.total / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        return Reduced(torch.cat(self.pooled), covariance, self.norms / self.count)


def reduce_tokens(batches: Sequence[Tensor]) -> Reduced:
    """Reduce tokens given as batches (b,N,D)."""
    sums = _Sums()
    for tokens in batches:
        sums.add(tokens)
    return sums.finish()


@torch.no_grad()
def all_blocks(
    network: Backbone, objective: Objective, images: ImageSet, tau: float, labels: Tensor
) -> list[Reduced]:
    """The features of every block at flow-equivalent time `tau`, with labels (M,), in fp32."""
    blocks = range(network.info.depth)
    sums = [_Sums() for _ in blocks]
    for part, y in zip(images.split(BATCH), torch.split(labels, BATCH), strict=True):
        tokens = block_tokens(network, objective, part, tau, y, blocks)
        for block in blocks:
            sums[block].add(tokens[block])
    return [each.finish() for each in sums]


@torch.no_grad()
def block_tokens(
    network: Backbone,
    objective: Objective,
    images: ImageSet,
    tau: float,
    labels: Tensor,
    blocks: Sequence[int],
) -> dict[int, Tensor]:
    """The tokens (M,N,D) of some blocks, for few images."""
    noised = images.at(objective, tau)
    with arithmetic("fp32", images.latents.device):
        return dict(network.features(noised.x_t, noised.t, labels, indices=tuple(blocks)))


def branches(
    network: Backbone, objective: Objective, images: ImageSet, tau: float, block: int
) -> tuple[Tensor, Tensor]:
    """The tokens (M,N,D) of a block with the true labels and with the null label, float64."""
    null = unlabelled(network.info, len(images.labels), images.latents.device)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    for part in images.split(BATCH):
        for tokens, y in zip(found, (part.labels, null[: len(part.labels)]), strict=True):
            tokens.append(block_tokens(network, objective, part, tau, y, [block])[block].double())
    return torch.cat(found[0]), torch.cat(found[1])
