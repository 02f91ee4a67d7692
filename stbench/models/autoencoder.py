"""Autoencoders: images to latents and back, rounding to uint8, and autoencoders on disk."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.core.files import absolute_path, hash_file
from stbench.core.safe_load import parse_json, read_text
from stbench.models.assets import asset_manifest, load_asset
from stbench.models.repositories import shorten
from stbench.models.weights import require_finite

ROUNDING = "clamp, round half to even of (x+1)*127.5"
"""How `to_uint8` rounds; part of an evaluation protocol."""

DIGITS_VAE: dict[str, Any] = {
    "in_channels": 1,
    "out_channels": 1,
    "latent_channels": 4,
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 32,
}
"""diffusers configuration of the shipped digits autoencoder: 1x32x32 images, 4x8x8 latents."""


def to_uint8(images: Tensor) -> Tensor:
    """Convert images in [-1,1] to uint8: clamp, then round (x+1)*127.5 half to even.

    Every image that is measured, stored or shown is rounded here, exactly once.
    """
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [-1,1]. `to_uint8` is the exact inverse."""
    return images.float() / 127.5 - 1.0


@final
class Autoencoder:
    """A frozen diffusers AutoencoderKL whose inputs and outputs are plain tensors."""

    def __init__(self, vae: nn.Module, fingerprint: str) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.fingerprint = fingerprint
        """Hash of the weights."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Encode images (B,c,H,W) in [-1,1] to mean and std of the posterior, (B,C,h,w) each."""
        posterior = self.vae.encode(images).latent_dist  # type: ignore[operator]
        return posterior.mean, posterior.std

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Encode images (B,c,H,W) in [-1,1] to mean and unclamped log-variance, (B,2C,h,w)."""
        return self.vae.encode(images).latent_dist.parameters  # type: ignore[operator]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents (B,C,h,w) to images (B,c,H,W), nominally in [-1,1] but not clamped."""
        return self.vae.decode(z).sample  # type: ignore[operator]

    def to(self, device: torch.device | str) -> Autoencoder:
        """Return a copy on `device`."""
        return Autoencoder(copy.deepcopy(self.vae).to(device), self.fingerprint)


def build_vae(config: dict[str, Any]) -> nn.Module:
    """Build a diffusers AutoencoderKL with random weights from torch's global random state."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)  # type: ignore[no-untyped-call]


@cache
def digits_autoencoder() -> Autoencoder:
    """Return the shipped autoencoder of the embedded digits, on the CPU."""
    weights = load_asset("digits_vae")
    # The meta device initialises nothing, so that loading does not change the global random state.
    with torch.device("meta"):
        vae = build_vae(DIGITS_VAE)
    vae.load_state_dict(weights, assign=True)
    return Autoencoder(vae, asset_manifest()["assets"]["digits_vae"]["sha256"])


def read_vae(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Load diffusers' AutoencoderKL from a local folder, with weights of type `dtype`.

    Raises UserError if it does not load, if weights are missing or unknown, or if they are not finite.
    """
    from diffusers import AutoencoderKL

    _require_size(folder)
    try:
        vae, found = AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
            str(folder),
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            torch_dtype=dtype,
            output_loading_info=True,
        )
    except Exception as error:  # diffusers and safetensors may raise anything
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot load the autoencoder in {folder} ({type(error).__name__}: {reason}); download it again"
        ) from error
    # diffusers draws missing weights at random, with a warning only.
    for what in ("missing", "unexpected", "mismatched"):
        if names := [str(key) for key in found[f"{what}_keys"]]:
            raise UserError(
                f"cannot load the autoencoder in {folder}: {WEIGHTS} has {what} weights, {shorten(names)}; "
                f"download it again"
            )
    require_finite(vae.state_dict(), str(folder / WEIGHTS), "download it again")
    return vae


def _require_size(folder: Path) -> None:
    """Raise UserError if the configuration describes a network that the file of weights cannot fill."""
    with torch.device("meta"):
        try:
            expected = sum(value.numel() for value in build_vae(_config(folder)).state_dict().values())
        except UserError:
            raise
        except Exception as error:  # diffusers may raise anything for odd values
            reason = " ".join(str(error).split())[:120]
            raise UserError(
                f"{folder}/config.json does not describe an AutoencoderKL "
                f"({type(error).__name__}: {reason}); download it again"
            ) from error
    size = (folder / WEIGHTS).stat().st_size
    if expected > size:  # a weight takes two bytes or more
        raise UserError(
            f"{folder}/config.json describes {expected} weights, more than {WEIGHTS} of {size} bytes; "
            f"download both again"
        )


