"""Autoencoders: images to latents and back, the one rounding to uint8, checked loading of weights."""

from __future__ import annotations

import copy
import hashlib
import json
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from stbench.errors import UserError

ROUNDING = "clamp, round half to even of (x+1)*127.5"
"""How `to_uint8` rounds, as named in an evaluation protocol."""

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
"""diffusers configuration of the shipped autoencoder: 1x32x32 images, 4x8x8 latents."""


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1,1] to uint8 of the same shape: clamp, then round (x+1)*127.5 half to even.

    The one rounding of the program: every image that is measured, stored or shown went through it once.
    """
    return ((images.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [-1,1]; `to_uint8` undoes it exactly."""
    return images.float() / 127.5 - 1.0


def asset_folder() -> Path:
    """Where the shipped weights lie."""
    return Path(str(files("stbench.assets")))


def asset_manifest(folder: Path | None = None) -> dict[str, Any]:
    """digits.json: the sha256 of every shipped file, its settings and its figures."""
    path = (folder or asset_folder()) / "digits.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"asset digits.json is missing or damaged ({error}); reinstall stbench") from error


def load_asset(name: str, folder: Path | None = None) -> dict[str, Tensor]:
    """Weights of a shipped network as float32, after its sha256 has been compared with the manifest.

    Raises UserError if the file is missing or a byte of it has changed.
    """
    from safetensors.torch import load

    folder = folder or asset_folder()
    expected = asset_manifest(folder)["assets"][name]["sha256"]
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise UserError(f"asset {path.name} is missing: expected it in {folder}; reinstall stbench")
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise UserError(
            f"asset {path.name} is damaged: expected sha256 {expected}, found {found}; reinstall stbench"
        )
    return {key: tensor.float() for key, tensor in load(content).items()}


@final
class Autoencoder:
    """A frozen diffusers AutoencoderKL in plain tensors: images to posterior moments, latents to images."""

    def __init__(self, vae: nn.Module, fingerprint: str) -> None:
        self.vae = vae.eval().requires_grad_(False)
        self.fingerprint = fingerprint
        """Hash of the weights."""

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B,c,H,W) in [-1,1] to the posterior's mean and std, each (B,C,h,w)."""
        posterior = self.vae.encode(images).latent_dist  # type: ignore[operator]
        return posterior.mean, posterior.std

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """Images (B,c,H,W) in [-1,1] to the posterior's mean and, unclamped, log-variance, (B,2C,h,w)."""
        return self.vae.encode(images).latent_dist.parameters  # type: ignore[operator]

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Latents (B,C,h,w) to images (B,c,H,W), nominally in [-1,1] and not yet clamped."""
        return self.vae.decode(z).sample  # type: ignore[operator]

    def to(self, device: torch.device | str) -> Autoencoder:
        """A copy on `device`."""
        return Autoencoder(copy.deepcopy(self.vae).to(device), self.fingerprint)


def build_vae(config: dict[str, Any]) -> nn.Module:
    """A diffusers AutoencoderKL from its configuration, initialised from torch's global random state."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(config)  # type: ignore[no-untyped-call]


@cache
def digits_autoencoder() -> Autoencoder:
    """The shipped autoencoder of the embedded digits, on the host."""
    weights = load_asset("digits_vae")
    # On the meta device nothing is initialised, so loading leaves the global random state alone.
    with torch.device("meta"):
        vae = build_vae(DIGITS_VAE)
    vae.load_state_dict(weights, assign=True)
    return Autoencoder(vae, asset_manifest()["assets"]["digits_vae"]["sha256"])


def read_vae(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """diffusers' AutoencoderKL from a local folder, its weights as `dtype`.

    Raises UserError for one that does not load.
    """
    from diffusers import AutoencoderKL

    try:
        return AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
            str(folder),
            local_files_only=True,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            torch_dtype=dtype,
        )
    except Exception as error:  # diffusers and safetensors raise whatever they find
        found = " ".join(str(error).split())[:300]
        raise UserError(
            f"autoencoder in {folder} does not load ({type(error).__name__}: {found}); fetch it again"
        ) from error
