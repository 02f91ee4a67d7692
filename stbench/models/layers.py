"""The parts of a backbone: embeddings, attention, un-patchify, and what names a network.

Attribute names are those of the official checkpoints, so that an official state dict loads as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError


def sincos_2d(width: int, grid: int) -> Tensor:
    """Fixed position embedding (grid*grid, width), row-major: first half columns, second half rows.

    DiT's: each half is [sin(p w_i), cos(p w_i)] with w_i = 10000^(-i/(width/4)), computed in float64. `width`
    must be a multiple of 4.
    """
    omega = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = axis[None].expand(grid, grid, -1)
    return torch.cat([columns, columns.transpose(0, 1)], dim=2).reshape(grid * grid, width).float()


def frequencies(half: int, device: torch.device | None = None) -> Tensor:
    """f_i = 10000^(-i/half), i < half, float32 (half,): the same bits on every machine.

    DiT's code takes torch.exp in float32, whose vector kernels differ by a unit in the last place between
    processors; a time of 999 makes 6e-5 of it. The exponent keeps its float32 rounding. Its exponential is
    the usual table method, a quadratic about the nearest multiple of ln(2)/128 (error 0.55 units in the last
    place), in float64 and rounded once: the bits of the golden tables.
    """
    steps = torch.arange(half, dtype=torch.float32, device=device)
    exponent = (-math.log(10000.0) * steps / half).double()
    spacing = math.log(2.0) / 128
    nearest = torch.round(exponent / spacing)
    rest = exponent - nearest * spacing
    return (torch.exp2(nearest / 128) * (1.0 + rest + rest * rest / 2)).float()


def timestep_sinusoid(t: Tensor, width: int) -> Tensor:
    """Embed times (B,) as [cos(t f_i), sin(t f_i)], f_i = 10000^(-i/(width/2)), float32 (B, width).

    The product is rounded to float32, as published; cosine and sine are taken in float64 and rounded once.
    """
    angles = (t.float()[:, None] * frequencies(width // 2, t.device)).double()
    return torch.cat([angles.cos(), angles.sin()], dim=1).float()


def scale_time(t: Tensor, scale: float) -> Tensor:
    """t in [0,1] on the network's own scale, float32; float64 in between keeps whole steps exact."""
    return (t.double() * scale).float()


def unpatchify(tokens: Tensor, patch: int, channels: int) -> Tensor:
    """Tokens (B,N,p*p*C), laid out (row, column, channel), to an image (B,C,H,W)."""
    grid = math.isqrt(tokens.shape[1])
    x = tokens.reshape(-1, grid, grid, patch, patch, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, channels, grid * patch, grid * patch)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention over (B,heads,N,head width); the one place that chooses the kernel."""
    q, k = q.to(v.dtype), k.to(v.dtype)
    # Where a CPU has bfloat16 units, the backward of torch's kernel costs more than these three plain calls.
    if v.device.type == "cpu" and v.dtype == torch.bfloat16:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention on (B,N,D) with a fused qkv and an output projection.

    `qk_norm` normalises queries and keys per head (affine, eps 1e-5: timm's old default, as REPA used it).
    `float32` computes the attention itself in float32 even under autocast (U-ViT). Raises UserError if
    `heads` does not divide `width`.
    """

    def __init__(
        self, width: int, heads: int, *, qkv_bias: bool = True, qk_norm: bool = False, float32: bool = False
    ) -> None:
        super().__init__()
        if width % heads:
            raise UserError(f"expected heads that divide the width {width}, found {heads}; choose another")
        self.heads, self.float32 = heads, float32
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B,N,D) to (B,N,D)."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.float32:
            # autocast does not know the meta device, on which FLOPs are counted
            with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
                out = attend(q.float(), k.float(), v.float()).to(v.dtype)
        else:
            out = attend(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(b, n, d))


class TimeEmbed(nn.Module):
    """Sinusoid of 256 channels through Linear-SiLU-Linear; times (B,) on the network's own scale to (B,D)."""

    FREQUENCIES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(self.FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        """(B,) to (B,D)."""
        return self.mlp(timestep_sinusoid(t, self.FREQUENCIES))


class LabelEmbed(nn.Module):
    """A table of K+1 rows, the last for the null label. It drops no labels: the engine does."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) in 0..K to (B,D)."""
        return self.embedding_table(y)


def make_info(
    name: str, size: str, channels: int, input_size: int, classes: int, patch: int, width: int, depth: int
) -> BackboneInfo:
    """The info of a network on square latents; UserError if the patches do not cover them exactly."""
    if input_size % patch:
        raise UserError(
            f"expected a patch that divides the latent size {input_size}, found {patch}; choose another"
        )
    tokens = (input_size // patch) ** 2
    return BackboneInfo(name, size, depth, width, tokens, patch, channels, input_size, classes)


def blocks_to_run(info: BackboneInfo, indices: Sequence[int], stop_early: bool) -> int:
    """How many blocks a forward pass must run; ValueError for an index that the network does not have."""
    for k in indices:
        if not 0 <= k < info.depth:
            raise ValueError(f"block {k} asked, {info.name}-{info.size} has blocks 0..{info.depth - 1}")
    return max(indices, default=-1) + 1 if stop_early else info.depth


def side(tokens: int) -> int:
    """Tokens in a row of a square latent; UserError if so many make no square."""
    root = math.isqrt(tokens)
    if root * root != tokens:
        raise UserError(
            f"expected the positions of a square latent, found {tokens} of them; use square images"
        )
    return root


def count_blocks(state: Mapping[str, Tensor], prefix: str) -> int:
    """Blocks in a state dict whose keys start `prefix`, a dot and the block's number."""
    return len({key.split(".")[1] for key in state if key.startswith(f"{prefix}.")})


def name_size(
    presets: Mapping[str, Mapping[str, Any]], patch: int, width: int, depth: int, heads: int | None
) -> tuple[str, int]:
    """Preset name ("custom" for none) and heads of a network read from its weights, which do not tell the
    heads.

    Raises UserError if `heads` is not given and no preset has this width.
    """
    known = {preset["width"]: preset["heads"] for preset in presets.values()}
    if heads is None and width not in known:
        raise UserError(
            f"heads cannot be read from weights of the unpublished width {width}; "
            f"say them, as --heads 6, or in a run as --set backbone.heads=6"
        )
    found = dict(patch=patch, width=width, depth=depth, heads=known[width] if heads is None else heads)
    fits = (name for name, preset in presets.items() if all(preset[k] == v for k, v in found.items()))
    return next(fits, "custom"), found["heads"]
