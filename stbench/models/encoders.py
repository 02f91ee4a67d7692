"""Frozen image encoders that teach from outside the model: timm networks, the digits' own, cached tokens.

Each gives one token for each patch of the latent. Nothing is downloaded or read before `open`.
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
from stbench.models.assets import asset_manifest, load_asset
from stbench.models.autoencoder import to_float

DIGITS = "digits"
"""The shipped encoder of the embedded digits."""
DINOV2 = "vit_base_patch14_dinov2.lvd142m"
"""timm's name of DINOv2-B/14, REPA's default."""


@dataclass(frozen=True)
class EncoderSpec:
    """Where tokens come from, as plain data: what identifies an encoder."""

    kind: Literal["timm", "digits", "cached"]
    name: str
    """timm model name, "digits", or the cache's own encoder name."""
    width: int
    """Dz."""
    sha256: str
    """Of the weights or of the cached tokens; "" for a hub model, which its name identifies."""
    path: str = field(default="", compare=False)
    """Local weights, or the cache; "" for none. Where a file lies is no part of what it is."""

    @property
    def needs(self) -> str:
        """What a leaderboard row says of it."""
        cached = "cached tokens of " if self.kind == "cached" else ""
        return f"{cached}encoder {self.name}"


def find_encoder(name: str, checkpoint: Path | None = None) -> EncoderSpec:
    """What `name` means: "digits", a cache folder made by `cache_tokens`, or a timm model (optionally with
    local weights). Raises UserError for what is missing or unknown.
    """
    if checkpoint is not None and (name == DIGITS or (Path(name) / "tokens.json").is_file()):
        raise UserError(
            f"recipe.checkpoint={checkpoint} has no meaning for encoder '{name}', which has its own; "
            f"leave it out (null in a list)"
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
    digest = hash_file(checkpoint) if checkpoint else ""
    return EncoderSpec("timm", name, _width(name), digest, str(checkpoint) if checkpoint else "")


def open_encoder(spec: EncoderSpec, tokens: int, device: torch.device) -> ImageEncoder | CachedTokens:
    """The encoder on the device, frozen, giving `tokens` tokens an image. Raises UserError if it cannot."""
    if spec.kind == "cached":
        return CachedTokens(spec, tokens)
    if spec.kind == "digits":
        network = _digits_network()
    else:
        network = _timm_network(spec, tokens, load=device.type != "meta")
    return ImageEncoder(network, spec, tokens).to(device).eval()


@final
class ImageEncoder(nn.Module):
    """A frozen timm vision transformer on the clean images: REPA's preprocessing, or the digits' own."""

    def __init__(self, network: nn.Module, spec: EncoderSpec, tokens: int) -> None:
        super().__init__()
        self.network: Any = network.eval().requires_grad_(False)
        self.spec = spec
        patches: Any = self.network.patch_embed
        self.size: int = patches.img_size[0]
        shape = (1, patches.proj.in_channels, self.size, self.size)

        def call(net: Any) -> object:
            return net.forward_features(torch.empty(shape, device="meta"))

        self.flops = float(forward_flops(network, call, ("encoder",)))
        if patches.num_patches != tokens:
            raise UserError(
                f"encoder '{spec.name}' gives {patches.num_patches} tokens, the backbone has {tokens}; "
                f"choose an encoder or a patch size that agree"
            )

    def tokens(self, images: Tensor) -> Tensor:
        """Normalised patch tokens (B,N,Dz) of uint8 images (B,c,H,W); class and register tokens left out."""
        if self.spec.kind == "digits":
            prepared = to_float(images)
        else:
            config = self.network.pretrained_cfg
            prepared = encoder_input(images, self.size, config["mean"], config["std"])
        tokens: Tensor = self.network.forward_features(prepared)
        return tokens[:, self.network.num_prefix_tokens :]


def encoder_input(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 images (B,c,H,W) to float (B,3,size,size): /255, the encoder's mean and std, bicubic (REPA).

    DINOv2's mean and std are ImageNet's. One channel is repeated to three.
    """
    x = images.expand(-1, 3, -1, -1).float() / 255.0
    shift, scale = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (mean, std))
    return F.interpolate((x - shift) / scale, (size, size), mode="bicubic", align_corners=False)


@final
class CachedTokens:
    """Tokens on disk, one row for each training image, read by row number."""

    def __init__(self, spec: EncoderSpec, tokens: int) -> None:
        self._tokens = np.load(Path(spec.path) / "tokens.npy", mmap_mode="r")
        self.flops = float(_manifest(Path(spec.path))["flops"])
        """Of one image when the cache was made."""
        if self._tokens.shape[1] != tokens:
            raise UserError(
                f"{spec.path} holds {self._tokens.shape[1]} tokens an image, the backbone has {tokens}; "
                f"cache the tokens of another encoder or image size"
            )

    def rows(self, index: Tensor, dataset_size: int) -> Tensor:
        """Tokens (B,N,Dz) float32 on the host. Raises UserError if they are not of these images."""
        if len(self._tokens) != dataset_size:
            raise UserError(
                f"cached tokens are of {len(self._tokens)} images, the data set has {dataset_size}; "
                f"cache its own tokens"
            )
        if len(index) and int(index.max()) >= dataset_size:
            raise UserError("cached tokens are of images, found mirror images; type --set data.flip=false")
        return torch.from_numpy(self._tokens[index.numpy()].astype(np.float32))


def cache_tokens(folder: Path, encoder: ImageEncoder, images: Iterable[Tensor], count: int) -> EncoderSpec:
    """Write the tokens of the `count` training images, in row order and batches of uint8 (b,c,H,W), to
    `folder`.

    tokens.npy is float16 (count,N,Dz), written batch by batch; tokens.json, which names the encoder, its
    cost, and the file's size and sha256, appears when it is whole. Raises UserError for another number of
    images.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokens.json").unlink(missing_ok=True)
    device = next(encoder.network.parameters()).device
    shape = (count, encoder.network.patch_embed.num_patches, encoder.spec.width)
    tokens, done = np.lib.format.open_memmap(folder / "tokens.npy", "w+", np.float16, shape), 0
    for batch in images:
        if done + len(batch) > count:
            raise UserError(f"expected {count} images to cache tokens of, found more; give their number")
        with torch.no_grad():
            tokens[done : done + len(batch)] = encoder.tokens(batch.to(device)).half().cpu().numpy()
        done += len(batch)
    if done < count:
        raise UserError(f"expected {count} images to cache tokens of, found {done}; give their number")
    tokens.flush()
    file = folder / "tokens.npy"
    content = {
        "schema": 1,
        "encoder": encoder.spec.name,
        "encoder_sha256": encoder.spec.sha256,
        "flops": encoder.flops,
        "bytes": file.stat().st_size,
        "sha256": hash_file(file),
    }
    atomic_write(folder / "tokens.json", json.dumps(content, indent=1) + "\n")
    return _cached_spec(folder)


def _cached_spec(folder: Path) -> EncoderSpec:
    """What tokens.json says; of tokens.npy only the size is checked: reading it all can take minutes."""
    content = _manifest(folder)
    file = folder / "tokens.npy"
    if not file.is_file():
        raise UserError(f"{folder} lacks tokens.npy; cache the tokens again")
    if file.stat().st_size != content["bytes"]:
        raise UserError(
            f"{file} is damaged: expected {content['bytes']} bytes, found {file.stat().st_size}; "
            f"cache the tokens again"
        )
    shape = np.load(file, mmap_mode="r").shape
    return EncoderSpec("cached", str(content["encoder"]), int(shape[2]), str(content["sha256"]), str(folder))


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / "tokens.json").read_text())
        if content["schema"] != 1:
            raise ValueError(f"schema {content['schema']}")
        return {key: content[key] for key in ("encoder", "flops", "bytes", "sha256")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/tokens.json is damaged ({error}); cache the tokens again") from error


@cache
def _width(name: str) -> int:
    import timm

    try:
        with torch.device("meta"):
            network: Any = timm.create_model(name, pretrained=False, num_classes=0)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"unknown encoder '{name}': expected 'digits', a folder of cached tokens or a timm model such as "
            f"{DINOV2}"
        ) from error
    if not hasattr(network, "num_prefix_tokens") or not hasattr(network, "patch_embed"):
        raise UserError(
            f"encoder '{name}' gives no patch tokens; expected a plain vision transformer such as {DINOV2}"
        )
    return int(network.num_features)


