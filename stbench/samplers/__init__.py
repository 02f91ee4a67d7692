"""Samplers and guidance. `sample` is the front door: initial noise in, latents out."""

from __future__ import annotations

import torch
from torch import Tensor

from stbench.contracts import Backbone, Objective
from stbench.registry import OBJECTIVES, SAMPLERS, UserError, lookup
from stbench.samplers.base import Denoiser, Guidance, Noise, Sampler, guide
from stbench.samplers.diffusion import Ddim, Ddpm
from stbench.samplers.dpm_solver import DpmSolver
from stbench.samplers.flow import Euler, EulerMaruyama, Heun

__all__ = [
    "Ddim",
    "Ddpm",
    "Denoiser",
    "DpmSolver",
    "Euler",
    "EulerMaruyama",
    "Guidance",
    "Heun",
    "Noise",
    "Sampler",
    "guide",
    "nfe",
    "resolve",
    "sample",
]


@torch.no_grad()
def sample(
    name: str | Sampler,
    backbone: Backbone,
    objective: Objective,
    z: Tensor,
    y: Tensor,
    *,
    steps: int,
    guidance: Guidance = Guidance(),  # noqa: B008 - frozen
    noise: Noise | None = None,
) -> Tensor:
    """Draw latents (B,C,H,W) float32 from initial noise z (B,C,H,W) and labels y (B,).

    `name` is a registered name, or a sampler with its options set; `steps` is as published (function
    evaluations; for Heun steps). `noise(i)` gives the i-th draw (B,C,H,W), so that a sample can be replayed.
    Raises UserError if the sampler cannot invert the objective or run that many steps, ValueError if a
    stochastic one has no noise.
    """
    sampler = resolve(name, objective)
    if steps < sampler.min_steps:
        raise UserError(
            f"sampler '{sampler.name}' takes at least {sampler.min_steps} steps, found {steps}; "
            f"set its steps to {sampler.min_steps} or more"
        )
    if sampler.stochastic and noise is None:
        raise ValueError(
            f"sampler '{sampler.name}' draws noise: pass noise=, a function of the draw's number"
        )
    return sampler.run(Denoiser(backbone, objective, y, guidance), z.double(), steps, noise).float()


def resolve(name: str | Sampler, objective: Objective) -> Sampler:
    """The sampler of that name with its default options; UserError if it cannot invert the objective."""
    sampler: Sampler = lookup(SAMPLERS, name)() if isinstance(name, str) else name
    if sampler.name not in objective.samplers:
        known = {cls: label for label, cls in OBJECTIVES.module_dict.items()}
        found = known.get(type(objective), type(objective).__name__)
        raise UserError(
            f"sampler '{sampler.name}' cannot invert objective '{found}'; "
            f"use one of: {', '.join(objective.samplers)}"
        )
    return sampler


def nfe(name: str | Sampler, steps: int) -> int:
    """Network evaluations per image of `steps` steps, guidance not counted."""
    sampler: Sampler = lookup(SAMPLERS, name)() if isinstance(name, str) else name
    return sampler.nfe(steps)
