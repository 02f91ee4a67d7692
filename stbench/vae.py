"""Finding autoencoders: a local folder in diffusers' layout, or a published name in the Hugging Face cache.

Nothing is ever downloaded; what is missing is answered with the command that fetches it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stbench.errors import UserError
from stbench.latents import Autoencoder, read_vae

PUBLISHED = {name: f"stabilityai/{name}" for name in ("sd-vae-ft-ema", "sd-vae-ft-mse")}
"""Names that need no path -> their repository."""
PUBLISHED_SCALE = 0.18215
"""What the latents of the published ones are multiplied by."""

WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class VAE:
    """An autoencoder on disk: where it is, what it is, and how its latents are normalised."""

    name: str
    """As the user named it: a published name, or an absolute path."""
    folder: Path
    sha256: str
    """Of configuration and weights."""
    channels: int
    """Of the images."""
    latent_channels: int
    factor: int
    """Pixels a latent."""
    scale: float
    shift: float

    def load(self, dtype: torch.dtype = torch.float32) -> Autoencoder:
        """The network, frozen, on the host."""
        return Autoencoder(read_vae(self.folder, dtype), self.sha256)


@cache
def find_vae(name: str) -> VAE:
    """The autoencoder of a published name or in a folder, its files hashed.

    Raises UserError for a name that is not cached, a folder that is missing or holds no diffusers
    AutoencoderKL.
    """
    published = is_published(name)
    folder = _cached(name) if published else Path(name).expanduser().resolve()
    if not (folder / "config.json").is_file() or not (folder / WEIGHTS).is_file():
        raise UserError(
            f"expected an autoencoder (config.json and {WEIGHTS}) in {folder}, found none; "
            f"for example: {download('sd-vae-ft-ema')} and give that folder"
        )
    config = _config(folder)
    return VAE(
        name=name if published else str(folder),
        folder=folder,
        sha256=_sha256(folder),
        channels=int(config["in_channels"]),
        latent_channels=int(config["latent_channels"]),
        factor=2 ** (len(config["block_out_channels"]) - 1),
        scale=float(config.get("scaling_factor") or PUBLISHED_SCALE),
        shift=float(config.get("shift_factor") or 0.0),
    )


def is_published(name: str) -> bool:
    """Whether a name stands for a published autoencoder; a folder of that name goes before it."""
    return name in PUBLISHED and not Path(name).is_dir()


def download(name: str) -> str:
    """The command that fetches a published autoencoder to a folder."""
    return f"`hf download {PUBLISHED[name]} --local-dir {name}`"


def _cached(name: str) -> Path:
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
    try:
        config = json.loads((folder / "config.json").read_text())
        if config["_class_name"] != "AutoencoderKL" or int(config["in_channels"]) not in (1, 3):
            raise KeyError("_class_name")
        return {**config, "latent_channels": config["latent_channels"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}/config.json: expected diffusers' AutoencoderKL for 1 or 3 channels, "
            f"found something else ({error}); give another folder with --vae"
        ) from error


def _sha256(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in ("config.json", WEIGHTS):
        with (folder / name).open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
