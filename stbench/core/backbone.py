"""The Backbone interface: a denoiser with readable block outputs.

Shape legend, used everywhere: B batch, C latent channels, H W latent size, N image tokens, D width, K
classes. Time t is in [0,1], t=0 is data and t=1 is noise, float64. Labels are 0..K-1 and K is the null
label. Block indices are 0-based in executed order. The features of block k are the residual stream right
after it, image tokens only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.core.flops import forward_flops

Features = dict[int, Tensor]
"""0-based block index -> image tokens (B,N,D)."""


Weights = Literal["raw", "ema"]


@dataclass(frozen=True)
class BackboneInfo:
    """What the rest of the program may know of a network."""

    name: str
    """Registered family name, such as "sit"."""
    size: str
    """Preset name, such as "ti/2" or "b/2"; "custom" for none."""
    depth: int
    """Executed blocks (U-ViT: in + mid + out)."""
    width: int
    tokens: int
    """Image tokens N, prefix tokens not counted."""
    patch: int
    channels: int
    """Latent channels C of the input."""
    input_size: int
    """Latent height = width."""
    classes: int
    """K; also the null label."""
    null_label: bool = True
    """Whether it takes the null label; without one it needs label_drop=0 and has no guidance."""

    def block(self, option: str, index: int) -> int:
        """`index` if this network has such a block; else a UserError that names the option."""
        if not 0 <= index < self.depth:
            raise UserError(
                f"{option}={index} is out of range: {self.name}-{self.size} has blocks 0..{self.depth - 1}; "
                f"try --set {option}={self.depth - 1}"
            )
        return index


class Backbone(nn.Module, ABC):
    """A denoiser: noisy latent in, prediction out, with readable block outputs.

    A pure function of (x, t, y): labels are dropped by the engine, never here. Subclasses implement
    `forward_intermediates` alone and are built as `cls(channels=, input_size=, classes=, out_channels=,
    size=, **options)`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Size name -> constructor options."""
    objective: ClassVar[str] = "linear"
    """The objective it was published with (a preset may name another under "objective")."""

    info: BackboneInfo
    time_scale: float = 1.0
    """What t in [0,1] is multiplied by before it is embedded."""

    @abstractmethod
    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        """Predict from x (B,C,H,W), t (B,) in [0,1], y (B,) in 0..K, and read the blocks named in `indices`.

        Returns the prediction (B,C_out,H,W) and the features. With `stop_early` nothing after max(indices)
        runs and the prediction is None.
        """

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The prediction (B,C_out,H,W)."""
        prediction, _ = self.forward_intermediates(x, t, y)
        assert prediction is not None
        return prediction

    def features(self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int]) -> Features:
        """The features of the blocks `indices`; nothing behind the deepest of them runs."""
        return self.forward_intermediates(x, t, y, indices=indices, stop_early=True)[1]

    def flops(self, upto: int | None = None) -> int:
        """Forward FLOPs for one image, of the whole network or of nothing behind block `upto`."""

        def call(net: nn.Module) -> object:
            info = self.info
            x = torch.empty(1, info.channels, info.input_size, info.input_size, device="meta")
            t, y = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.long, device="meta")
            indices = () if upto is None else (upto,)
            return net.forward_intermediates(x, t, y, indices=indices, stop_early=upto is not None)  # type: ignore[operator]

        return forward_flops(self, call, ("backbone", upto))
