"""DiT: Scalable Diffusion Models with Transformers (arXiv:2212.09748; facebookresearch/DiT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from stbench.adaln import AdaLNTransformer
from stbench.layers import make_info
from stbench.registry import BACKBONES


@BACKBONES.register_module(name="dit")
class DiT(AdaLNTransformer):
    """Diffusion transformer; embeds the step 0..999, and predicts 2C channels where variance is learned."""

    objective: ClassVar[str] = "iddpm"

    def __init__(
        self,
        *,
        channels: int,
        input_size: int,
        classes: int,
        out_channels: int,
        size: str = "custom",
        patch: int,
        width: int,
        depth: int,
        heads: int,
        qk_norm: bool = False,
        time_scale: float = 999.0,
    ) -> None:
        info = make_info("dit", size, channels, input_size, classes, patch, width, depth)
        super().__init__(
            info,
            heads=heads,
            out_channels=out_channels,
            rows=out_channels,
            qk_norm=qk_norm,
            time_scale=time_scale,
        )

    @classmethod
    def infer(cls, state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
        """Constructor options from an official state dict; see `AdaLNTransformer.infer_trunk`."""
        options, rows = cls.infer_trunk(state, heads)
        return options | {"out_channels": rows}
