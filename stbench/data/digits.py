"""The embedded data set: scikit-learn's 8x8 handwritten digits, encoded by a shipped autoencoder."""

from __future__ import annotations

import copy
import hashlib
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from stbench.core.registry import DATASETS
from stbench.core.rng import generator
from stbench.data.dataset import Dataset, Preset
from stbench.models.assets import asset_manifest
from stbench.models.autoencoder import Autoencoder, digits_autoencoder, to_float, to_uint8

HELD_OUT = 297
"""Number of digits that no network was trained on."""

DIGITS_PRESET = Preset(
    size="ti/2",
    batch=64,
    lr=2e-3,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    adam_eps=1e-8,
    warmup=50,
    warmup_share=None,
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
)


def digits_images() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's 1,797 digits as uint8 (1797,1,32,32), and their labels (1797,) int64.

    The 8x8 values 0..16 are divided by 16, enlarged with torch's bicubic interpolation (a=-0.75, no
    align_corners, no antialiasing), clamped to [0,1], multiplied by 255 and rounded half to even. In float64
    every step before the rounding is exact, so the bytes are the same on every machine.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    small = torch.from_numpy(bunch.images)[:, None].double() / 16.0
    large = F.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False)
    return (large.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8), torch.from_numpy(bunch.target).long()


def stratified_split(labels: Tensor, heldout: int) -> tuple[Tensor, Tensor]:
    """Return fixed row numbers (training, held out), ascending, with every class held out in proportion.

    Rows are ordered within their class by a hash of the row number, which does not depend on the version of
    any library. The `heldout` rows of the smallest relative rank are held out.
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


def encode_posterior(vae: Autoencoder, images: Tensor, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Encode uint8 images (N,c,H,W) to posterior means and standard deviations, (N,C,h,w) each."""
    means, stds = zip(*(vae.encode(to_float(part)) for part in torch.split(images, batch)), strict=True)
    return torch.cat(means), torch.cat(stds)


@final
@DATASETS.register_module(name="digits")
class Digits(Dataset):
    """scikit-learn's handwritten digits: 1x32x32 images, 4x8x8 latents, 1,500 to train on, 297 held out.

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
        # Images, labels and split.
        self._images, self._all_labels = digits_images()
        self._rows, self._heldout_rows = stratified_split(self._all_labels, HELD_OUT)
        # Normalised posterior of every image.
        self._vae = digits_autoencoder()
        latent = asset_manifest()["latent"]
        self._shift, self._scale = (torch.tensor(latent[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        mean, std = encode_posterior(self._vae, self._images)
        mean, std = (mean - self._shift) / self._scale, std / self._scale
        self._mean, self._std = mean[self._rows], std[self._rows]
        self._labels = self._all_labels[self._rows]
        self._heldout_mean = mean[self._heldout_rows]
        self._heldout_labels = self._all_labels[self._heldout_rows]
        # Identity, and what the evaluation compares with.
        self.decoder = self._vae.fingerprint
        self.fingerprint = self._hash()
        self.references = {"train": self.train_images, "all": lambda: self._images}

    def _hash(self) -> str:
        parts = (self._images, self._all_labels, self._rows, self._heldout_rows, self._shift, self._scale)
        content = b"".join(part.numpy().tobytes() for part in parts) + self.decoder.encode()
        return hashlib.sha256(content).hexdigest()

    def latents(self, index: Tensor, posterior_noise: Tensor) -> Tensor:
        """Return normalised posterior samples mean + std * noise (B,4,8,8)."""
        index = index.to(self._mean.device, non_blocking=True)
        noise = posterior_noise.to(self._mean.device, non_blocking=True)
        return self._mean[index] + self._std[index] * noise

    def labels(self, index: Tensor) -> Tensor:
        """Return labels (B,)."""
        return self._labels[index.to(self._labels.device, non_blocking=True)]

    def images(self, index: Tensor) -> Tensor:
        """Return images, uint8 (B,1,32,32)."""
        return self._images[self._rows[index]].to(self._mean.device, non_blocking=True)

    def heldout(self) -> tuple[Tensor, Tensor]:
        """Return normalised posterior means (297,4,8,8) and labels (297,)."""
        return self._heldout_mean, self._heldout_labels

    def decode(self, z: Tensor) -> Tensor:
        """Decode normalised latents (B,4,8,8) to uint8 images (B,1,32,32)."""
        return to_uint8(self._vae.decode(z.float() * self._scale + self._shift))

    def train_images(self) -> Tensor:
        """Return the training images, uint8 (1500,1,32,32)."""
        return self._images[self._rows]

    def heldout_images(self) -> Tensor:
        """Return the held-out images, uint8 (297,1,32,32)."""
        return self._images[self._heldout_rows]

    def order(self, seed: int, images_seen: int, count: int) -> Tensor:
        """Return rows drawn with replacement. They do not depend on which rows were drawn before."""
        return torch.randint(self.size, (count,), generator=generator(seed, "data", images_seen))

    def to(self, device: torch.device | str) -> Digits:
        """Return a copy with latents, labels and decoder on `device`."""
        moved = copy.copy(self)
        moved._vae = self._vae.to(device)
        for name in ("_shift", "_scale", "_mean", "_std", "_labels", "_heldout_mean", "_heldout_labels"):
            setattr(moved, name, getattr(self, name).to(device))
        return moved
