"""Samplers for flows, in REPA's form: t runs from 1 (noise) to 0 (data), and the state is float64."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from stbench.core.registry import SAMPLERS
from stbench.diffusion.guidance import Denoiser, host
from stbench.diffusion.sampler import Noise, Sampler, draw


@final
@SAMPLERS.register_module(name="euler")
@dataclass(frozen=True)
class Euler(Sampler):
    """Euler's method on the probability-flow ODE, uniform in t."""

    name = "euler"

    def run(self, denoiser: Denoiser, x: Tensor, *, steps: int, noise: Noise | None) -> Tensor:
        """Integrate x += v dt over `steps` equal intervals."""
        grid = uniform_grid(steps)
        for t, s in pairwise(grid):
            x = x + (s - t) * denoiser.velocity(x, t)
        return x


@final
@SAMPLERS.register_module(name="heun")
@dataclass(frozen=True)
class Heun(Sampler):
    """Heun's method on the probability-flow ODE, uniform in t; `steps` counts intervals."""

    correct_last: bool = False
    """Whether the last step is corrected too: torchdiffeq's heun2 does, REPA does not."""
    name = "heun"

    def nfe(self, steps: int) -> int:
        """Two evaluations per step, one for an uncorrected last step."""
        return 2 * steps - (not self.correct_last)

    def run(self, denoiser: Denoiser, x: Tensor, *, steps: int, noise: Noise | None) -> Tensor:
        """Take trapezoidal steps from an Euler predictor; each step is guided as at its start (REPA)."""
        grid = uniform_grid(steps)
        for t, s in pairwise(grid):
            v = denoiser.velocity(x, t)
            predicted = x + (s - t) * v
            if s > 0.0 or self.correct_last:
                v_end = denoiser.velocity(predicted, s, as_at=t)
                predicted = x + (s - t) * 0.5 * (v + v_end)
            x = predicted
        return x


@final
@SAMPLERS.register_module(name="euler-maruyama")
@dataclass(frozen=True)
class EulerMaruyama(Sampler):
    """Euler-Maruyama on the reverse SDE with diffusion w(t) = 2t.

    Uniform in t from 1 to `last_step`, then one step without noise: REPA's euler_maruyama_sampler. On the
    linear path it equals SiT's sample_sde with diffusion form "sigma" and last step "Mean". (On the cosine
    path that form is 2 sin(pi t/2).)
    """

    last_step: float = 0.04
    name = "euler-maruyama"
    min_steps = 2

    @property
    def stochastic(self) -> bool:
        """True: one draw per step, none in the last."""
        return True

    def run(self, denoiser: Denoiser, x: Tensor, *, steps: int, noise: Noise | None) -> Tensor:
        """Integrate x += (v - w/2 score) dt + sqrt(w |dt|) z, with score = -eps/sigma."""
        grid = [*torch.linspace(1.0, self.last_step, steps, dtype=torch.float64).tolist(), 0.0]
        for i, (t, s) in enumerate(pairwise(grid)):
            prediction = denoiser(x, t)
            v = denoiser.objective.velocity(prediction, x, host(t))
            _, eps = denoiser.objective.denoise(prediction, x, host(t))
            _, sigma = denoiser.coefficients(t)
            drift = v + (t / sigma) * eps
            x = x + (s - t) * drift
            if s > 0.0:
                x = x + math.sqrt(2.0 * t * (t - s)) * draw(noise, i, x)
        return x


def uniform_grid(steps: int) -> list[float]:
    """Return `steps` + 1 equidistant times from 1 to 0."""
    return torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64).tolist()
