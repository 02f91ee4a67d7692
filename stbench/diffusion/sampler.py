"""The Sampler interface: from initial noise to latents, given a denoiser."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from stbench.diffusion.guidance import Denoiser

Noise = Callable[[int], Tensor]
"""Index of the draw -> standard normal noise (B,C,H,W)."""


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
