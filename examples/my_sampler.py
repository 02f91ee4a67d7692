"""A sampler in one file.

stbench run --plugin examples/my_sampler.py --backbone sit --recipe vanilla --set eval.sampler=euler-shift
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import final

from torch import Tensor

from stbench.core.objective import Objective
from stbench.core.registry import SAMPLERS
from stbench.diffusion.guidance import Denoiser
from stbench.diffusion.sampler import Noise, Sampler


@final
@SAMPLERS.register_module(name="euler-shift")
@dataclass(frozen=True)
class EulerShift(Sampler):
    """Euler's method with more steps where there is noise: t = s u / (1 + (s-1) u) for uniform u.

    The timestep shift of Stable Diffusion 3 (arXiv 2403.03206, eq. 23).
    """

    shift: float = 3.0
    name = "euler-shift"

    def inverts(self, objective: Objective) -> bool:
        """Flows, which Euler's method inverts."""
        return "euler" in objective.samplers

    def run(self, denoiser: Denoiser, x: Tensor, *, steps: int, noise: Noise | None) -> Tensor:
        """Integrate x += v dt over `steps` intervals from 1 to 0; x is float64."""
        uniform = [1.0 - i / steps for i in range(steps + 1)]
        for t, s in pairwise(self.shift * u / (1.0 + (self.shift - 1.0) * u) for u in uniform):
            x = x + (s - t) * denoiser.velocity(x, t)
        return x
