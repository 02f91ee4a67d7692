"""Frozen external image encoders: timm models, the shipped digits encoder, and cached tokens of either.

Each gives one token per patch of the latent. `find_encoder` identifies an encoder without loading it;
`open_encoder` loads it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.core.files import atomic_write, hash_file
from stbench.core.flops import forward_flops
from stbench.core.npy import map_npy
from stbench.core.safe_load import parse_json, read_text
from stbench.core.text import check_name
from stbench.core.verified import hash_and_remember, verify_files
from stbench.models.assets import asset_manifest, load_asset
from stbench.models.autoencoder import to_float
from stbench.models.external import read_pretrained

DIGITS = "digits"
"""Name of the shipped encoder of the embedded digits."""

WEIGHTS = "model.safetensors"
"""Name of the file with the weights of a timm model on the hub."""

DINOV2 = "vit_base_patch14_dinov2.lvd142m"
"""timm's name of DINOv2 ViT-B/14, the default of REPA."""


@dataclass(frozen=True)
class EncoderSpec:
    """Identity of an encoder, and where its weights or cached tokens are."""

    kind: Literal["timm", "digits", "cached"]
    name: str
    """timm model name, "digits", or the name of the encoder that the cached tokens are from."""
    width: int
    """Token width Dz."""
    sha256: str
    """Hash of the weights or of the cached tokens; "" for a model from the hub, identified by its name."""
    path: str = field(default="", compare=False)
    """File of local weights or folder of cached tokens, "" for none; not part of the identity."""

    @property
    def needs(self) -> str:
        """What a leaderboard row says that the run needed."""
        cached = "cached tokens of " if self.kind == "cached" else ""
        return f"{cached}encoder {self.name}"


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
        return _cached_spec(Path(name))
    if "/" in name:
        raise UserError(f"no cached tokens at {name}: expected tokens.json and tokens.npy in that folder")
    if checkpoint is not None and not checkpoint.is_file():
        raise UserError(f"encoder weights not found: {checkpoint}; {_download(name)}")
    check_name(name, "the name of an encoder", length=100)  # timm downloads what "hf-hub:..." names
    digest = hash_file(checkpoint) if checkpoint else ""
    return EncoderSpec("timm", name, _width(name), digest, str(checkpoint) if checkpoint else "")


def open_encoder(spec: EncoderSpec, tokens: int, device: torch.device) -> ImageEncoder | CachedTokens:
    """Load an encoder, frozen, on a device. Raises UserError unless it gives `tokens` tokens per image."""
    if spec.kind == "cached":
        return CachedTokens(spec, tokens)
    if spec.kind == "digits":
        network = _digits_network()
    else:
        network = _timm_network(spec, tokens, load=device.type != "meta")
    return ImageEncoder(network, spec, tokens).to(device).eval()


# --- Encoders that run on the images ---


@final
class ImageEncoder(nn.Module):
    """A frozen timm vision transformer that is applied to the clean images."""

    def __init__(self, network: nn.Module, spec: EncoderSpec, tokens: int) -> None:
        super().__init__()
        self.network: Any = network.eval().requires_grad_(False)
        self.spec = spec
        patches: Any = self.network.patch_embed
        self.size: int = patches.img_size[0]
        shape = (1, patches.proj.in_channels, self.size, self.size)

        def call(net: Any) -> object:
            return net.forward_features(torch.empty(shape, device="meta"))

        # Counted on the meta device, so that a plan needs no weights.
        self.flops = float(forward_flops(network, call, ("encoder",)))
        if patches.num_patches != tokens:
            raise UserError(
                f"encoder '{spec.name}' gives {patches.num_patches} tokens, the backbone has {tokens}; "
                f"choose an encoder or a patch size that matches"
            )

    def tokens(self, images: Tensor) -> Tensor:
        """Return patch tokens (B,N,Dz), after the final norm, of uint8 images (B,c,H,W).

        Class and register tokens are left out. Images are preprocessed as in REPA; the digits encoder takes
        them in [-1,1].
        """
        if self.spec.kind == "digits":
            prepared = to_float(images)
        else:
            config = self.network.pretrained_cfg
            prepared = encoder_input(images, self.size, config["mean"], config["std"])
        tokens: Tensor = self.network.forward_features(prepared)
        return tokens[:, self.network.num_prefix_tokens :]