def _digits_network() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    with torch.device("meta"):
        network = VisionTransformer(**asset_manifest()["assets"]["digits_encoder"]["config"])
    network.load_state_dict(load_asset("digits_encoder"), assign=True)
    return network


def _timm_network(spec: EncoderSpec, tokens: int, load: bool) -> nn.Module:
    """The timm model at the image size whose patches are the latent's: 224 for DINOv2 and 256 tokens."""
    import timm

    with torch.device("meta"):
        plain: Any = timm.create_model(spec.name, pretrained=False, num_classes=0)
    patch: int = plain.patch_embed.patch_size[0]
    size = patch * math.isqrt(tokens)
    with torch.random.fork_rng(devices=[]):
        try:
            # through timm's own loading of pretrained weights, which fits the position table to the size
            overlay = {"file": spec.path} if spec.path else None
            return timm.create_model(
                spec.name, pretrained=load, pretrained_cfg_overlay=overlay, num_classes=0, img_size=size
            )
        except Exception as error:  # the hub, the file system and timm raise what they like
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"encoder '{spec.name}' cannot be loaded ({reason}); {_download(spec.name)}"
            ) from error


def _download(name: str) -> str:
    return (
        f"download it with `hf download timm/{name} model.safetensors --local-dir encoders/{name}` and type "
        f"--set recipe.checkpoint=encoders/{name}/model.safetensors"
    )
