"""An objective in one file.

stbench run --plugin examples/my_objective.py --backbone sit --recipe vanilla --objective linear-huber
"""

from __future__ import annotations

from typing import final

from torch import Tensor

from stbench.core.objective import Noised
from stbench.core.ranges import PositiveReal
from stbench.core.registry import OBJECTIVES
from stbench.diffusion import LinearFlow


@final
@OBJECTIVES.register_module(name="linear-huber")
class LinearHuber(LinearFlow):
    """`linear` with the pseudo-Huber loss sqrt(|v - target|^2 + k^2) - k, where k = c sqrt(values).

    Song and Dhariwal, arXiv 2310.14189, section 3.3; for flows Lee et al., arXiv 2405.20320.
    """

    def __init__(self, c: PositiveReal = 0.00054, shift: PositiveReal = 1.0) -> None:
        super().__init__(shift)
        self.c = c

    def loss(self, prediction: Tensor, noised: Noised) -> Tensor:
        """Pseudo-Huber loss of the velocity (B,), float32."""
        error = (prediction.float() - self.velocity_target(noised).float()).flatten(1)
        k = self.c * error.shape[1] ** 0.5
        return (error.square().sum(1) + k**2).sqrt() - k
