"""Attention logits of frozen vision transformers: those of chosen layers, between patch tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.flops import forward_flops
from stbench.models.assets import asset_manifest
from stbench.models.encoders import EncoderSpec, ImageEncoder
from stbench.models.layers import logits
from stbench.models.timm_models import DINOV2, on_meta_device


def layers_of(spec: EncoderSpec) -> int:
    """Return the number of layers of an encoder whose attention logits can be read.

    Raises UserError for cached tokens, and for a timm model with another kind of attention.
    """
    from timm.models import vision_transformer

    if spec.kind == "cached":
        raise UserError(
            f"the cached tokens of {spec.name} contain no attention logits, which this recipe needs; "
            f"use --set recipe.encoder={spec.name}"
        )
    if spec.kind == "digits":
        return int(asset_manifest()["assets"]["digits_encoder"]["config"]["depth"])
    plain: Any = vars(vision_transformer)["Attention"]  # timm moved its definition between versions
    blocks = getattr(on_meta_device(spec.name), "blocks", ())
    if not blocks or not all(isinstance(getattr(block, "attn", None), plain) for block in blocks):
        raise UserError(
            f"the attention logits of encoder '{spec.name}' cannot be read; expected a timm "
            f"VisionTransformer such as {DINOV2}"
        )
    return len(blocks)


def tokens_and_logits(encoder: ImageEncoder, images: Tensor, layers: Sequence[int]) -> list[Tensor]:
    """Encode uint8 images (B,c,H,W) as tokens (B,N,Dz) and attention logits (B,heads,N,N) per layer.

    One forward pass. `layers` are 0-based. The logits are scaled; rows and columns of class and register
    tokens are left out, so a softmax over the last axis is over the patches.
    """
    with _projections(encoder.network, layers) as found:
        tokens = encoder.tokens(images)
    prefix = encoder.network.num_prefix_tokens
    return [tokens, *(_patch_logits(encoder.network.blocks[k].attn, found[k], prefix) for k in layers)]


def flops_with_logits(encoder: ImageEncoder, layers: Sequence[int]) -> float:
    """FLOPs of `tokens_and_logits` for one image."""
    size = (1, encoder.network.patch_embed.proj.in_channels, encoder.size, encoder.size)

    def call(network: Any) -> object:
        with _projections(network, layers) as found:
            network.forward_features(torch.empty(size, device="meta"))
        return [_patch_logits(network.blocks[k].attn, found[k], network.num_prefix_tokens) for k in layers]

    return float(forward_flops(encoder.network, call, ("encoder", *layers)))


@contextmanager
def _projections(network: Any, layers: Sequence[int]) -> Iterator[Mapping[int, Tensor]]:
    """Collect what the layers project to queries, keys and values (B,tokens,3D) in a `with` block."""
    found: dict[int, Tensor] = {}

    def catch(layer: int) -> Any:
        return lambda module, inputs, output: found.update({layer: output})

    hooks = [network.blocks[k].attn.qkv.register_forward_hook(catch(k)) for k in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _patch_logits(attention: Any, projected: Tensor, prefix: int) -> Tensor:
    """Logits (B,heads,N,N) between patch tokens, from queries, keys and values (B,prefix+N,3D)."""
    b, n, _ = projected.shape
    q, k, _ = projected.reshape(b, n, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    return logits(attention.q_norm(q)[:, :, prefix:], attention.k_norm(k)[:, :, prefix:])
