"""Flow objectives: the network predicts the velocity of the path x_t = alpha(t) x0 + sigma(t) eps.

Training times are uniform or, in the "lognormal" variants, such that sigma/alpha is log-normal (REPA's
`--weighting lognormal`).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from stbench.core.objective import Noised, Objective
from stbench.core.registry import OBJECTIVES
from stbench.core.rng import Rng
from stbench.diffusion.schedule import like


class Flow(Objective):
    """Velocity prediction on a differentiable path, with t uniform in [0,1] (SiT, REPA)."""

    samplers = ("euler", "heun", "euler-maruyama")

    @abstractmethod
    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Derivatives of alpha and sigma at t, float64, with the shape of t."""

    def sample_t(self, rng: Rng) -> Tensor:
        """Draw uniform times (B,)."""
        return rng.uniform("t")

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Mean squared error of the velocity (B,), float32."""
        return (prediction.float() - self.velocity_target(noised).float()).square().flatten(1).mean(1)

    def velocity_target(self, noised: Noised) -> Tensor:
        """alpha'(t) x0 + sigma'(t) eps (B,C,H,W)."""
        d_alpha, d_sigma = like(self.rates(noised.t_host), noised.x0)
        return d_alpha * noised.x0 + d_sigma * noised.noise

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


def _lognormal(rng: Rng) -> Tensor:
    """Draw tau (B,) = s/(1+s), where s is exp of a standard normal number."""
    s = rng.normal("t", ()).double().exp()
    return s / (1.0 + s)


@final
@OBJECTIVES.register_module(name="linear-lognormal")
class LinearLognormal(LinearFlow):
    """`linear` with log-normal sigma/alpha: more training times in the middle."""

    def sample_t(self, rng: Rng) -> Tensor:
        """Draw times (B,) whose sigma/alpha is log-normal."""
        return self.t_of_tau(_lognormal(rng))


@final
@OBJECTIVES.register_module(name="cosine-lognormal")
class CosineLognormal(CosineFlow):
    """`cosine` with log-normal sigma/alpha s: t = 2/pi atan(s)."""

    def sample_t(self, rng: Rng) -> Tensor:
        """Draw times (B,) whose sigma/alpha is log-normal."""
        return self.t_of_tau(_lognormal(rng))
