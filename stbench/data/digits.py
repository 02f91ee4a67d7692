"""The embedded data set: scikit-learn's 8x8 handwritten digits, encoded by a shipped autoencoder."""

from __future__ import annotations

import hashlib
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stbench.core.device import arithmetic, upload
from stbench.core.registry import DATASETS
from stbench.data.dataset import Preset
from stbench.data.in_memory import InMemory
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
    table = torch.from_numpy(_digits_table())
    small = table[:, :64].reshape(-1, 1, 8, 8) / 16.0
    large = F.interpolate(small, size=(32, 32), mode="bicubic", align_corners=False)
    return (large.clamp(0.0, 1.0) * 255.0).round().to(torch.uint8), table[:, 64].long()


def _digits_table() -> np.ndarray:
    """Return scikit-learn's digits, float64 (1797,65): 64 pixel values, then the label."""
    # The file is read without scikit-learn, whose import takes a second.
    package = find_spec("sklearn")
    for folder in (package and package.submodule_search_locations) or ():
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


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
class Digits(InMemory):
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
        images, labels = digits_images()
        rows, heldout_rows = stratified_split(labels, HELD_OUT)
        self.decoder = asset_manifest()["assets"]["digits_vae"]["sha256"]
        super().__init__(images, labels, rows, heldout_rows)
        latent = asset_manifest()["latent"]
        self._shift, self._scale = (torch.tensor(latent[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
        self.fingerprint = self._hash(images, labels, rows, heldout_rows, self._shift, self._scale)

    @cached_property
    def _vae(self) -> Autoencoder:
        return digits_autoencoder() if self._device.type == "cpu" else digits_autoencoder().to(self._device)

    @cached_property
    def _posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised means and standard deviations of the training images, means of the held-out images.

        Encoded on the CPU when they are first needed: a command that only plans a run does without.
        """
        with arithmetic("fp32", torch.device("cpu")):  # the caller may be in autocast
            mean, std = encode_posterior(digits_autoencoder(), self._images)
        shift, scale = self._shift.cpu(), self._scale.cpu()
        mean, std = (mean - shift) / scale, std / scale
        chosen = mean[self._rows], std[self._rows], mean[self._heldout_rows]
        return chosen[0].to(self._device), chosen[1].to(self._device), chosen[2].to(self._device)

    def latents(self, index: Tensor, posterior_noise: Tensor) -> Tensor:
        """Return normalised posterior samples mean + std * noise (B,4,8,8)."""
        mean, std, _ = self._posterior
        index = index.to(mean.device, non_blocking=True)
        return mean[index] + std[index] * upload(posterior_noise, mean.device)

    def heldout(self) -> tuple[Tensor, Tensor]:
        """Return normalised posterior means (297,4,8,8) and labels (297,)."""
        return self._posterior[2], self._heldout_labels

    def decode(self, z: Tensor) -> Tensor:
        """Decode normalised latents (B,4,8,8) to uint8 images (B,1,32,32)."""
        return to_uint8(self._vae.decode(z.float() * self._scale + self._shift))

    def to(self, device: torch.device | str) -> Digits:
        """Return a copy with latents, labels and decoder on `device`."""
        moved: Digits = super().to(device)
        moved._shift, moved._scale = self._shift.to(device), self._scale.to(device)
        # Now, and not at the first step, whose time is measured.
        mean, std, heldout = self._posterior
        moved._posterior = (mean.to(device), std.to(device), heldout.to(device))
        moved._vae = self._vae.to(device)
        return moved