PUBLISHED = {name: f"stabilityai/{name}" for name in ("sd-vae-ft-ema", "sd-vae-ft-mse")}
"""Published name -> repository on the Hugging Face hub."""

PUBLISHED_SCALE = 0.18215
"""Scale of the latents of the published autoencoders."""

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class VAEInfo:
    """An autoencoder on disk: files, shapes, and the normalisation (z - shift) * scale of its latents."""

    name: str
    """Published name, or absolute path."""
    folder: Path
    sha256: str
    """Hash of configuration and weights."""
    channels: int
    """Channels of the images."""
    latent_channels: int
    factor: int
    """Height of the images / height of the latents."""
    scale: float
    shift: float

    def load(self, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """Load the network, frozen, on the CPU."""
        return Autoencoder(read_vae(self.folder, dtype), self.sha256)


@cache
def find_vae(name: str) -> VAEInfo:
    """Find and hash the autoencoder with a published name, in the Hugging Face cache, or in a folder.

    Raises UserError if it is not in the cache, or if the folder does not contain diffusers' AutoencoderKL.
    """
    published = is_published(name)
    folder = _cached(name) if published else absolute_path(name)
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"expected an autoencoder (config.json and {WEIGHTS}) in {folder}, found none; "
            f"for example type {download('sd-vae-ft-ema')} and give that folder"
        )
    _require_hub_hash(folder / WEIGHTS)
    config = _config(folder)
    return VAEInfo(
        name=name if published else str(folder),
        folder=folder,
        sha256=hash_file(folder / "config.json", folder / WEIGHTS),
        channels=int(config["in_channels"]),
        latent_channels=int(config["latent_channels"]),
        factor=2 ** (len(config["block_out_channels"]) - 1),
        scale=float(config.get("scaling_factor") or PUBLISHED_SCALE),
        shift=float(config.get("shift_factor") or 0.0),
    )


def _require_hub_hash(file: Path) -> None:
    """Check a file of the Hugging Face cache, where a file is named by its sha256. Raises UserError."""
    blob = file.resolve()
    if blob.parent.name != "blobs" or not re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return
    if (found := hash_file(blob)) != blob.name:
        raise UserError(
            f"{file} is damaged: expected sha256 {blob.name[:12]}, found {found[:12]}; "
            f"delete {blob} and download it again"
        )


def is_published(name: str) -> bool:
    """Whether a name is that of a published autoencoder, and not of a folder."""
    return name in PUBLISHED and not Path(name).is_dir()


def download(name: str) -> str:
    """Return the command that downloads a published autoencoder to a folder."""
    return f"`hf download {PUBLISHED[name]} --local-dir {name}`"


def _cached(name: str) -> Path:
    """Return the folder of a published autoencoder in the Hugging Face cache."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(PUBLISHED[name], "config.json")
    weights = try_to_load_from_cache(PUBLISHED[name], WEIGHTS)
    if not isinstance(config, str) or not isinstance(weights, str):
        raise UserError(
            f"autoencoder {name} is not in the Hugging Face cache; type `hf download {PUBLISHED[name]}`, "
            f"or {download(name)} and give that folder instead of {name}"
        )
    return Path(config).parent


def _config(folder: Path) -> dict[str, Any]:
    """Read the configuration of an AutoencoderKL."""
    try:
        config = parse_json(read_text(folder / "config.json"))
        if config["_class_name"] != "AutoencoderKL" or int(config["in_channels"]) not in (1, 3):
            raise KeyError("_class_name")
        for name in ("scaling_factor", "shift_factor"):
            float(config.get(name) or 0.0)
        if not 0 < int(config.get("layers_per_block", 1)) <= 64:
            raise ValueError("unexpected layers_per_block")
        if not 0 < int(config["latent_channels"]) <= 1024 or not 0 < len(config["block_out_channels"]) <= 10:
            raise ValueError("unexpected latent_channels or block_out_channels")
        return dict(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/config.json: expected diffusers' AutoencoderKL for 1 or 3 channels, "
            f"found something else ({error}); give another folder with --vae"
        ) from error
