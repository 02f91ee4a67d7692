"""The Backbone interface: a denoising network whose block outputs can be read.

Notation used throughout the project: B batch, C latent channels, H W latent height and width, N image tokens,
D width, K classes. Time t is in [0,1] and float64; t=0 is data and t=1 is noise. Labels are 0..K-1, and K is
the null label. Block indices are 0-based in executed order. The features of block k are the residual stream
right after that block, image tokens only.
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
"""Which weights of a trained network to load: the last iterate or the exponential moving average."""


@dataclass(frozen=True)
class BackboneInfo:
    """The facts about a network that the rest of the program may use."""

    name: str
    """Registered family name, such as "sit"."""
    size: str
    """Preset name, such as "ti/2" or "b/2"; "custom" if it is not a preset."""
    depth: int
    """Number of executed blocks (U-ViT: in + mid + out)."""
    width: int
    """Token width D."""
    tokens: int
    """Number of image tokens N, without prefix tokens."""
    patch: int
    """Patch side length, in latent pixels."""
    channels: int
    """Latent channels C of the input."""
    input_size: int
    """Latent height, equal to the width."""
    classes: int
    """Number of classes K; also the index of the null label."""
    null_label: bool = True
    """Whether the network accepts the null label. If not, it needs label_drop=0 and cannot be guided."""
    preset: str = ""
    """Preset that the options of a "custom" size start from; defaults of recipes may depend on it."""

    def block(self, option: str, index: int) -> int:
        """Return `index` if the network has that block.

        Raises UserError naming `option` if it is out of range.
        """
        if not 0 <= index < self.depth:
            raise UserError(
                f"{option}={index} is out of range: {self.name}-{self.size} has blocks 0..{self.depth - 1}; "
                f"try --set {option}={self.depth - 1}"
            )
        return index


class Backbone(nn.Module, ABC):
    """A denoiser: noisy latent in, prediction out, with readable block outputs.

    A pure function of (x, t, y): it never drops labels, because the engine does that once per step.
    Subclasses implement `forward_intermediates` and set `info`. They are constructed as
    `cls(channels=, input_size=, classes=, out_channels=, size=, **options)`.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Size name -> constructor options."""
    objective: ClassVar[str] = "linear"
    """Registered name of the objective it was published with; a preset may override it under "objective"."""

    info: BackboneInfo
    time_scale: float = 1.0
    """Factor applied to t in [0,1] before it is embedded."""

    @abstractmethod
    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        """Predict from x (B,C,H,W), t (B,) in [0,1] and y (B,) in 0..K, and return block features.

        Returns the prediction (B,C_out,H,W) and the features of the blocks in `indices`. With `stop_early`,
        no block after max(indices) runs and the prediction is None.
        """

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the prediction (B,C_out,H,W) for x (B,C,H,W), t (B,) and y (B,)."""
        prediction, _ = self.forward_intermediates(x, t, y)
        assert prediction is not None
        return prediction

    def features(self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int]) -> Features:
        """Return the features of the blocks `indices`; stops after the deepest requested block."""
        return self.forward_intermediates(x, t, y, indices=indices, stop_early=True)[1]

    def flops(self, upto: int | None = None) -> int:
        """Forward FLOPs for one image: of the whole network, or up to and including block `upto`."""

        def forward_one_image(network: nn.Module) -> object:
            info = self.info
            x = torch.empty(1, info.channels, info.input_size, info.input_size, device="meta")
            t, y = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.long, device="meta")
            indices = () if upto is None else (upto,)
            return network.forward_intermediates(  # type: ignore[operator]
                x, t, y, indices=indices, stop_early=upto is not None
            )

        return forward_flops(self, forward_one_image, ("backbone", upto))
