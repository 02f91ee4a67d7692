"""Building blocks of backbones: embeddings, attention, unpatchify, and facts read from a state dict.

Attribute names are those of the official checkpoints, so that an official state dict loads without renaming.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo, kept_heads
from stbench.core.errors import UserError


def sincos_2d(width: int, grid: int) -> Tensor:
    """Fixed sine-cosine position embedding (grid*grid, width), row-major (DiT).

    The first half of the channels encodes the column, the second half the row; each half is
    [sin(p w_i), cos(p w_i)] with w_i = 10000^(-i/(width/4)), computed in float64. `width` must be a multiple
    of 4.
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = axis[None].expand(grid, grid, -1)
    return torch.cat([columns, columns.transpose(0, 1)], dim=2).reshape(grid * grid, width).float()


def frequencies(half: int, device: torch.device | None = None) -> Tensor:
    """Frequencies f_i = 10000^(-i/half), i < half, float32 (half,), with the same bits on every machine.

    DiT calls torch.exp in float32. Its vectorised kernels differ between processors by one unit in the last
    place, which becomes 6e-5 at t = 999. Here the exponent is rounded to float32 as in DiT, but its
    exponential is computed in float64, by a quadratic around the nearest multiple of ln(2)/128, and rounded
    once (error 0.55 units in the last place). The result equals the published tables bit for bit.
    """
    steps = torch.arange(half, dtype=torch.float32, device=device)
    exponent = (-math.log(10000.0) * steps / half).double()
    spacing = math.log(2.0) / 128
    nearest = torch.round(exponent / spacing)
    rest = exponent - nearest * spacing
    return (torch.exp2(nearest / 128) * (1.0 + rest + rest * rest / 2)).float()


def timestep_sinusoid(t: Tensor, width: int) -> Tensor:
    """Embed times (...) as [cos(t f_i), sin(t f_i)] with f_i = 10000^(-i/(width//2)), float32 (..., width).

    An odd width ends in a zero.

    The product is rounded to float32, as published; cosine and sine are computed in float64 and rounded once.
    """
    angles = (t.float()[..., None] * frequencies(width // 2, t.device)).double()
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1).float(), (0, width % 2))


def scale_time(t: Tensor, scale: float) -> Tensor:
    """Scale t in [0,1] to the network's range, float32.

    The product is computed in float64, so that step n of a discrete process comes out as exactly n.
    """
    return (t.double() * scale).float()


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """Rearrange tokens (B,N,p*p*C), each in (row, column, channel) order, to images (B,C,H,W)."""
    grid = math.isqrt(tokens.shape[1])
    x = tokens.reshape(-1, grid, grid, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, grid * patch, grid * patch)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over (B,heads,N,head width); the only place that selects a kernel.

    With `mask` (B,N,N), a token attends to others only where it is true.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    mask = None if mask is None else mask[:, None]
    # On CPUs with bfloat16 units, the backward pass of torch's kernel is slower than these three operations.
    if v.device.type == "cpu" and v.dtype == torch.bfloat16:
        scores = logits(q, k)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def logits(q: Tensor, k: Tensor) -> Tensor:
    """Attention logits (B,heads,N,N) of queries and keys (B,heads,N,head width)."""
    return (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)


