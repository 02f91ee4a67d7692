"""DiT: Scalable Diffusion Models with Transformers (arXiv:2212.09748; facebookresearch/DiT).

Also defines `AdaLNTransformer`, the trunk of adaLN-Zero blocks that DiT shares with SiT (backbones/sit.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from timm.layers.activations import GELUTanh
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo, Features, Output, Route
from stbench.core.ranges import Depth, Pixels, PositiveReal, Width
from stbench.core.registry import BACKBONES
from stbench.models.layers import (
    Attention,
    LabelEmbed,
    TimeEmbed,
    blocks_to_run,
    count_blocks,
    grid_side,
    make_info,
    match_preset,
    scale_time,
    sincos_2d,
    unpatchify,
    with_prefix,
)
from stbench.models.routing import Routing


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift tokens x (B,N,D) by vectors (B,1,D), or (B,N,D) with one vector per token."""
    return x * (1 + scale) + shift


def modulations(linear: nn.Module, c: Tensor, count: int) -> tuple[Tensor, ...]:
    """Compute `count` vectors from the condition c (B,D) or (B,N,D): (B,1,D) or (B,N,D) each."""
    values = linear(c)
    return (values if values.ndim == 3 else values[:, None]).chunk(count, dim=-1)


class AdaLNBlock(nn.Module):
    """Transformer block whose norms and gates depend on the condition (adaLN-Zero; DiT, section 3.2)."""

    def __init__(self, width: int, heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm=qk_norm)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(in_features=width, hidden_features=4 * width, act_layer=GELUTanh)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(
        self, x: Tensor, c: Tensor, mask: Tensor | None = None, *, with_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Update tokens x (B,N,D) under condition c (B,D) or (B,N,D).

        Returns the tokens, and attention logits (B,heads,N,N) if they are asked for. `mask` (B,N,N) restricts
        the attention.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations(self.adaLN_modulation, c, 6)
        attended, logits = self.attn(modulate(self.norm1(x), shift1, scale1), mask, with_logits=with_logits)
        x = x + gate1 * attended
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2)), logits


