"""Cropped images to what is stored of them: posterior moments by an autoencoder, or the pixels themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import numpy as np
import torch

from stbench.errors import UserError
from stbench.latent_store import Kind
from stbench.latents import Autoencoder, to_float
from stbench.precision import arithmetic
from stbench.vae import VAE, find_vae

PIXELS = "none"
"""The name that asks for no autoencoder: training on pixels."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Encoder(ABC):
    """uint8 images (n,c,S,S) to stored rows (n,V,...), and the facts that a manifest wants."""

    kind: Kind
    shape: tuple[int, ...]
    """Of one view."""
    views: int
    image_shape: tuple[int, int, int]
    vae: str = ""
    vae_sha256: str = ""
    scale: float = 1.0
    shift: float = 0.0

    @abstractmethod
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Rows (n,V,*shape) of the kind's type; n at least 1."""


@final
class Moments(Encoder):
    """Mean and standard deviation (n,V,2C,h,w) of a posterior, unscaled, as fp16; V=2 with the mirror image.

    The network runs in `precision`, the moments are taken in fp32.
    """

    kind: Kind = "moments"

    def __init__(self, vae: VAE, size: int, flip: bool, precision: str, device: torch.device) -> None:
        if size < vae.factor or size % vae.factor:
            raise UserError(
                f"--size wants a multiple of {vae.factor} for this autoencoder, got {size}; "
                f"for example --size {max(1, round(size / vae.factor)) * vae.factor}"
            )
        latent = size // vae.factor
        self.shape = (2 * vae.latent_channels, latent, latent)
        self.views, self.image_shape = 1 + flip, (vae.channels, size, size)
        self.vae, self.vae_sha256, self.scale, self.shift = vae.name, vae.sha256, vae.scale, vae.shift
        self._source, self._device, self._dtype = vae, device, PRECISIONS[precision]
        self._network: Autoencoder | None = None

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Encoder.__call__`. Raises UserError for moments that fp16 cannot hold."""
        if self._network is None:  # loaded late: a finished set needs no network
            self._network = self._source.load(self._dtype).to(self._device)
        x = to_float(torch.from_numpy(images).to(self._device)).to(self._dtype)
        views = [x, x.flip(-1)][: self.views]
        try:
            with arithmetic("fp32", self._device):  # not TF32, which is no matter to bf16 weights
                stored = [_mean_and_std(self._network.moments(view)) for view in views]
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU has no room to encode {len(images)} images at a time; "
                f"try --batch {max(1, len(images) // 2)}"
            ) from error
        rows = torch.stack(stored, 1).half().cpu()
        if not rows.isfinite().all():
            raise UserError(
                f"autoencoder {self.vae} gives moments beyond fp16; use another, or --precision fp32"
            )
        return rows.numpy()


def _mean_and_std(parameters: torch.Tensor) -> torch.Tensor:
    """diffusers' (n,2C,h,w) of mean and log-variance to mean and standard deviation, in fp32.

    The clamp of the log-variance is that of diffusers' DiagonalGaussianDistribution.
    """
    mean, logvar = parameters.float().chunk(2, dim=1)
    return torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))], 1)


@final
class Pixels(Encoder):
    """The uint8 pixels (n,1,c,S,S); a mirror is taken when they are read."""

    kind: Kind = "pixels"
    views = 1

    def __init__(self, size: int, channels: int = 3) -> None:
        self.shape = self.image_shape = (channels, size, size)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Encoder.__call__`."""
        return images[:, None]


def make_encoder(vae: str, size: int, flip: bool, precision: str, device: torch.device) -> Encoder:
    """The encoder for `--vae`: a published name, a folder, or "none" for pixels.

    Raises UserError for an unknown precision and for an autoencoder that is not there or does not fit.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision wants fp32 or bf16, got '{precision}'; for example --precision fp32")
    if vae == PIXELS:
        return Pixels(size)
    return Moments(find_vae(vae), size, flip, precision, device)
