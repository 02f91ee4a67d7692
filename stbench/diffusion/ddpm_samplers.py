"""Samplers that walk a subset of a discrete process's own steps: ancestral DDPM and DDIM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.registry import SAMPLERS
from stbench.diffusion import Discrete, respaced_steps
from stbench.diffusion.guidance import Denoiser
from stbench.diffusion.sampler import Noise, Sampler, draw

Spacing = Literal["stride", "spread"]
"""Every k-th step ("ddimN" in improved DDPM's code), or N steps from the first to the last ("N")."""


@final
@SAMPLERS.register_module(name="ddpm")
@dataclass(frozen=True)
class Ddpm(Sampler):
    """Ancestral sampling, learned variance, respaced schedule, nothing clipped (improved DDPM, DiT)."""

    spacing: Spacing = "spread"
    name = "ddpm"
    min_steps = 2

    @property
    def stochastic(self) -> bool:
        """True: one draw a step but the last."""
        return True

    def run(self, denoiser: Denoiser, x: Tensor, steps: int, noise: Noise | None) -> Tensor:
        """Draw x_{s} from p(x_s | x_t) down the kept steps; the last step takes the mean."""
        process = discrete(denoiser, self.name)
        kept = keep(self.spacing, steps, process)
        schedule, times = process.schedule.respaced(kept), process.time(kept).tolist()
        for k in reversed(range(steps)):
            prediction = denoiser(x, times[k])
            mean, log_variance, _ = schedule.model_posterior(prediction, x, torch.tensor([k]))
            x = mean + (0.5 * log_variance).exp() * draw(noise, steps - 1 - k, x) if k else mean
        return x


@final
@SAMPLERS.register_module(name="ddim")
@dataclass(frozen=True)
class Ddim(Sampler):
    """DDIM on a subset of the steps; eta 0 is deterministic, eta 1 is ancestral (DDIM eq. 12, 16)."""

    eta: float = 0.0
    spacing: Spacing = "stride"
    name = "ddim"
    min_steps = 2

    @property
    def stochastic(self) -> bool:
        """Only with eta > 0: one draw a step but the last."""
        return self.eta > 0.0

    def run(self, denoiser: Denoiser, x: Tensor, steps: int, noise: Noise | None) -> Tensor:
        """x_s = alpha_s x0 + sqrt(sigma_s^2 - spread^2) eps + spread z, and x0 at the end."""
        process = discrete(denoiser, self.name)
        kept = keep(self.spacing, steps, process)
        times = process.time(kept).tolist()
        for k in reversed(range(steps)):
            x0, eps = denoiser.denoise(x, times[k])
            if k == 0:
                return x0
            alpha, sigma = denoiser.coefficients(times[k])
            alpha_s, sigma_s = denoiser.coefficients(times[k - 1])
            spread = self.eta * sigma_s / sigma * math.sqrt(1.0 - (alpha / alpha_s) ** 2)
            x = alpha_s * x0 + math.sqrt(sigma_s**2 - spread**2) * eps
            if self.stochastic:
                x = x + spread * draw(noise, steps - 1 - k, x)
        return x


def discrete(denoiser: Denoiser, name: str) -> Discrete:
    """The objective, which must have whole steps; UserError otherwise."""
    if not isinstance(denoiser.objective, Discrete):
        found = type(denoiser.objective).__name__
        raise UserError(f"sampler '{name}' needs an objective of whole steps, found {found}; choose iddpm")
    return denoiser.objective


def keep(spacing: Spacing, steps: int, process: Discrete) -> Tensor:
    """The steps of the process that a sampler of `steps` steps visits, ascending (steps,)."""
    return respaced_steps(f"ddim{steps}" if spacing == "stride" else str(steps), process.steps)