def encoder_input(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Preprocess uint8 images (B,c,H,W) to (B,3,size,size) as REPA does.

    Divides by 255, normalises with the encoder's mean and std (ImageNet's for DINOv2) and resizes with
    bicubic interpolation. A single channel is repeated three times.
    """
    x = images.expand(-1, 3, -1, -1).float() / 255.0
    shift, scale = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (mean, std))
    return F.interpolate((x - shift) / scale, (size, size), mode="bicubic", align_corners=False)


# --- Cached tokens ---


@final
class CachedTokens:
    """Tokens on disk, one row per training image, memory-mapped."""

    def __init__(self, spec: EncoderSpec, tokens: int) -> None:
        self._tokens = _map_tokens(Path(spec.path))
        self.flops = float(_manifest(Path(spec.path))["flops"])
        """FLOPs per image of the encoder that made them."""
        if self._tokens.shape[1] != tokens:
            raise UserError(
                f"{spec.path} contains {self._tokens.shape[1]} tokens per image, the backbone has {tokens}; "
                f"cache the tokens of another encoder or image size"
            )

    def rows(self, index: Tensor, dataset_size: int) -> Tensor:
        """Return tokens (B,N,Dz), float32 on the CPU. Raises UserError if they are not of these images."""
        if len(self._tokens) != dataset_size:
            raise UserError(
                f"expected cached tokens of {dataset_size} images, found {len(self._tokens)}; "
                f"cache the tokens of this data set"
            )
        if len(index) and int(index.max()) >= dataset_size:
            raise UserError("there are no cached tokens of mirror images; type --set data.flip=false")
        return torch.from_numpy(self._tokens[index.numpy()].astype(np.float32))


def cache_tokens(folder: Path, encoder: ImageEncoder, images: Iterable[Tensor], count: int) -> EncoderSpec:
    """Encode the `count` training images, given in row order as batches uint8 (b,c,H,W), and save the tokens.

    tokens.npy is float16 (count,N,Dz), written batch by batch. tokens.json, with the encoder, its FLOPs, and
    size and hash of tokens.npy, is written last. Raises UserError for another number of images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").unlink(missing_ok=True)  # tokens without it are not a cache
    device = next(encoder.network.parameters()).device
    shape = (count, encoder.network.patch_embed.num_patches, encoder.spec.width)
    tokens, done = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.float16, shape), 0
    for batch in images:
        if done + len(batch) > count:
            raise UserError(f"expected {count} images, found more; pass the right count")
        with torch.no_grad():
            tokens[done : done + len(batch)] = encoder.tokens(batch.to(device)).half().cpu().numpy()
        done += len(batch)
    if done < count:
        raise UserError(f"expected {count} images, found {done}; pass the right count")
    tokens.flush()
    file = folder / "tokens.npy"
    content = {
        "schema": 1,
        "encoder": encoder.spec.name,
        "encoder_sha256": encoder.spec.sha256,
        "flops": encoder.flops,
        "bytes": file.stat().st_size,
        "sha256": hash_and_remember(folder, file.name),
    }
    atomic_write(folder / "tokens.json", json.dumps(content, indent=1) + "\n")
    return _cached_spec(folder)


