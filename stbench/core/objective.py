"""The Objective interface: the corruption process, the regression target and the denoising loss.

Shapes and conventions are listed in `stbench.core.backbone`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from stbench.core.device import upload
from stbench.core.rng import Rng


def like(coefficients: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Return coefficients (B,) or (1,) as factors (B,1,1,1) with the device and dtype of x (B,C,H,W).

    Coefficients (B,N), one per token of a square grid, become factors (B,1,H,W).
    """
    moved = [c.to(x.device, x.dtype, non_blocking=True) for c in coefficients]
    return [c.view(-1, 1, 1, 1) if c.ndim == 1 else on_pixels(c, x.shape[-1]) for c in moved]


def on_pixels(tokens: Tensor, size: int) -> Tensor:
    """Return one value per token (B,N) of a square grid as one per pixel (B,1,size,size)."""
    grid = math.isqrt(tokens.shape[1])
    values = tokens.reshape(-1, 1, grid, grid)
    return values.repeat_interleave(size // grid, 2).repeat_interleave(size // grid, 3)


@dataclass(frozen=True)
class Batch:
    """The data and the random numbers of one (micro-)step."""

    x0: Tensor
    """Clean latents (B,C,H,W): a fresh sample from the autoencoder's posterior."""
    y: Tensor
    """Labels after dropping (B,): those that the student receives."""
    y_true: Tensor
    """Labels before dropping (B,), for teachers."""
    index: Tensor
    """Rows of the training set (B,), on the host."""
    rng: Rng
    """Source of every random number of this step."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Additional per-image tensors by name; "images" contains the clean images if a stage needs them."""


@dataclass(frozen=True)
class Noised:
    """Latents corrupted at known times: x_t = alpha(t) x0 + sigma(t) noise."""

    x_t: Tensor
    """Corrupted latents (B,C,H,W)."""
    t: Tensor
    """Times (B,), or (B,N) with one per token; float64, on the device of x_t."""
    t_host: Tensor
    """The same times on the host, so that selecting samples by time needs no synchronisation."""
    x0: Tensor
    """Clean latents (B,C,H,W)."""
    noise: Tensor
    """Standard normal noise (B,C,H,W)."""


class Objective(ABC):
    """A corruption process with its regression target and loss.

    The only place that samples training times and noise. Times are in [0,1] with t=0 for data; each objective
    maps its own steps to that range. Where a method takes times (B,), it also takes (B,N), one per token of a
    square grid: use `like`.

    The parameters of the constructor are the options `--set objective.*`; their annotations state the range.
    Each needs a default, and `out_channels` must not depend on them.
    """

    samplers: ClassVar[Sequence[str]] = ()
    """Registered names of the samplers that can invert this process; the first is the default."""

    @property
    def predicts_velocity(self) -> bool:
        """Whether the network predicts the velocity of a flow, so that `velocity` returns the prediction."""
        return False

    @abstractmethod
    def sample_t(self, rng: Rng) -> Tensor:
        """Draw training times (B,), float64, on the host."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise coefficients at t, float64, with the shape and device of t."""

    @abstractmethod
    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Training loss per sample (B,), float32."""

    @abstractmethod
    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the clean latent and the noise (x0, eps) that a prediction implies at (x_t, t)."""

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B,C,H,W) that a prediction implies at (x_t, t), as in `velocity_target`."""
        x0, noise = self.denoise(prediction, x_t, t)
        return self.velocity_target(Noised(x_t, t, t.cpu(), x0, noise))

    @abstractmethod
    def velocity_target(self, noised: Noised) -> Tensor:
        """Velocity of this process at a training point (B,C,H,W), for recipes that regress a velocity.

        Flows return the derivative of their own path. Noise predictions return eps - x0, the velocity of the
        linear flow through the same pair, so that the target has the same meaning under every objective.
        """

    def out_channels(self, channels: int) -> int:
        """Number of channels that the network must predict for `channels` latent channels."""
        return channels

    def snap(self, t: Tensor) -> Tensor:
        """Return the nearest valid times: t itself, or the nearest whole steps of a discrete process."""
        return t

    def tau(self, t: Tensor) -> Tensor:
        """Flow-equivalent time sigma/(alpha+sigma): the time of the same noise level on the linear flow."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / (alpha + sigma)

    @abstractmethod
    def t_of_tau(self, tau: Tensor) -> Tensor:
        """Inverse of `tau`, clamped to the times that the process reaches."""

    def earlier(self, t: Tensor, amount: float, u: Tensor) -> Tensor:
        """Move host times t (B,) towards the data by `amount` * u in native time, clamped to [0,1].

        u (B,) is in [0,1). Discrete processes move by whole steps.
        """
        return (t - amount * u).clamp(0.0, 1.0)

    def at(self, x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
        """Corrupt x0 (B,C,H,W) with `noise` (B,C,H,W) at host times t (B,), or (B,N) with one per token."""
        t = self.snap(t.double())
        alpha, sigma = like([upload(c.to(x0.dtype), x0.device) for c in self.alpha_sigma(t)], x0)
        return Noised(alpha * x0 + sigma * noise, upload(t, x0.device), t, x0, noise)

    def draw(self, batch: Batch) -> Noised:
        """Corrupt a batch with the noise and at the times of its step."""
        noise = upload(batch.rng.normal("noise", tuple(batch.x0.shape[1:])), batch.x0.device)
        return self.at(batch.x0, noise, self.sample_t(batch.rng))
