"""Samplers that visit a subset of the steps of a discrete process: ancestral DDPM and DDIM."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.registry import SAMPLERS
from stbench.diffusion.guidance import Denoiser
from stbench.diffusion.noise_prediction import Discrete
from stbench.diffusion.sampler import Noise, Sampler, draw
from stbench.diffusion.schedule import respaced_steps

Spacing = Literal["stride", "spread"]
"""How the N visited steps are chosen: every k-th step ("ddimN" in improved DDPM's code), or spread evenly
from the first to the last ("N").
"""


@final
@SAMPLERS.register_module(name="ddpm")
@dataclass(frozen=True)
class Ddpm(Sampler):
    """Ancestral sampling with learned variance on a respaced schedule, unclipped (improved DDPM, DiT)."""

    spacing: Spacing = "spread"
    name = "ddpm"
    min_steps = 2

    @property
    def stochastic(self) -> bool:
        """True: one draw per step, none in the last."""
        return True

    def run(self, denoiser: Denoiser, x: Tensor, *, steps: int, noise: Noise | None) -> Tensor:
        """Draw x_s from p(x_s | x_t) along the visited steps; the last step returns the mean."""
        process = discrete_process(denoiser, self.name)
        visited = visited_steps(self.spacing, steps, process)
        schedule, times = process.schedule.respaced(visited), process.time(visited).tolist()
        for k in reversed(range(steps)):
            prediction = denoiser(x, times[k])
            mean, log_variance, _ = schedule.model_posterior(prediction, x, torch.tensor([k]))
            x = mean + (0.5 * log_variance).exp() * draw(noise, steps - 1 - k, x) if k else mean
        return x


@final
@SAMPLERS.register_module(name="ddim")
@dataclass(frozen=True)
class Ddim(Sampler):
    """DDIM on a subset of the steps; deterministic with eta 0, ancestral with eta 1 (DDIM eq. 12, 16)."""

    eta: float = 0.0
    spacing: Spacing = "stride"
    name = "ddim"
    min_steps = 2

    @property
    def stochastic(self) -> bool:
        """True if eta > 0: one draw per step, none in the last."""
        return self.eta > 0.0

    def run(self, denoiser: Denoiser, x: Tensor, *, steps: int, noise: Noise | None) -> Tensor:
        """Iterate x_s = alpha_s x0 + sqrt(sigma_s^2 - spread^2) eps + spread z; the last step returns x0."""
        process = discrete_process(denoiser, self.name)
        visited = visited_steps(self.spacing, steps, process)
        times = process.time(visited).tolist()
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


def discrete_process(denoiser: Denoiser, name: str) -> Discrete:
    """Return the denoiser's objective. Raises UserError if it is not a discrete process."""
    if not isinstance(denoiser.objective, Discrete):
        found = type(denoiser.objective).__name__
        raise UserError(
            f"sampler '{name}' needs a discrete process, found objective {found}; use --objective iddpm"
        )
    return denoiser.objective


def visited_steps(spacing: Spacing, steps: int, process: Discrete) -> Tensor:
    """Return the steps of the process that a sampler with `steps` steps visits, ascending (steps,)."""
    return respaced_steps(f"ddim{steps}" if spacing == "stride" else str(steps), process.steps)
