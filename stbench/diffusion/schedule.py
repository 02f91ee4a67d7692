"""Discrete noise schedules: betas, derived quantities, and respacing. Step 0 is the least noisy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.objective import like


def linear_betas(steps: int = 1000) -> Tensor:
    """Linear betas (steps,), float64: 1e-4 to 0.02 at 1000 steps, rescaled for other numbers (DDPM, DiT)."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def scaled_linear_betas(steps: int = 1000) -> Tensor:
    """Betas (steps,), float64, linear in their square root, 0.00085 to 0.012 (Stable Diffusion, U-ViT)."""
    return torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64).square()


@dataclass(frozen=True)
class Schedule:
    """Betas (T,) and derived quantities, float64 on the host (DDPM; improved DDPM)."""

    betas: Tensor

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """alpha-bar (T,)."""
        return (1.0 - self.betas).cumprod(0)

    @cached_property
    def alphas_cumprod_prev(self) -> Tensor:
        """alpha-bar of the previous step (T,); 1 before the first."""
        return torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])

    @cached_property
    def posterior_variance(self) -> Tensor:
        """Variance of q(x_{t-1} | x_t, x_0) (T,)."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> Tensor:
        """Logarithm of that variance (T,); the first entry, log 0, is replaced by the second."""
        return torch.cat([self.posterior_variance[1:2], self.posterior_variance[1:]]).log()

    @cached_property
    def posterior_mean_coef1(self) -> Tensor:
        """Weight of x_0 in the posterior mean (T,)."""
        return self.betas * self.alphas_cumprod_prev.sqrt() / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> Tensor:
        """Weight of x_t in the posterior mean (T,)."""
        return (1.0 - self.alphas_cumprod_prev) * (1.0 - self.betas).sqrt() / (1.0 - self.alphas_cumprod)

    def respaced(self, kept: Tensor) -> Schedule:
        """Return the schedule of the steps `kept` (ascending indices), with unchanged alpha-bars."""
        kept_bars = self.alphas_cumprod[kept]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), kept_bars[:-1]])
        return Schedule(1.0 - kept_bars / previous)

    def posterior(self, x0: Tensor, x_t: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (B,C,H,W) and log variance (B,1,1,1) of q(x_{t-1} | x_t, x_0) at host steps `index`."""
        tables = (self.posterior_mean_coef1, self.posterior_mean_coef2, self.posterior_log_variance_clipped)
        coef1, coef2, log_variance = like([table[index] for table in tables], x_t)
        return coef1 * x0 + coef2 * x_t, log_variance

    def model_posterior(
        self, prediction: Tensor, x_t: Tensor, index: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean and log variance of p(x_{t-1} | x_t) and the implied clean latent, each (B,C,H,W).

        `prediction` (B,2C,H,W) contains the noise and v, where log var = f log beta + (1-f) log beta~ with
        f = (v+1)/2 (improved DDPM eq. 15).
        """
        eps, v = prediction.chunk(2, dim=1)
        bar, log_beta = self.alphas_cumprod[index], self.betas.log()[index]
        # Not (x_t - sigma eps) / alpha: at step 0 the likelihood takes the difference of two nearly equal
        # numbers, and the published code rounds in this order.
        scale, noise_scale, log_beta = like(((1.0 / bar).sqrt(), (1.0 / bar - 1.0).sqrt(), log_beta), x_t)
        x0 = scale * x_t - noise_scale * eps
        mean, log_posterior = self.posterior(x0, x_t, index)
        fraction = (v + 1.0) / 2.0
        return mean, fraction * log_beta + (1.0 - fraction) * log_posterior, x0


def respaced_steps(spacing: str, steps: int = 1000) -> Tensor:
    """Return the steps kept of `steps`, ascending, int64 (DiT, improved DDPM).

    "250" spreads 250 steps from the first to the last, "ddim50" takes every 20th of 1000. Raises UserError
    for a count that is impossible.
    """
    integer_stride = spacing.startswith("ddim")
    count = int(spacing.removeprefix("ddim"))
    if not 2 <= count <= steps:
        raise UserError(f"the number of sampling steps must be 2 to {steps}, got {count}")
    return _strided(count, steps) if integer_stride else _spread(count, steps)


def _strided(count: int, steps: int) -> Tensor:
    """Take every k-th step, starting with step 0."""
    stride = math.ceil(steps / count)
    kept = torch.arange(0, steps, stride)
    if len(kept) != count:
        raise UserError(f"no whole stride takes {count} of {steps} sampling steps; use {len(kept)} steps")
    return kept


def _spread(count: int, steps: int) -> Tensor:
    """Spread the steps evenly from the first to the last."""
    stride, position, kept = (steps - 1) / (count - 1), 0.0, []
    for _ in range(count):
        kept.append(round(position))
        # Accumulated as in the reference code: the rounding error decides where halves go.
        position += stride
    return torch.tensor(kept)
