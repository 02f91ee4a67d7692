"""Data sets: latents by row, held-out images, reference sets, and what a data set decides by default."""

from __future__ import annotations

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from stbench.latents import Autoencoder, asset_manifest, digits_autoencoder, to_float, to_uint8
from stbench.registry import DATASETS, lookup
from stbench.rng import generator

HELD_OUT = 297
"""Digits that no network was trained on."""


@dataclass(frozen=True)
class Preset:
    """Everything the data set decides when the user leaves it out."""

    size: str
    """Backbone size."""
    batch: int
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    adam_eps: float
    warmup: int
    """Steps of linear warm-up to `lr`, which then stays constant."""
    clip: float | None
    """Gradient norm; None for no clipping."""
    ema_decay: float
    ema_warmup: bool
    """Whether the decay after n updates is min(ema_decay, (1+n)/(10+n))."""
    label_drop: float
    steps: int
    eval_points: tuple[int, ...]
    """Steps of the last stage at which it is evaluated."""
    eval_samples: int
    eval_labels: str
    """ "balanced" or "random"."""
    eval_steps: int
    """Sampler steps."""
    eval_guidance: tuple[float, ...]
    """Guidance scales; the first at every point, the others as `extras_last_only` says."""
    extras_last_only: bool
    """Whether the guidance grid, KID, precision and recall wait for the last point."""


DIGITS_PRESET = Preset(
    size="ti/2",
    batch=64,
    lr=2e-3,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    adam_eps=1e-8,
    warmup=50,
    clip=1.0,
    ema_decay=0.995,
    ema_warmup=True,
    label_drop=0.1,
    steps=800,
    eval_points=(200, 400, 800),
    eval_samples=1000,
    eval_labels="balanced",
    eval_steps=20,
    eval_guidance=(1.0, 1.5),
    extras_last_only=True,
)


class Dataset(ABC):
    """Normalised latents (C,h,w) and labels in 0..K-1 by row, and the way back to uint8 images (c,H,W)."""

    name: str
    channels: int
    """Latent channels C."""
    input_size: int
    """Latent height = width."""
    classes: int
    """K."""
    size: int
    """Training images."""
    image_shape: tuple[int, int, int]
    """(c,H,W)."""
    preset: Preset
    extractor: str
    """The torch-fidelity feature extractor that measures its images, by registered name."""
    decoder: str
    """Hash of the decoder's weights."""
    fingerprint: str
    """Hash of images, labels, split, autoencoder and normalisation."""
    references: Mapping[str, Callable[[], Tensor]]
    """Reference sets, uint8 (N,c,H,W); "train" is the main one, FID is also measured against every other."""

    @abstractmethod
    def latents(self, index: Tensor, posterior_noise: Tensor) -> Tensor:
        """Normalised posterior samples (B,C,h,w) of rows `index` (B,), on the data set's device."""

    @abstractmethod
    def labels(self, index: Tensor) -> Tensor:
        """Labels (B,) int64 of rows `index`, on the data set's device."""

    @abstractmethod
    def images(self, index: Tensor) -> Tensor:
        """Clean images, uint8 (B,c,H,W), of rows `index` (B,), on the data set's device: for encoders.

        Raises UserError if the data set holds no images.
        """

    @abstractmethod
    def heldout(self) -> tuple[Tensor, Tensor]:
        """Normalised posterior means (M,C,h,w) and labels (M,) of images that are never trained on."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents (B,C,h,w) to uint8 images (B,c,H,W), on the device of z."""

    @abstractmethod
    def train_images(self) -> Tensor:
        """The training images, uint8 (N,c,H,W), on the host."""

    @abstractmethod
    def heldout_images(self) -> Tensor:
        """The held-out images, uint8 (M,c,H,W), on the host."""

    @abstractmethod
    def order(self, seed: int, images_seen: int, count: int) -> Tensor:
        """Rows (count,) int64 on the host of the global batch that starts after `images_seen` images."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Dataset:
        """A copy whose latents and labels lie on `device`."""


def digits_images() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits as uint8 (1797,1,32,32), with labels (1797,) int64.

    8x8 values 0..16, divided by 16, enlarged by torch's bicubic (a=-0.75, align_corners off, not
    antialiased), clamped to [0,1], times 255, rounded half to even. In float64 every step before the rounding
    is exact, so the bytes are the same on every machine.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images)[:, None].double() / 16.0
    large = F.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False)
    return (large.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8), torch.from_numpy(bunch.target).long()


def stratified_split(labels: Tensor, heldout: int) -> tuple[Tensor, Tensor]:
    """Fixed row numbers (train, held out), ascending, each class held out in proportion to within one image.

    Rows are ordered inside their class by a hash of the row number, which no library version can change; held
    out are the `heldout` rows of smallest relative rank.
    """
    order = sorted(range(len(labels)), key=lambda row: hashlib.sha256(f"digits/{row}".encode()).digest())
    counts = torch.bincount(labels).tolist()
    seen = [0] * len(counts)
    ranks = []
    for row in order:
        label = int(labels[row])
        ranks.append(((seen[label] + 0.5) / counts[label], row))
        seen[label] += 1
    rows = [row for _, row in sorted(ranks)]
    return torch.tensor(sorted(rows[heldout:])), torch.tensor(sorted(rows[:heldout]))


def encode_moments(vae: Autoencoder, images: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Posterior mean and std, each (N,C,h,w), of uint8 images (N,c,H,W), in batches of a fixed size."""
    means, stds = zip(*(vae.encode(to_float(part)) for part in torch.split(images, batch)), strict=True)
    return torch.cat(means), torch.cat(stds)


