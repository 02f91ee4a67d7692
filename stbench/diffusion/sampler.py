"""The Sampler interface: from initial noise to latents, given a denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from stbench.core.objective import Objective
from stbench.diffusion.guidance import Denoiser, Noise

__all__ = ["Noise", "Sampler", "draw"]


class Sampler(ABC):
    """A numerical method that turns noise into latents.

    Subclasses are frozen dataclasses whose fields are the sampler's options.
    """

    name: ClassVar[str]
    """The name it is registered under."""
    min_steps: ClassVar[int] = 1
    """The smallest number of steps it can take."""

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise on the way."""
        return False

    def inverts(self, objective: Objective) -> bool:
        """Whether it can sample from networks that were trained with this objective.

        By default the objective names the sampler in its `samplers`. A plug-in may answer for others.
        """
        return self.name in objective.samplers

    def nfe(self, steps: int) -> int:
        """Network evaluations per image for `steps` steps, not counting guidance."""
        return steps

    @abstractmethod
    def run(self, denoiser: Denoiser, x: Tensor, *, steps: int, noise: Noise | None) -> Tensor:
        """Return the sample (B,C,H,W), float64, from x (B,C,H,W), float64, at the noisiest time.

        `noise` is None only if the sampler is not stochastic.
        """


def draw(noise: Noise | None, index: int, x: Tensor) -> Tensor:
    """Return draw `index` with the device and dtype of x (B,C,H,W)."""
    assert noise is not None
    return noise(index).to(x.device, x.dtype, non_blocking=True)
