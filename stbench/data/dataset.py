"""Data sets: latents by row, held-out images, reference sets, and what a data set decides by default."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.registry import DATASETS, lookup
from stbench.data.spec import DataSpec
from stbench.models.autoencoder import Autoencoder, to_float


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
    """Guidance scales; the first at every evaluation point, the others where `eval.extras` says."""


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
    from_path: ClassVar[bool] = False
    """Whether it is built from a `DataSpec`, that is from --data PATH."""
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Backbone, or backbone-size -> the fields of `preset` that it was published with on this data."""

    @classmethod
    def preset_for(cls, family: str, size: str | None = None) -> Preset:
        """The preset with the published settings of a backbone family, and then of its size, put over it."""
        changes = {**cls.published.get(family, {}), **cls.published.get(f"{family}-{size}", {})}
        return replace(cls.preset, **changes)

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


def get_dataset(name: str, data: DataSpec | None = None) -> Dataset:
    """The data set registered under `name`, on the host, built once.

    Raises UserError for an unknown name, for one that wants or refuses a path, and for a path that no longer
    holds what the run of `data.fingerprint` began with.
    """
    cls = lookup(DATASETS, name)
    if cls.from_path and data is None:
        raise UserError(
            f"data set '{name}' wants --data PATH: a folder made by `stbench data prepare`, "
            f"REPA's layout, or a folder of images"
        )
    if data is not None and not cls.from_path:
        raise UserError(f"data set '{name}' takes no --data; leave it out, or use --dataset custom")
    if data is None:
        return _built(name, None)
    found = _built(name, data.model_copy(update={"fingerprint": ""}))
    if data.fingerprint not in ("", found.fingerprint):
        raise UserError(
            f"{data.path} does not hold the data this run began with: expected fingerprint "
            f"{data.fingerprint[:12]}, found {found.fingerprint[:12]}; put the old data back"
        )
    return found


@cache
def _built(name: str, data: DataSpec | None) -> Dataset:
    cls = lookup(DATASETS, name)
    return cls() if data is None else cls(data)
