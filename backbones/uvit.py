"""U-ViT: All are Worth Words (arXiv:2209.12152; baofff/U-ViT).

A plain ViT in which label and time are tokens, with long skip connections from the first to the last blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from stbench.core.backbone import Backbone, Features, Output, Route
from stbench.core.errors import UserError
from stbench.core.ranges import Depth, Pixels, PositiveReal, Width
from stbench.core.registry import BACKBONES
from stbench.models.layers import (
    Attention,
    blocks_to_run,
    count_blocks,
    grid_side,
    make_info,
    match_preset,
    scale_time,
    timestep_sinusoid,
    unpatchify,
    with_prefix,
)
from stbench.models.routing import Routing


class UViTBlock(nn.Module):
    """Pre-norm transformer block; with `skip`, it first merges in the output of an earlier block."""

    def __init__(self, width: int, heads: int, skip: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, qkv_bias=False, float32=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(in_features=width, hidden_features=4 * width, act_layer=nn.GELU)
        self.skip_linear = nn.Linear(2 * width, width) if skip else None

    def forward(
        self, x: Tensor, skip: Tensor | None = None, mask: Tensor | None = None, *, with_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Update tokens x (B,N,D), merging `skip` (B,N,D) if given.

        Returns the tokens, and attention logits (B,heads,N,N) if they are asked for. `mask` (B,N,N) restricts
        the attention.
        """
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        attended, logits = self.attn(self.norm1(x), mask, with_logits=with_logits)
        x = x + attended
        return x + self.mlp(self.norm2(x)), logits


class OutputHead(nn.Module):
    """U-ViT's output layers for the tokens of a hidden block: norm, linear, and its convolution if any."""

    def __init__(self, width: int, patch: int, channels: int, conv: bool) -> None:
        super().__init__()
        self.patch, self.channels = patch, channels
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, patch * patch * channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if conv else nn.Identity()
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, c: Tensor | None) -> Tensor:
        """Map image tokens x (B,N,D) to a prediction (B,C_out,H,W); there is no condition."""
        return self.conv(unpatchify(self.linear(self.norm(x)), self.patch, self.channels))


_S = dict(width=512, depth=13, heads=8, conv=True)
_M = dict(width=768, depth=17, heads=12, conv=True)
_L = dict(width=1024, depth=21, heads=16, conv=True)
_TI = dict(width=96, depth=7, heads=3, conv=True, objective="vp-discrete", time_scale=1000.0)
_H = dict(width=1152, depth=29, heads=16, conv=False, objective="vp-discrete", time_scale=1000.0)


