"""Noise-prediction objectives on variance-preserving processes: improved DDPM (DiT) and U-ViT's two."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from stbench.core.objective import Noised, Objective, like
from stbench.core.registry import OBJECTIVES
from stbench.core.rng import Rng
from stbench.diffusion.schedule import Schedule, linear_betas, scaled_linear_betas


class NoisePrediction(Objective):
    """An objective whose network predicts the noise, in the first C channels."""

    def mse(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Mean squared error of the noise (B,), float32."""
        eps = prediction[:, : noised.x_t.shape[1]].float()
        return (eps - noised.noise.float()).square().flatten(1).mean(1)

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Mean squared error of the noise (B,), float32."""
        return self.mse(prediction, noised)

    def denoise(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 = (x_t - sigma eps)/alpha and the predicted eps."""
        alpha, sigma = like(self.alpha_sigma(t), x_t)
        eps = prediction[:, : x_t.shape[1]]
        return (x_t - sigma * eps) / alpha, eps

    def velocity_target(self, noised: Noised) -> Tensor:
        """eps - x0: the velocity of the linear flow through the same pair (B,C,H,W)."""
        return noised.noise - noised.x0


class Discrete(NoisePrediction):
    """A discrete process of T steps; step i is the time (i + offset)/(T - 1 + offset).

    Training uses whole steps only. Between steps, which only solvers visit, log alpha is linear in t
    (DPM-Solver's discrete schedule).
    """

    cleanest = 0
    """The lowest step that `earlier` returns."""

    def __init__(self, schedule: Schedule, offset: int) -> None:
        self.schedule = schedule
        self.offset = offset
        self.steps = len(schedule.betas)
        self.times = self.time(torch.arange(self.steps))
        self.log_alphas = 0.5 * schedule.alphas_cumprod.log()

    def time(self, index: Tensor) -> Tensor:
        """Return the time of step `index` (int, any shape), float64."""
        return (index.double() + self.offset) / (self.steps - 1 + self.offset)

    def index(self, t: Tensor) -> Tensor:
        """Return the step nearest to time t, int64."""
        position = t.double() * (self.steps - 1 + self.offset) - self.offset
        return position.round().long().clamp(0, self.steps - 1)

    def snap(self, t: Tensor) -> Tensor:
        """Return the time of the nearest whole step."""
        return self.time(self.index(t))

    def sample_t(self, rng: Rng) -> Tensor:
        """Draw the times (B,) of uniform whole steps."""
        return self.time(rng.integers("t", self.steps))

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha-bar) and sqrt(1 - alpha-bar), exact at whole steps."""
        return vp_coefficients(interpolate(t.double(), self.times, self.log_alphas))

    def earlier(self, t: Tensor, amount: float, u: Tensor) -> Tensor:
        """Move times (B,) down by floor(u * amount * T) steps."""
        moved = self.index(t) - (u * round(amount * self.steps)).long()
        return self.time(moved.clamp(self.cleanest, self.steps - 1))

    def t_of_tau(self, tau: Tensor) -> Tensor:
        """Return the time, possibly between steps, at which tau is reached, clamped to the process."""
        return interpolate(-log_alpha_of_tau(tau), -self.log_alphas, self.times)


@final
@OBJECTIVES.register_module(name="iddpm")
class ImprovedDdpm(Discrete):
    """DiT's objective: MSE of the noise plus the variational bound for the learned variance; t = n/999.

    Improved DDPM's hybrid loss as DiT weights it: the network predicts 2C channels, and the bound is in bits
    per dimension, with weight 1 and a detached mean.
    """

    samplers = ("ddpm", "ddim")
    # SRA's code for DiT clamps the teacher's step at 1, so that at step 0 the teacher is the noisier one.
    cleanest = 1

    def __init__(self) -> None:
        super().__init__(Schedule(linear_betas()), offset=0)

    def out_channels(self, channels: int) -> int:
        """Noise and variance: 2C."""
        return 2 * channels

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """MSE + bound (B,), float32."""
        return self.mse(prediction, noised) + self.bound(prediction, noised)

    def bound(self, prediction: Tensor, noised: Noised) -> Tensor:
        """KL(q(x_{t-1}|x_t,x_0) || p), at step 0 the negative discretised log-likelihood; bits/dim (B,)."""
        x_t, x0 = noised.x_t.float(), noised.x0.float()
        eps, v = prediction.float().chunk(2, dim=1)
        index = self.index(noised.t_host)
        true_mean, true_log_variance = self.schedule.posterior(x0, x_t, index)
        # The mean is detached: the bound trains the variance only.
        mean, log_variance, _ = self.schedule.model_posterior(torch.cat([eps.detach(), v], 1), x_t, index)
        kl = gaussian_kl(true_mean, true_log_variance, mean2=mean, log_variance2=log_variance)
        nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        (first,) = like([(index == 0).double()], x_t)
        return torch.where(first > 0, nll, kl).flatten(1).mean(1) / math.log(2.0)


@final
@OBJECTIVES.register_module(name="vp-discrete")
class VpDiscrete(Discrete):
    """U-ViT-H's objective: noise prediction on Stable Diffusion's 1000 steps, t = n/1000 for n = 1..1000."""

    samplers = ("dpm-solver", "ddim")

    def __init__(self) -> None:
        super().__init__(Schedule(scaled_linear_betas()), offset=1)


@final
@OBJECTIVES.register_module(name="vp-continuous")
class VpContinuous(NoisePrediction):
    """U-ViT-L's objective: noise prediction on the VP-SDE with beta(t) = 0.1 + 19.9 t (Song et al. 2021)."""

    samplers = ("dpm-solver",)
    beta_min = 0.1
    beta_max = 20.0

    def sample_t(self, rng: Rng) -> Tensor:
        """Draw uniform times (B,)."""
        return rng.uniform("t")

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha = exp(-1/2 integral of beta), sigma = sqrt(1 - alpha^2)."""
        return vp_coefficients(self._log_alpha(t.double()))

    def _log_alpha(self, t: Tensor) -> Tensor:
        """-1/2 integral of beta from 0 to t."""
        return -0.25 * t.square() * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def t_of_tau(self, tau: Tensor) -> Tensor:
        """Return the positive root of the quadratic log alpha(t), clamped to [0,1]."""
        last = self._log_alpha(torch.ones((), dtype=torch.float64, device=tau.device))
        c = -torch.maximum(log_alpha_of_tau(tau), last)
        # The form of the root that does not cancel as c approaches 0
        half = self.beta_min / 2
        return (2.0 * c / (half + (half**2 + (self.beta_max - self.beta_min) * c).sqrt())).clamp(0.0, 1.0)


def vp_coefficients(log_alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma = sqrt(1 - alpha^2) from log alpha."""
    return log_alpha.exp(), (-torch.expm1(2.0 * log_alpha)).sqrt()