@final
@DATASETS.register_module(name="digits")
class Digits(Dataset):
    """scikit-learn's handwritten digits, 1x32x32 to 4x8x8 latents; 1,500 to train, 297 held out.

    Latents are normalised per channel over the posterior samples of the training images. Batches are drawn
    with replacement.
    """

    name = "digits"
    channels = 4
    input_size = 8
    classes = 10
    size = 1500
    image_shape = (1, 32, 32)
    preset = DIGITS_PRESET
    extractor = "stbench-digits"

    def __init__(self) -> None:
        self._images, self._all_labels = digits_images()
        self._rows, self._heldout_rows = stratified_split(self._all_labels, HELD_OUT)
        self._vae = digits_autoencoder()
        latent = asset_manifest()["latent"]
        self._shift, self._scale = (torch.tensor(latent[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        mean, std = encode_moments(self._vae, self._images)
        mean, std = (mean - self._shift) / self._scale, std / self._scale
        self._mean, self._std, self._labels = mean[self._rows], std[self._rows], self._all_labels[self._rows]
        self._heldout_mean, self._heldout_labels = (
            mean[self._heldout_rows],
            self._all_labels[self._heldout_rows],
        )
        self.decoder = self._vae.fingerprint
        self.fingerprint = self._hash()
        self.references = {"train": self.train_images, "all": lambda: self._images}

    def _hash(self) -> str:
        parts = (self._images, self._all_labels, self._rows, self._heldout_rows, self._shift, self._scale)
        content = b"".join(part.numpy().tobytes() for part in parts) + self.decoder.encode()
        return hashlib.sha256(content).hexdigest()

    def latents(self, index: Tensor, posterior_noise: Tensor) -> Tensor:
        """Normalised posterior samples mean + std * noise (B,4,8,8)."""
        index = index.to(self._mean.device, non_blocking=True)
        noise = posterior_noise.to(self._mean.device, non_blocking=True)
        return self._mean[index] + self._std[index] * noise

    def labels(self, index: Tensor) -> Tensor:
        """Labels (B,)."""
        return self._labels[index.to(self._labels.device, non_blocking=True)]

    def images(self, index: Tensor) -> Tensor:
        """uint8 (B,1,32,32)."""
        return self._images[self._rows[index]].to(self._mean.device, non_blocking=True)

    def heldout(self) -> tuple[Tensor, Tensor]:
        """Normalised posterior means (297,4,8,8) and labels (297,)."""
        return self._heldout_mean, self._heldout_labels

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents (B,4,8,8) to uint8 images (B,1,32,32)."""
        return to_uint8(self._vae.decode(z.float() * self._scale + self._shift))

    def train_images(self) -> Tensor:
        """uint8 (1500,1,32,32)."""
        return self._images[self._rows]

    def heldout_images(self) -> Tensor:
        """uint8 (297,1,32,32)."""
        return self._images[self._heldout_rows]

    def order(self, seed: int, images_seen: int, count: int) -> Tensor:
        """Rows drawn with replacement; any point of a run is reached without drawing what came before."""
        return torch.randint(self.size, (count,), generator=generator(seed, "data", images_seen))

    def to(self, device: torch.device | str) -> Digits:
        """A copy whose latents, labels and decoder lie on `device`."""
        moved = copy.copy(self)
        moved._vae = self._vae.to(device)
        for name in ("_shift", "_scale", "_mean", "_std", "_labels", "_heldout_mean", "_heldout_labels"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved


@cache
def get_dataset(name: str) -> Dataset:
    """The data set registered under `name`, on the host, built once. Raises UserError for an unknown name."""
    return lookup(DATASETS, name)()