def _cached_spec(folder: Path) -> EncoderSpec:
    """Identify cached tokens. tokens.npy is hashed on its first use on a machine, which may take minutes."""
    content = _manifest(folder)
    file = folder / "tokens.npy"
    if not file.is_file():
        raise UserError(f"{folder} lacks tokens.npy; cache the tokens again")
    if file.stat().st_size != content["bytes"]:
        raise UserError(
            f"{file} is damaged: expected {content['bytes']} bytes, found {file.stat().st_size}; "
            f"cache the tokens again"
        )
    verify_files(folder, {"tokens.npy": content["sha256"]}, "copy it again, or cache the tokens again")
    shape = _map_tokens(folder).shape
    return EncoderSpec("cached", str(content["encoder"]), int(shape[2]), str(content["sha256"]), str(folder))


def _map_tokens(folder: Path) -> np.ndarray:
    """Open tokens.npy, float16 (count,N,Dz), memory-mapped."""
    file = folder / "tokens.npy"
    try:
        tokens = map_npy(file)
        if tokens.dtype != np.float16 or tokens.ndim != 3:
            raise ValueError(f"expected float16 (count,N,Dz), found {tokens.dtype} {tokens.shape}")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); cache the tokens again") from error
    return tokens


def _manifest(folder: Path) -> dict[str, Any]:
    """Read tokens.json."""
    try:
        content = parse_json(read_text(folder / "tokens.json"))
        if content["schema"] != 1:
            raise ValueError(f"schema {content['schema']}")
        return {
            "encoder": str(content["encoder"]),
            "flops": float(content["flops"]),
            "bytes": int(content["bytes"]),
            "sha256": str(content["sha256"]),
        }
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{folder}/tokens.json is damaged ({error}); cache the tokens again") from error


# --- Loading ---


@cache
def _width(name: str) -> int:
    """Return the token width of a timm model."""
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
    return int(network.num_features)


def _digits_network() -> nn.Module:
    """Build the shipped digits encoder."""
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        network = VisionTransformer(**asset_manifest()["assets"]["digits_encoder"]["config"])
    network.load_state_dict(load_asset("digits_encoder"), assign=True)
    return network


def _timm_network(spec: EncoderSpec, tokens: int, load: bool) -> nn.Module:
    """Build a timm model at the image size that gives `tokens` patches: 224 for DINOv2 and 256 tokens."""
    import timm

    with torch.device("meta"):
        plain: Any = timm.create_model(spec.name, pretrained=False, num_classes=0)
    patch: int = plain.patch_embed.patch_size[0]
    size = patch * math.isqrt(tokens)
    weights = spec.path or (cached_weights(spec.name) if load else "")
    # Read here, as data: older versions of timm unpickle a file with the code in it.
    state = read_pretrained(Path(weights)) if weights and load else None
    with torch.random.fork_rng(devices=[]):  # timm draws initial weights from the global random state
        try:
            # As pretrained weights, because timm then resizes the position table to the image size.
            overlay = {"state_dict": dict(state)} if state else None
            return timm.create_model(
                spec.name, pretrained=load, pretrained_cfg_overlay=overlay, num_classes=0, img_size=size
            )
        except Exception as error:  # the file system and timm may raise anything
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"cannot load encoder '{spec.name}' ({reason}); {_download(spec.name)}"
            ) from error


def cached_weights(name: str) -> str:
    """Return the file with the weights of a timm model in the Hugging Face cache, without downloading.

    Raises UserError, with the command that downloads them, if they are not there.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(_repository(name), WEIGHTS)
    if not isinstance(found, str):
        raise UserError(
            f"the weights of '{name}' are not in the Hugging Face cache, and stbench downloads nothing; "
            f"{_download(name)}"
        )
    return found


def _repository(name: str) -> str:
    """Return the repository of a timm model on the hub: with the tag that the name may leave out."""
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(name)
    return (config.hf_hub_id if config else None) or f"timm/{name}"


def _download(name: str) -> str:
    return (
        f"type `hf download {_repository(name)} {WEIGHTS}`, or give a file with --set recipe.checkpoint=FILE"
    )