def log_alpha_of_tau(tau: Tensor) -> Tensor:
    """Return log alpha of a variance-preserving process with sigma/(alpha+sigma) = tau, clamped to [0,1]."""
    tau = tau.double().clamp(0.0, 1.0)
    return -0.5 * torch.log1p((tau / (1.0 - tau)).square())


def interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """Interpolate linearly through (knots, values), knots ascending; constant beyond the ends."""
    knots, values = knots.to(x.device), values.to(x.device)
    x = x.clamp(knots[0], knots[-1])
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    weight = (x - knots[right - 1]) / (knots[right] - knots[right - 1])
    return torch.lerp(values[right - 1], values[right], weight)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, *, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL(N1 || N2) of diagonal Gaussians per element, in nats."""
    ratio = log_variance1 - log_variance2
    return 0.5 * (-1.0 - ratio + ratio.exp() + (mean1 - mean2).square() * (-log_variance2).exp())


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability per element of the 2/255-wide bin around x in [-1,1] (DDPM eq. 13)."""
    inverse = (-log_scale).exp()
    below, above = (_normal_cdf(inverse * (x - mean + edge)) for edge in (-1 / 255, 1 / 255))
    inside = torch.where(x > 0.999, 1.0 - below, above - below)
    return torch.where(x < -0.999, above, inside).clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """Approximate the standard normal distribution function by tanh, as improved DDPM does."""
    return 0.5 * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3))))
