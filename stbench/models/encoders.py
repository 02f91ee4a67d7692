"""Frozen external image encoders: timm models, the shipped digits encoder, and cached tokens of either.

Each gives one token per patch of the latent. `find_encoder` identifies an encoder without loading it;
`open_encoder` loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.core.text import check_name
from stbench.models.assets import asset_manifest, load_asset
from stbench.models.image_encoder import EncoderSpec, ImageEncoder, encoder_input
from stbench.models.timm_models import DINOV2, build_encoder, how_to_download, token_width
from stbench.models.token_cache import CachedTokens, cache_tokens, cached_spec

__all__ = [
    "DIGITS",
    "CachedTokens",
    "EncoderSpec",
    "ImageEncoder",
    "cache_tokens",
    "encoder_input",
    "find_encoder",
    "find_encoders",
    "open_encoder",
]

T = TypeVar("T")
DIGITS = "digits"
"""Name of the shipped encoder of the embedded digits."""


def find_encoder(name: str, checkpoint: Path | None = None) -> EncoderSpec:
    """Identify an encoder: "digits", a folder written by `cache_tokens`, or a timm model.

    `checkpoint` is a file with the weights of a timm model; without it they are read from the Hugging Face
    cache when the encoder is opened. Nothing is downloaded. Raises UserError if something is missing or
    unknown.
    """
    if checkpoint is not None and (name == DIGITS or (Path(name) / "tokens.json").is_file()):
        raise UserError(
            f"recipe.checkpoint={checkpoint!r} cannot be used with encoder '{name}', which has its own "
            f"weights; leave it out (null in a list)"
        )
    if name == DIGITS:
        asset = asset_manifest()["assets"]["digits_encoder"]
        return EncoderSpec("digits", DIGITS, int(asset["config"]["embed_dim"]), asset["sha256"])
    if (Path(name) / "tokens.json").is_file():
        return cached_spec(Path(name))
    if "/" in name:
        raise UserError(f"no cached tokens at {name}: expected tokens.json and tokens.npy in that folder")
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"encoder weights not found: {checkpoint}; {how_to_download(name)}")
    check_name(name, "the name of an encoder", length=100)  # timm downloads what "hf-hub:..." names
    digest = hash_file(checkpoint) if checkpoint else ""
    return EncoderSpec("timm", name, token_width(name), digest, str(checkpoint) if checkpoint else "")


def find_encoders(
    encoder: str | Sequence[str], checkpoint: str | Sequence[str | None] | None
) -> tuple[EncoderSpec, ...]:
    """Identify the encoders that the options `encoder` and `checkpoint` of a recipe name.

    Raises UserError unless there is an encoder, and no checkpoint or one for each, which may be None.
    """
    names = _listed(encoder)
    if not names:
        raise UserError(f"recipe.encoder must name at least one encoder; for example {DINOV2}")
    files = _listed(checkpoint) or [None] * len(names)
    if len(files) != len(names):
        raise UserError(
            f"recipe.checkpoint must name one file for each of {len(names)} encoders, got {len(files)}; "
            f"list one per encoder, null for none"
        )
    return tuple(
        find_encoder(name, Path(file) if file else None) for name, file in zip(names, files, strict=True)
    )


def _listed(value: str | Sequence[T] | None) -> list[str | T]:
    """Return an option that is one value, a list or None as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def open_encoder(spec: EncoderSpec, tokens: int, device: torch.device) -> ImageEncoder | CachedTokens:
    """Load an encoder, frozen, on a device. Raises UserError unless it gives `tokens` tokens per image."""
    if spec.kind == "cached":
        return CachedTokens(spec, tokens)
    if spec.kind == "digits":
        network = _digits_network()
    else:
        file = Path(spec.path) if spec.path else None
        network = build_encoder(spec.name, tokens, file=file, load=device.type != "meta")
    return ImageEncoder(network, spec, tokens).to(device).eval()


def _digits_network() -> nn.Module:
    """Build the shipped digits encoder."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        network = VisionTransformer(**asset_manifest()["assets"]["digits_encoder"]["config"])
    network.load_state_dict(load_asset("digits_encoder"), assign=True)
    return network