@BACKBONES.register_module(name="uvit")
class UViT(Backbone):
    """ViT with long skip connections (arXiv:2209.12152).

    `depth` counts executed blocks and is odd: (depth-1)/2 in-blocks, one mid-block, (depth-1)/2 out-blocks.
    `label_rows` is the size of the label table: K+1 by default, K for networks trained without a null label,
    0 for unconditional ones. `conv` adds the final 3x3 convolution.
    """

    objective: ClassVar[str] = "vp-continuous"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Pixels: CIFAR-10, CelebA-64, and two sizes on ImageNet-64
        "s/2": dict(patch=2, label_rows=0, **_S),
        "s/4": dict(patch=4, label_rows=0, **_S),
        "m/4": dict(patch=4, label_rows=1000, **_M),
        "l/4-pixel": dict(patch=4, label_rows=1000, **_L),
        # Latents of ImageNet-256 (patch 2) and ImageNet-512 (patch 4)
        "l/2": dict(patch=2, **_L),
        "l/4": dict(patch=4, **_L),
        "h/2": dict(patch=2, **_H),
        "h/4": dict(patch=4, **_H),
        # Not published
        "s/2-latent": dict(patch=2, **_S),
        "m/2-latent": dict(patch=2, **_M),
        "ti/2": dict(patch=2, init_std=0.057, **_TI),
    }
    """Size name -> constructor options; those in `derived` are not published."""
    derived: ClassVar[frozenset[str]] = frozenset({"s/2-latent", "m/2-latent", "ti/2"})
    """Sizes that were not published: two published widths on 256x256 latents, and "ti/2" for the digits."""

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
        conv: bool = True,
        mlp_time_embed: bool = False,
        label_rows: Annotated[int, Field(ge=0, le=10_000_000)] | None = None,
        time_scale: PositiveReal = 999.0,
        init_std: PositiveReal = 0.02,
    ) -> None:
        super().__init__()
        if depth % 2 == 0:
            raise UserError(
                f"backbone.depth must be odd (in-blocks, one mid-block, out-blocks), got {depth}; "
                f"try --set backbone.depth={depth + 1}"
            )
        rows = classes + 1 if label_rows is None else label_rows
        if 0 < rows < classes:
            raise UserError(f"backbone.label_rows must be 0 or at least {classes}, got {rows}; leave it out")
        info = make_info(
            "uvit",
            size,
            channels=channels,
            input_size=input_size,
            classes=classes,
            patch=patch,
            width=width,
            depth=depth,
        )
        # An unconditional network accepts the null label: it ignores every label.
        self.info = replace(
            info,
            null_label=rows == 0 or rows > classes,
            capabilities=("attention", "route", "prefix"),
            lacks={"token-time": "it has one time token for all image tokens"},
        )
        self.time_scale, self.out_channels = time_scale, out_channels
        self.prefix = 2 if rows else 1
        self.patch_embed = PatchEmbed(input_size, patch, channels, embed_dim=width)
        self.time_embed = (
            nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            if mlp_time_embed
            else nn.Identity()
        )
        self.label_emb = nn.Embedding(rows, width) if rows else None
        self.pos_embed = nn.Parameter(torch.zeros(1, self.prefix + self.info.tokens, width))
        self.in_blocks = nn.ModuleList(UViTBlock(width, heads, skip=False) for _ in range(depth // 2))
        self.mid_block = UViTBlock(width, heads, skip=False)
        self.out_blocks = nn.ModuleList(UViTBlock(width, heads, skip=True) for _ in range(depth // 2))
        self.norm = nn.LayerNorm(width)
        self.decoder_pred = nn.Linear(width, patch * patch * out_channels)
        self.final_layer = nn.Conv2d(out_channels, out_channels, 3, padding=1) if conv else nn.Identity()
        self._initialise(init_std)

    def _initialise(self, std: float) -> None:
        """Initialise as U-ViT: truncated normal for positions (0.02) and linear layers (`std`).

        The label table and the convolutions keep torch's defaults. `std` is 0.02 as published; on ti/2 it is
        0.057, the published ratio of `std` to 1/sqrt(width) at size M.
        """
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Return the tokens that enter the first block, [label, time, patches] (B,2+N,D).

        Without a label table there is no label token, (B,1+N,D).
        """
        time = timestep_sinusoid(scale_time(t, self.time_scale), self.info.width)
        tokens = [self.time_embed(time)[:, None], self.patch_embed(x)]
        if self.label_emb is not None:
            tokens.insert(0, self.label_emb(y)[:, None])
        return torch.cat(tokens, dim=1) + self.pos_embed

    def repeated_blocks(self) -> Sequence[nn.Module]:
        """Return in-blocks, mid-block and out-blocks."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def output_head(self) -> nn.Module:
        """Return new output layers for a hidden block."""
        conv = isinstance(self.final_layer, nn.Conv2d)
        return OutputHead(self.info.width, self.info.patch, self.out_channels, conv)

    def forward_intermediates(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        indices: Sequence[int] = (),
        stop_early: bool = False,
        attention: Sequence[int] = (),
        mask: Tensor | None = None,
        routes: Sequence[Route] = (),
        prefix: Tensor | None = None,
    ) -> Output:
        """See `Backbone.forward_intermediates`. Raises ValueError for a block or route out of range.

        Label and time token are in every route, attend to all tokens and are attended to by all. Logits are
        those between image tokens.
        """
        run = blocks_to_run(self.info, indices, stop_early)
        routing = self._routing(routes)
        tokens, m = self.embed(x, t, y), 0
        if prefix is not None:
            others = dict(attention=attention, mask=mask is not None, routes=routes)
            tokens, m = with_prefix(self, prefix, tokens, **others), prefix.shape[1]
        p = m + self.prefix
        if mask is not None:
            mask = F.pad(mask, (p, 0, p, 0), value=True)
        skips: list[Tensor] = []
        features: Features = {}
        before: dict[int, Tensor] = {}
        found: dict[int, Tensor] = {}
        kept = routing.kept(indices)
        for k, block in enumerate(self.repeated_blocks()[:run]):
            tokens = routing.enter(k, tokens)
            skip = skips.pop() if k > len(self.in_blocks) else None  # of the last in-block not yet used
            tokens, logits = block(tokens, skip, mask, with_logits=k in attention)
            if k < len(self.in_blocks):
                skips.append(tokens)
            if k in indices:
                features[k] = tokens[:, p:]
                before |= {k: tokens[:, :m]} if m else {}
            if logits is not None:
                found[k] = logits[:, :, p:, p:]
            tokens = routing.leave(k, tokens)
        if stop_early:
            return Output(None, features, None, found, kept, before)
        tokens = self.norm(tokens)
        values = self.decoder_pred(tokens)[:, p:]
        prediction = self.final_layer(unpatchify(values, self.info.patch, self.out_channels))
        return Output(prediction, features, None, found, kept, before, tokens[:, :m] if m else None)

    def _routing(self, routes: Sequence[Route]) -> Routing:
        """Return the routes of a forward pass; UserError for one that a skip connection enters or leaves."""
        routing, depth = Routing(self.info, routes, before=self.prefix), self.info.depth
        for route in routes:
            if route.start + route.end != depth - 1:
                raise UserError(
                    f"a route through uvit must contain both ends of each long skip connection, got blocks "
                    f"{route.start}..{route.end}; use {route.start}..{depth - 1 - route.start}"
                )
        return routing

    @classmethod
    def infer(cls, state: Mapping[str, Tensor], heads: int | None = None) -> dict[str, Any]:
        """Read constructor options from an official state dict.

        The last row of the label table is taken as the null label, unless the matching preset has none.
        `time_scale` cannot be read from weights; it is returned only if a preset matches. Raises KeyError for
        a state dict of another family, UserError if `heads` is needed.
        """
        # Shapes of the weights
        width, channels, patch, _ = state["patch_embed.proj.weight"].shape
        depth = 2 * count_blocks(state, "in_blocks") + 1
        table = state.get("label_emb.weight")
        rows = 0 if table is None else table.shape[0]
        conv = "final_layer.weight" in state
        tokens = state["pos_embed"].shape[1] - (2 if rows else 1)
        # The preset: any preset of this width gives the heads, but only one for this data gives the name
        _, heads = match_preset(cls.presets, patch=patch, width=width, depth=depth, heads=heads)
        fitting = {name: p for name, p in cls.presets.items() if _fits(p, rows, channels, conv)}
        size, _ = match_preset(fitting, patch=patch, width=width, depth=depth, heads=heads)
        scale = {"time_scale": cls.presets[size].get("time_scale", 999.0)} if size in cls.presets else {}
        without_null_label = rows == cls.presets.get(size, {}).get("label_rows")
        return scale | dict(
            channels=channels,
            input_size=patch * grid_side(tokens),
            classes=rows if without_null_label else max(rows - 1, 0),
            out_channels=state["decoder_pred.weight"].shape[0] // patch**2,
            size=size,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            conv=conv,
            mlp_time_embed="time_embed.0.weight" in state,
            label_rows=rows,
        )


def _fits(preset: Mapping[str, Any], rows: int, channels: int, conv: bool) -> bool:
    """Whether a preset agrees in label table, convolution, and data: pixels (3 channels) or latents."""
    pixels = "label_rows" in preset
    return preset["conv"] == conv and (preset["label_rows"] == rows and channels == 3 if pixels else rows > 0)