class FinalLayer(nn.Module):
    """Modulated norm and projection of each token to p*p*C_out values."""

    def __init__(self, width: int, patch: int, channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def modulated(self, x: Tensor, c: Tensor) -> Tensor:
        """Normalise and modulate tokens x (B,N,D) under condition c (B,D) or (B,N,D)."""
        shift, scale = modulations(self.adaLN_modulation, c, 2)
        return modulate(self.norm_final(x), shift, scale)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens x (B,N,D) under condition c (B,D) or (B,N,D) to (B,N,p*p*C_out)."""
        return self.linear(self.modulated(x, c))


class OutputHead(FinalLayer):
    """A final layer for the tokens of a hidden block, with zero weights (Internal Guidance)."""

    def __init__(self, info: BackboneInfo, channels: int) -> None:
        super().__init__(info.width, info.patch, channels)
        self.patch, self.channels = info.patch, channels
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens x (B,N,D) under condition c (B,D) or (B,N,D) to a prediction (B,C_out,H,W)."""
        return unpatchify(super().forward(x, c), self.patch, self.channels)


def _adaln_presets() -> dict[str, dict[str, Any]]:
    """The published sizes S, B, L, XL at patch sizes 2, 4 and 8, and our "ti/2" for the embedded digits."""
    sizes = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
    presets: dict[str, dict[str, Any]] = {
        f"{name}/{patch}": dict(patch=patch, width=width, depth=depth, heads=heads)
        for name, (width, depth, heads) in sizes.items()
        for patch in (2, 4, 8)
    }
    presets["ti/2"] = dict(patch=2, width=96, depth=6, heads=3, qk_norm=True)
    return presets


class AdaLNTransformer(Backbone):
    """Trunk of DiT and SiT: patch embedding, fixed positions, adaLN-Zero blocks, final layer.

    Abstract; subclasses register it under a name. The final layer computes `rows` channels, of which the
    first `out_channels` are returned.
    """

    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = _adaln_presets()
    """Published sizes, and "ti/2" for the embedded digits, which is not published."""

    def __init__(
        self,
        info: BackboneInfo,
        *,
        heads: int,
        out_channels: int,
        rows: int,
        qk_norm: bool,
        time_scale: float,
    ) -> None:
        super().__init__()
        self.info = replace(info, capabilities=("token-time", "attention", "route", "prefix"))
        self.time_scale = time_scale
        self.out_channels = out_channels
        self.rows = rows
        self.x_embedder = PatchEmbed(info.input_size, info.patch, info.channels, embed_dim=info.width)
        self.t_embedder = TimeEmbed(info.width)
        self.y_embedder = LabelEmbed(info.classes, info.width)
        grid = info.input_size // info.patch
        self.pos_embed = nn.Parameter(sincos_2d(info.width, grid)[None], requires_grad=False)
        self.blocks = nn.ModuleList(AdaLNBlock(info.width, heads, qk_norm) for _ in range(info.depth))
        self.final_layer = FinalLayer(info.width, info.patch, rows)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise as DiT: Xavier, N(0, 0.02) for embeddings, zero for modulations and the output layer.

        The order of the calls matters: it determines which random numbers each parameter receives.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        patches = self.x_embedder.proj
        nn.init.xavier_uniform_(patches.weight.view(self.info.width, -1))
        if patches.bias is not None:
            nn.init.zeros_(patches.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for weight in (p for p in self.t_embedder.parameters() if p.ndim == 2):
            nn.init.normal_(weight, std=0.02)
        modulations = [block.adaLN_modulation[1] for block in [*self.blocks, self.final_layer]]
        for linear in [*modulations, self.final_layer.linear]:
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def embed(self, x: Tensor) -> Tensor:
        """Embed latents x (B,C,H,W) as the tokens (B,N,D) that enter the first block."""
        # The patch embedding is a transposed view. With it, torch.compile gave NaN in bf16 on a CPU
        # (torch 2.14), and a step that is not compiled took longer.
        return (self.x_embedder(x) + self.pos_embed).contiguous()

    def output_head(self) -> nn.Module:
        """Return a new final layer for a hidden block, with zero weights."""
        return OutputHead(self.info, self.out_channels)

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
        """See `Backbone.forward_intermediates`. Raises ValueError for a block or route out of range."""
        run = blocks_to_run(self.info, indices, stop_early)
        routing = Routing(self.info, routes)
        tokens, label, m = self.embed(x), self.y_embedder(y), 0
        if prefix is not None:
            others = dict(attention=attention, mask=mask is not None, routes=routes, times=t.ndim == 2)
            tokens, m = with_prefix(self, prefix, tokens, **others), prefix.shape[1]
        time = self.t_embedder(scale_time(t, self.time_scale))
        condition = time + (label if t.ndim == 1 else label[:, None])
        features: Features = {}
        before: dict[int, Tensor] = {}
        found: dict[int, Tensor] = {}
        for k, block in enumerate(self.blocks[:run]):
            tokens = routing.enter(k, tokens)
            tokens, logits = block(tokens, routing.of_tokens(condition), mask, with_logits=k in attention)
            if k in indices:
                features[k] = tokens[:, m:] if m else tokens
                before |= {k: tokens[:, :m]} if m else {}
            if logits is not None:
                found[k] = logits
            tokens = routing.leave(k, tokens)
        if stop_early:
            return Output(None, features, condition, found, routing.kept(indices), before)
        if m:
            tokens = self.final_layer.modulated(tokens, condition)
            out, last_prefix = self.final_layer.linear(tokens[:, m:]), tokens[:, :m]
        else:
            out, last_prefix = self.final_layer(tokens, condition), None
        prediction = unpatchify(out, self.info.patch, self.rows)[:, : self.out_channels]
        return Output(prediction, features, condition, found, routing.kept(indices), before, last_prefix)

    @classmethod
    def infer_trunk(cls, state: Mapping[str, Tensor], heads: int | None) -> tuple[dict[str, Any], int]:
        """Read constructor options, and the channels of the final layer, from an official state dict.

        The number of heads can be read if there is a qk_norm, else it is `heads` or that of the preset.
        Raises KeyError for a state dict of another family, UserError if `heads` is needed.
        """
        width, channels, patch, _ = state["x_embedder.proj.weight"].shape
        q_norm = state.get("blocks.0.attn.q_norm.weight")
        if q_norm is not None:
            heads = width // q_norm.shape[0]
        depth = count_blocks(state, "blocks")
        size, heads = match_preset(cls.presets, patch=patch, width=width, depth=depth, heads=heads)
        options = dict(
            channels=channels,
            input_size=patch * grid_side(state["pos_embed"].shape[1]),
            classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
            size=size,
            patch=patch,
            width=width,
            depth=depth,
            heads=heads,
            qk_norm=q_norm is not None,
        )
        return options, state["final_layer.linear.weight"].shape[0] // patch**2


@BACKBONES.register_module(name="dit")
class DiT(AdaLNTransformer):
    """Diffusion transformer (arXiv:2212.09748).

    Embeds the step 0..999, and predicts 2C channels if the variance is learned (`out_channels` = 2C).
    """

    objective: ClassVar[str] = "iddpm"

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
        time_scale: PositiveReal = 999.0,
    ) -> None:
        info = make_info(
            "dit",
            size,
            channels=channels,
            input_size=input_size,
            classes=classes,
            patch=patch,
            width=width,
            depth=depth,
        )
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
        """Read constructor options from an official state dict; see `AdaLNTransformer.infer_trunk`."""
        options, rows = cls.infer_trunk(state, heads)
        return options | {"out_channels": rows}
