"""A backbone in one file: stbench run --plugin examples/my_backbone.py --backbone mixer --recipe vanilla."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.layers.mlp import Mlp
from torch import Tensor, nn

from stbench.core.backbone import Backbone, Features
from stbench.core.registry import BACKBONES
from stbench.models import layers


class Block(nn.Module):
    """Mixes tokens, then channels."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.mix_tokens = nn.LayerNorm(width), Mlp(tokens, 4 * tokens)
        self.norm2, self.mix_channels = nn.LayerNorm(width), Mlp(width, 4 * width)

    def forward(self, h: Tensor) -> Tensor:
        """Update tokens (B,N,D)."""
        h = h + self.mix_tokens(self.norm1(h).transpose(1, 2)).transpose(1, 2)
        return h + self.mix_channels(self.norm2(h))


@BACKBONES.register_module(name="mixer")
class Mixer(Backbone):
    """MLP-Mixer (arXiv:2105.01601) with time and label added to every token."""

    presets: ClassVar[dict[str, Any]] = {"ti/2": dict(patch=2, width=96, depth=6)}

    def __init__(
        self,
        *,
        channels: int,
        input_size: int,
        classes: int,
        out_channels: int,
        size: str,
        patch: int,
        width: int,
        depth: int,
    ) -> None:
        super().__init__()
        data = dict(channels=channels, input_size=input_size, classes=classes)
        self.info = layers.make_info("mixer", size, **data, patch=patch, width=width, depth=depth)
        self.patch, self.out_channels = nn.Conv2d(channels, width, patch, patch), out_channels
        self.time, self.label = layers.TimeEmbed(width), layers.LabelEmbed(classes, width)
        self.blocks = nn.ModuleList(Block(self.info.tokens, width) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, patch * patch * out_channels))

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        """See `Backbone.forward_intermediates`."""
        h = self.patch(x).flatten(2).transpose(1, 2) + (self.time(t) + self.label(y))[:, None]
        features: Features = {}
        for k in range(layers.blocks_to_run(self.info, indices, stop_early)):
            h = self.blocks[k](h)
            if k in indices:
                features[k] = h
        if stop_early:
            return None, features
        return layers.unpatchify(self.out(h), self.info.patch, self.out_channels), features
