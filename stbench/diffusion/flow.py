"""Flow objectives: regression of the velocity of the path x_t = alpha(t) x0 + sigma(t) eps.

The network predicts the velocity or, in the "x" variants, the clean latent. Training times are uniform or, in
the "lognormal" variants, such that sigma/alpha is log-normal (REPA's `--weighting lognormal`). On the linear
path these are logit-normal times: t = sigmoid(n) with n normal.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from stbench.core.objective import Noised, Objective, like
from stbench.core.ranges import Logit, LogitScale, PositiveFraction, PositiveReal
from stbench.core.registry import OBJECTIVES
from stbench.core.rng import Rng


class Flow(Objective):
    """Velocity prediction on a differentiable path, with t uniform in [0,1] (SiT, REPA).

    `shift` multiplies sigma/alpha at every training time: t becomes s t / (1 + (s-1) t) on the linear path
    (Stable Diffusion 3, arXiv 2403.03206, eq. 23; RAE, arXiv 2510.11690). Above 1 there is more noise.
    """

    samplers = ("euler", "heun", "euler-maruyama")
    shift: float = 1.0

    def __init__(self, shift: PositiveReal = 1.0) -> None:
        self.shift = shift

    @property
    def predicts_velocity(self) -> bool:
        """True unless a subclass predicts something else."""
        return type(self).velocity is Flow.velocity

    @abstractmethod
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of alpha and sigma at t, float64, with the shape of t."""

    def unshifted_t(self, rng: Rng) -> Tensor:
        """Draw uniform times (B,)."""
        return rng.uniform("t")

    def sample_t(self, rng: Rng) -> Tensor:
        """Draw training times (B,) and shift them."""
        t = self.unshifted_t(rng)
        if self.shift == 1.0:
            return t
        tau = self.tau(t)
        return self.t_of_tau(self.shift * tau / (1.0 + (self.shift - 1.0) * tau))

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Mean squared error of the velocity (B,), float32."""
        return (prediction.float() - self.velocity_target(noised).float()).square().flatten(1).mean(1)

    def velocity_target(self, noised: Noised) -> Tensor:
        """alpha'(t) x0 + sigma'(t) eps (B,C,H,W)."""
        d_alpha, d_sigma = like(self.rates(noised.t_host), noised.x0)
        return d_alpha * noised.x0 + d_sigma * noised.noise

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the prediction (B,C,H,W) itself."""
        return prediction

    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Solve x_t = alpha x0 + sigma eps and v = alpha' x0 + sigma' eps for (x0, eps)."""
        alpha, sigma = like(self.alpha_sigma(t), x_t)
        d_alpha, d_sigma = like(self.rates(t), x_t)
        determinant = alpha * d_sigma - d_alpha * sigma
        x0 = (d_sigma * x_t - sigma * prediction) / determinant
        return x0, (alpha * prediction - d_alpha * x_t) / determinant


@OBJECTIVES.register_module(name="linear")
class LinearFlow(Flow):
    """x_t = (1-t) x0 + t eps, with target eps - x0 (SiT's linear path, in REPA's direction of time)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 - t and t."""
        t = t.double()
        return 1.0 - t, t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """-1 and 1."""
        one = torch.ones_like(t, dtype=torch.float64)
        return -one, one

    def tau(self, t: Tensor) -> Tensor:
        """Return t itself, without rounding."""
        return t.double()

    def t_of_tau(self, tau: Tensor) -> Tensor:
        """Return tau itself, clamped to [0,1]."""
        return tau.double().clamp(0.0, 1.0)


@OBJECTIVES.register_module(name="cosine")
class CosineFlow(Flow):
    """x_t = cos(pi t/2) x0 + sin(pi t/2) eps, with the velocity of that path (SiT's GVP)."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine of pi t / 2."""
        angle = t.double() * (math.pi / 2)
        return angle.cos(), angle.sin()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of that cosine and sine."""
        alpha, sigma = self.alpha_sigma(t)
        return -math.pi / 2 * sigma, math.pi / 2 * alpha

    def t_of_tau(self, tau: Tensor) -> Tensor:
        """Return the angle whose tangent is tau/(1-tau), in units of pi/2."""
        tau = tau.double().clamp(0.0, 1.0)
        return torch.atan2(tau, 1.0 - tau) / (math.pi / 2)


class _LognormalTimes(Flow):
    """Training times whose log(sigma/alpha) is normal with mean `location` and deviation `scale`.

    With location m and scale 1, a shift of s is the same as location m + log s.
    """

    def __init__(self, location: Logit = 0.0, scale: LogitScale = 1.0, shift: PositiveReal = 1.0) -> None:
        super().__init__(shift=shift)
        self.location, self.scale = location, scale

    def unshifted_t(self, rng: Rng) -> Tensor:
        """Draw times (B,) whose sigma/alpha is log-normal."""
        s = (self.location + self.scale * rng.normal("t", ()).double()).exp()
        return self.t_of_tau(s / (1.0 + s))


@final
@OBJECTIVES.register_module(name="linear-lognormal")
class LinearLognormal(_LognormalTimes, LinearFlow):
    """`linear` with log-normal sigma/alpha: more training times in the middle."""


@final
@OBJECTIVES.register_module(name="cosine-lognormal")
class CosineLognormal(_LognormalTimes, CosineFlow):
    """`cosine` with log-normal sigma/alpha s: t = 2/pi atan(s)."""


@OBJECTIVES.register_module(name="linear-x")
class LinearX(LinearFlow):
    """`linear` with a network that predicts x0, and the loss of the velocity (x_t - x0) / max(t, t_min).

    The x-prediction with v-loss of JiT (arXiv 2511.13720). As in its code, prediction and target are divided
    by the same clamped time, so the loss is |prediction - x0|^2 / max(t, t_min)^2; `t_min` is its `t_eps`.
    Samplers use the same velocity, which below `t_min` is shorter than the path's.
    """

    def __init__(self, t_min: PositiveFraction = 0.05, shift: PositiveReal = 1.0) -> None:
        super().__init__(shift)
        self.t_min = t_min

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Mean squared error of the velocity (B,), float32."""
        (t,) = like([noised.t_host.clamp(min=self.t_min)], noised.x0.float())
        return ((noised.x0.float() - prediction.float()) / t).square().flatten(1).mean(1)

    def velocity(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Return (x_t - prediction) / max(t, t_min) (B,C,H,W)."""
        (t,) = like([t.clamp(min=self.t_min)], x_t)
        return (x_t - prediction) / t

    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the prediction and, from x0 + velocity, the noise."""
        return prediction, prediction + self.velocity(prediction, x_t, t)


@final
@OBJECTIVES.register_module(name="linear-x-lognormal")
class LinearXLognormal(_LognormalTimes, LinearX):
    """`linear-x` with the training times of JiT: t = sigmoid(0.8 + 0.8 n) with n standard normal.

    JiT draws its own time 1 - t from sigmoid(-0.8 + 0.8 n).
    """

    def __init__(
        self,
        t_min: PositiveFraction = 0.05,
        location: Logit = 0.8,
        scale: LogitScale = 0.8,
        shift: PositiveReal = 1.0,
    ) -> None:
        super().__init__(location, scale, shift)
        self.t_min = t_min
