"""timm models: token width, weights in the Hugging Face cache, and frozen vision transformers with them."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stbench.core.errors import UserError
from stbench.models.external import read_pretrained

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""Names of the file with the weights in a repository on the hub, the preferred one first."""

DINOV2 = "vit_base_patch14_dinov2.lvd142m"
"""timm's name of DINOv2 ViT-B/14, the default of REPA."""


def repository(name: str) -> str:
    """Return the repository of a timm model on the hub: with the tag that the name may leave out."""
    return _source(name)[0]


def cached_weights(name: str) -> Path | None:
    """Return the file with the weights of a timm model in the Hugging Face cache; None if it has none.

    Nothing is downloaded.
    """
    from huggingface_hub import try_to_load_from_cache

    source, file = _source(name)
    for weights in [file] if file else WEIGHTS:
        found = try_to_load_from_cache(source, weights)
        if isinstance(found, str):
            return Path(found)
    return None


def _source(name: str) -> tuple[str, str]:
    """Return the repository on the hub, and the name of the file if it is not one of WEIGHTS."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    if config is None:
        return f"timm/{name}", ""
    return config.hf_hub_id or f"timm/{name}", config.hf_hub_filename or ""


def how_to_download(name: str) -> str:
    """Return what to type if the weights of an encoder are missing."""
    return (
        f"type `hf download {repository(name)} {WEIGHTS[0]}`, or give a file with "
        f"--set recipe.checkpoint=FILE"
    )


def token_width(name: str) -> int:
    """Return the token width of a timm model; see `on_meta_device` for errors."""
    return int(on_meta_device(name).num_features)


@cache
def on_meta_device(name: str) -> Any:
    """Return a timm model without weights.

    Raises UserError for an unknown name and for a model without patch tokens.
    """
    import timm

    try:
        with torch.device("meta"):
            network: Any = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"unknown encoder '{name}'; expected 'digits', a folder of cached tokens or a timm model such as "
            f"{DINOV2}"
        ) from error
    if not hasattr(network, "num_prefix_tokens") or not hasattr(network, "patch_embed"):
        raise UserError(
            f"encoder '{name}' has no patch tokens; expected a plain vision transformer such as {DINOV2}"
        )
    return network


def build_encoder(name: str, tokens: int, *, file: Path | None, load: bool) -> nn.Module:
    """Build a timm model at the image size that gives `tokens` patches: 224 for DINOv2 and 256 tokens.

    With `load`, the weights are read from `file`, or from the Hugging Face cache. Raises UserError, with the
    command that downloads them, if they are missing or do not fit.
    """
    import timm

    with torch.device("meta"):
        plain: Any = timm.create_model(name, pretrained=False, num_classes=0)
    patch: int = plain.patch_embed.patch_size[0]
    size = patch * math.isqrt(tokens)
    # Read here, as data: older versions of timm unpickle a file with the code in it.
    state = read_pretrained(file or _require_cached(name)) if load else None
    with torch.random.fork_rng(devices=[]):  # timm draws initial weights from the global random state
        try:
            # As pretrained weights, because timm then resizes the position table to the image size.
            overlay = {"state_dict": dict(state)} if state else None
            return timm.create_model(
                name, pretrained=load, pretrained_cfg_overlay=overlay, num_classes=0, img_size=size
            )
        except Exception as error:  # the file system and timm may raise anything
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"cannot load encoder '{name}' ({reason}); {how_to_download(name)}") from error


def _require_cached(name: str) -> Path:
    found = cached_weights(name)
    if found is None:
        raise UserError(
            f"the weights of '{name}' are not in the Hugging Face cache, and stbench downloads nothing; "
            f"{how_to_download(name)}"
        )
    return found
