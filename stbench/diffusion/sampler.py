"""The Sampler interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from stbench.diffusion.guidance import Denoiser

Noise = Callable[[int], Tensor]
"""Number of the draw -> standard normal (B,C,H,W)."""


class Sampler(ABC):
    """Turns initial noise into latents. A frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    min_steps: ClassVar[int] = 1

    @property
    def stochastic(self) -> bool:
        """Whether it draws noise."""
        return False

    def nfe(self, steps: int) -> int:
        """Network evaluations per image, guidance not counted."""
        return steps

    @abstractmethod
    def run(self, denoiser: Denoiser, x: Tensor, steps: int, noise: Noise | None) -> Tensor:
        """From x (B,C,H,W) float64 at the noisiest time to the sample, float64."""


def draw(noise: Noise | None, index: int, x: Tensor) -> Tensor:
    """The index-th draw, like x (B,C,H,W)."""
    assert noise is not None
    return noise(index).to(x.device, x.dtype, non_blocking=True)
