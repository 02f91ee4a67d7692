"""SiT: Scalable Interpolant Transformers (arXiv:2401.08740; willisma/SiT).

The architecture is DiT's, imported from backbones/dit.py. Time runs as in REPA: t=0 is data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from stbench.backbones.dit import AdaLNTransformer
from stbench.core.backbone import Output
from stbench.core.ranges import Depth, Pixels, PositiveReal, Width
from stbench.core.registry import BACKBONES
from stbench.models.layers import make_info


@BACKBONES.register_module(name="sit")
class SiT(AdaLNTransformer):
    """Flow transformer (arXiv:2401.08740): DiT's trunk with t in [0,1] embedded unscaled.

    `learn_sigma` computes 2C channels and drops the second half, as upstream's checkpoints do.
    `noise_at_zero` is for weights trained with t=0 for noise, which includes upstream's: the trunk receives
    1-t, and the sign of its velocity is flipped.
    """

    objective: ClassVar[str] = "linear"

    def __init__(
        self,
        *,
        channels: int,
        input_size: int,
        classes: int,
        out_channels: int,
        size: str = "custom",
        patch: Pixels,
        width: Width,
        depth: Depth,
        heads: Width,
        qk_norm: bool = False,
        learn_sigma: bool = False,
        noise_at_zero: bool = False,
        time_scale: PositiveReal = 1.0,
    ) -> None:
        info = make_info(
            "sit",
            size,
            channels=channels,
            input_size=input_size,
            classes=classes,
            patch=patch,
            width=width,
            depth=depth,
        )
        rows = 2 * out_channels if learn_sigma else out_channels
        super().__init__(
            info, heads=heads, out_channels=out_channels, rows=rows, qk_norm=qk_norm, time_scale=time_scale
        )
        self.noise_at_zero = noise_at_zero

    def forward_intermediates(self, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        """See `Backbone.forward_intermediates`; t=0 is data, also with `noise_at_zero`."""
        if not self.noise_at_zero:
            return super().forward_intermediates(x, t, y, **inputs)
        found = super().forward_intermediates(x, 1.0 - t.double(), y, **inputs)
        return found if found.prediction is None else replace(found, prediction=-found.prediction)

    @classmethod
    def infer(cls, state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
        """Read constructor options from an official state dict; see `AdaLNTransformer.infer_trunk`."""
        options, rows = cls.infer_trunk(state, heads)
        learn_sigma = rows == 2 * options["channels"]
        return options | {"out_channels": rows // 2 if learn_sigma else rows, "learn_sigma": learn_sigma}
