"""The Objective interface: the corruption process, the regression target and the denoising loss.

Shapes and conventions are listed in `stbench.core.backbone`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from stbench.core.rng import Rng


@dataclass(frozen=True)
class Batch:
    """What one (micro-)step trains on. `rng` holds every random number of this step."""

    x0: Tensor
    """Clean latents (B,C,H,W), a fresh posterior sample."""
    y: Tensor
    """Labels after dropping (B,): what the student, and SRA's teacher, is told."""
    y_true: Tensor
    """Labels before dropping (B,): what Self-Transcendence's conditional teacher is told."""
    index: Tensor
    """Rows of the training set (B,), on the host."""
    rng: Rng
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Per-image tensors a recipe asked for, such as cached encoder tokens."""


@dataclass(frozen=True)
class Noised:
    """A latent corrupted at known times: x_t = alpha(t) x0 + sigma(t) noise."""

    x_t: Tensor
    t: Tensor
    """(B,) float64, on the device of x_t."""
    t_host: Tensor
    """The same values on the host, so that a subset by time needs no synchronisation."""
    x0: Tensor
    noise: Tensor


class Objective(ABC):
    """The corruption, the regression target and its loss; sole owner of t- and noise-sampling."""

    samplers: ClassVar[Sequence[str]] = ()
    """Samplers that can invert this process; the first is the default."""

    @abstractmethod
    def sample_t(self, rng: Rng) -> Tensor:
        """Training times (B,) float64 on the host."""

    @abstractmethod
    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise coefficients at t, float64, same shape and device as t."""

    @abstractmethod
    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Training loss per sample (B,), float32."""

    @abstractmethod
    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The clean latent and the noise (x0, eps) that a prediction implies at (x_t, t)."""

    @abstractmethod
    def velocity_target(self, noised: Noised) -> Tensor:
        """The velocity of this process at a training point (B,C,H,W).

        Flows: the derivative of their own path. Noise predictions: eps - x0, the velocity of the linear flow
        through the same pair, so that a recipe that regresses a velocity means the same thing under every
        objective.
        """

    def velocity(self, prediction: Tensor, noised: Noised) -> Tensor:
        """The same velocity as `velocity_target`, from a prediction instead of the truth."""
        x0, eps = self.denoise(prediction, noised.x_t, noised.t_host)
        return self.velocity_target(Noised(noised.x_t, noised.t, noised.t_host, x0, eps))

    def out_channels(self, channels: int) -> int:
        """Channels the network must predict for C latent channels."""
        return channels

    def snap(self, t: Tensor) -> Tensor:
        """The nearest time the process knows: t itself, or the nearest whole step of a discrete process."""
        return t

    def tau(self, t: Tensor) -> Tensor:
        """Flow-equivalent time sigma/(alpha+sigma): the same noise level on the linear flow."""
        alpha, sigma = self.alpha_sigma(t)
        return sigma / (alpha + sigma)

    @abstractmethod
    def t_of_tau(self, tau: Tensor) -> Tensor:
        """Inverse of `tau`, clamped to the times the process reaches."""

    def earlier(self, t: Tensor, amount: float, u: Tensor) -> Tensor:
        """Host times (B,) moved towards the data by `amount` * u, u (B,) in [0,1), in raw t, clamped to
        [0,1].

        Discrete processes move by whole steps.
        """
        return (t - amount * u).clamp(0.0, 1.0)

    def at(self, x0: Tensor, noise: Tensor, t: Tensor) -> Noised:
        """Corrupt x0 (B,C,H,W) with `noise` at host times t (B,)."""
        t = self.snap(t.double())
        alpha, sigma = (c.to(x0.device, x0.dtype).view(-1, 1, 1, 1) for c in self.alpha_sigma(t))
        return Noised(alpha * x0 + sigma * noise, t.to(x0.device, non_blocking=True), t, x0, noise)

    def draw(self, batch: Batch) -> Noised:
        """Corrupt a batch at this step's times with this step's noise."""
        noise = batch.rng.normal("noise", tuple(batch.x0.shape[1:])).to(batch.x0.device, non_blocking=True)
        return self.at(batch.x0, noise, self.sample_t(batch.rng))
