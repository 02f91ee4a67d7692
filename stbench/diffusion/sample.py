"""Sampling: `sample` turns initial noise into latents with a registered sampler.

Re-exports the samplers and guidance.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.core.registry import OBJECTIVES, SAMPLERS, lookup, name_of, names
from stbench.diffusion.ddpm_samplers import Ddim, Ddpm
from stbench.diffusion.dpm_solver import DpmSolver
from stbench.diffusion.flow_samplers import Euler, EulerMaruyama, Heun
from stbench.diffusion.guidance import Denoiser, Guidance, guide
from stbench.diffusion.sampler import Noise, Sampler

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
    "check_steps",
    "guide",
    "nfe",
    "resolve_sampler",
    "sample",
    "samplers_for",
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
    """Draw latents (B,C,H,W), float32, from initial noise z (B,C,H,W) and labels y (B,).

    `name` is a registered name, or a sampler with options. `steps` has its published meaning: function
    evaluations, for Heun intervals. `noise(i)` returns the i-th draw (B,C,H,W), so that a sample can be
    reproduced. Raises UserError if the sampler cannot invert the objective or take that many steps,
    ValueError if a stochastic sampler has no `noise`.
    """
    sampler = resolve_sampler(name, objective)
    if steps < sampler.min_steps:
        raise UserError(
            f"sampler '{sampler.name}' needs at least {sampler.min_steps} steps, got {steps}; "
            f"increase the number of steps"
        )
    if sampler.stochastic and noise is None:
        raise ValueError(
            f"sampler '{sampler.name}' draws noise: pass noise=, a function from the draw's index to noise"
        )
    return sampler.run(
        Denoiser(backbone, objective, y, guidance, noise), z.double(), steps=steps, noise=noise
    ).float()


def resolve_sampler(name: str | Sampler, objective: Objective) -> Sampler:
    """Return the sampler registered under `name`, with default options.

    Raises UserError if it cannot invert the objective.
    """
    sampler: Sampler = lookup(SAMPLERS, name)() if isinstance(name, str) else name
    if not sampler.inverts(objective):
        found = name_of(OBJECTIVES, type(objective))
        raise UserError(
            f"sampler '{sampler.name}' cannot invert objective '{found}'; "
            f"use one of: {', '.join(samplers_for(objective))}"
        )
    return sampler


def samplers_for(objective: Objective) -> list[str]:
    """Registered names of the samplers that can invert an objective; the first is its default."""
    others = [name for name in names(SAMPLERS) if name not in objective.samplers]
    return [*objective.samplers, *(name for name in others if lookup(SAMPLERS, name)().inverts(objective))]


def nfe(name: str | Sampler, steps: int) -> int:
    """Network evaluations per image for `steps` steps, not counting guidance."""
    sampler: Sampler = lookup(SAMPLERS, name)() if isinstance(name, str) else name
    return sampler.nfe(steps)


class _ZeroBackbone(Backbone):
    """A network that predicts zero, to run a sampler over its grid at no cost."""

    def __init__(self, out_channels: int) -> None:
        super().__init__()
        self.info = BackboneInfo(
            name="zero", size="", depth=1, width=1, tokens=1, patch=1, channels=1, input_size=1, classes=1
        )
        self._out = out_channels

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        return x.new_zeros(x.shape[0], self._out, *x.shape[2:]), {}


def check_steps(name: str, objective: Objective, steps: int, option: str = "--set eval.steps=") -> None:
    """Run a sampler on one pixel without a network; raises UserError if it cannot take that many steps.

    Lets a command fail before training instead of at the first evaluation. `option` is how the command sets
    the number of steps.
    """
    pixel, label = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.long)
    network = _ZeroBackbone(objective.out_channels(1))
    try:
        sample(name, network, objective, pixel, label, steps=steps, noise=lambda draw: pixel)
    except (ArithmeticError, IndexError, RuntimeError, ValueError, UserError) as error:
        reason = str(error).partition(";")[0]
        raise UserError(
            f"sampler '{name}' cannot take {steps} steps: {reason}; for example {option}50"
        ) from error