class Attention(nn.Module):
    """Multi-head self-attention on tokens (B,N,D) with fused qkv and an output projection.

    `qk_norm` normalises queries and keys per head (affine, eps 1e-5: timm's old default, which REPA used).
    `float32` computes the attention itself in float32 even under autocast (U-ViT). Raises UserError if
    `heads` does not divide `width`.
    """

    def __init__(
        self, width: int, heads: int, *, qkv_bias: bool = True, qk_norm: bool = False, float32: bool = False
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(
                f"the number of heads must divide the width {width}, got {heads}; "
                f"change it with --set backbone.heads=..."
            )
        self.heads, self.float32 = heads, float32
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, with_logits: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend over tokens (B,N,D), restricted by `mask` (B,N,N).

        Returns tokens (B,N,D), and attention logits (B,heads,N,N) if they are asked for.
        """
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.float32:
            # autocast does not support the meta device, on which FLOPs are counted
            with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
                out = attend(q.float(), k.float(), v.float(), mask).to(v.dtype)
        else:
            out = attend(q, k, v, mask)
        found = logits(q, k) if with_logits else None
        return self.proj(out.transpose(1, 2).reshape(b, n, d)), found


class TimeEmbed(nn.Module):
    """Time embedding: 256 sinusoid channels, then Linear-SiLU-Linear."""

    FREQUENCIES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """Embed times (B,) or (B,N), already in the network's range, as (B,D) or (B,N,D)."""
        return self.mlp(timestep_sinusoid(t, self.FREQUENCIES))


class LabelEmbed(nn.Module):
    """Label embedding with K+1 rows, the last for the null label; it never drops labels, the engine does."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels (B,) in 0..K as (B,D)."""
        return self.embedding_table(y)


def make_info(
    name: str,
    size: str,
    *,
    channels: int,
    input_size: int,
    classes: int,
    patch: int,
    width: int,
    depth: int,
) -> BackboneInfo:
    """Describe a network on square latents. Raises UserError if `patch` does not divide `input_size`."""
    if input_size % patch:
        raise UserError(
            f"the patch size must divide the latent size {input_size}, got {patch}; "
            f"change it with --set backbone.patch=..."
        )
    return BackboneInfo(
        name=name,
        size=size,
        depth=depth,
        width=width,
        tokens=(input_size // patch) ** 2,
        patch=patch,
        channels=channels,
        input_size=input_size,
        classes=classes,
    )


def with_prefix(network: nn.Module, prefix: Tensor, tokens: Tensor, **others: object) -> Tensor:
    """Put prefix tokens before tokens (B,N,D): vectors (B,m,P), embedded by the network's head "prefix".

    Raises ValueError if one of `others`, further optional inputs, is given as well.
    """
    if any(others.values()):
        raise ValueError(f"prefix tokens cannot be combined with {', '.join(k for k in others if others[k])}")
    return torch.cat([kept_heads(network)["prefix"](prefix), tokens], dim=1)


def blocks_to_run(info: BackboneInfo, indices: Sequence[int], stop_early: bool) -> int:
    """Return how many blocks a forward pass must run. Raises ValueError for a block out of range."""
    for k in indices:
        if not 0 <= k < info.depth:
            raise ValueError(
                f"block {k} is out of range: {info.name}-{info.size} has blocks 0..{info.depth - 1}"
            )
    return max(indices, default=-1) + 1 if stop_early else info.depth


def grid_side(tokens: int) -> int:
    """Return the side length of a square grid of `tokens`. Raises UserError if it is not square."""
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(
            f"expected position embeddings of a square latent, found {tokens} positions; use square images"
        )
    return side


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """Count the blocks in a state dict with keys "<prefix>.<number>...."."""
    return len({key.split(".")[1] for key in state if key.startswith(f"{prefix}.")})


def match_preset(
    presets: Mapping[str, Mapping[str, Any]], *, patch: int, width: int, depth: int, heads: int | None
) -> tuple[str, int]:
    """Return the preset name ("custom" if none matches) and the number of heads of a network.

    The shapes of a state dict do not determine the number of heads. If `heads` is None it is that of the
    preset with this width; raises UserError if there is none.
    """
    heads_of_width = {preset["width"]: preset["heads"] for preset in presets.values()}
    if heads is None and width not in heads_of_width:
        raise UserError(
            f"the number of heads cannot be read from weights of width {width}, which no preset has; "
            f"set it with --heads 6, or in a run with --set backbone.heads=6"
        )
    found = dict(patch=patch, width=width, depth=depth)
    found["heads"] = heads_of_width[width] if heads is None else heads
    matching = (name for name, preset in presets.items() if all(preset[k] == v for k, v in found.items()))
    return next(matching, "custom"), found["heads"]
