"""Open a network for sampling: a run folder, or a checkpoint of an official repository."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from stbench.config.build import build_objective
from stbench.core.backbone import Backbone, Weights
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.core.registry import load_builtins
from stbench.data.dataset import Dataset
from stbench.data.path_dataset import PathDataset
from stbench.data.prepare import PIXELS
from stbench.evaluate import past_run
from stbench.evaluate.extractors import tensors_hash
from stbench.models.autoencoder import ROUNDING, VAEInfo, find_vae, to_uint8
from stbench.models.official import load_official

PUBLISHED_SAMPLERS = {"dit": "ddpm", "sit": "euler-maruyama", "uvit": "dpm-solver"}


PUBLISHED_STEPS = {"dit": 250, "sit": 250, "uvit": 50}
"""Backbone family -> what its papers sample with."""


PRECISIONS = ("fp32", "tf32", "bf16")
"""What the network may compute in; the decoder is always in fp32."""


@dataclass(frozen=True)
class Origin:
    """Where the network comes from; a worker process opens it again."""

    path: Path
    """A run folder, or a file of official weights."""
    official: bool = False
    vae: str | None = None
    """Decoder: a diffusers folder, a published name, or "none" for pixels; None for a run's own."""
    original: str | None = None
    """Repository of official weights whose keys leave it open."""
    heads: int | None = None
    """Attention heads of official weights of an unpublished width."""
    weights: Weights = "ema"
    """Which of a training checkpoint's."""


@final
@dataclass(frozen=True)
class Source:
    """A network with the way from its latents to uint8 images, on one device."""

    backbone: Backbone
    objective: Objective
    decode: Callable[[Tensor], Tensor]
    """Latents (B,C,h,w) to uint8 (B,c,H,W), c 1 or 3."""
    weights: str
    """Hash of the network's weights."""
    decoder: str
    """Hash of the decoder's weights."""
    defaults: dict[str, Any]
    """Order fields that are taken where the user gives none."""
    reading: dict[str, Any] = field(default_factory=dict)
    """How official weights were read, which their bytes do not tell."""
    note: str = ""
    """What official weights were found to be, in words."""

    def facts(self) -> dict[str, Any]:
        """What the settings beside the images say of it."""
        return {"weights": self.weights, "decoder": self.decoder, "rounding": ROUNDING, **self.reading}


def open_source(origin: Origin, device: torch.device | str = "cpu") -> Source:
    """Open a run's final EMA weights, or official weights. Raises UserError for what is missing."""
    load_builtins()
    return _official(origin, device) if origin.official else _run(origin, device)


def _run(origin: Origin, device: torch.device | str) -> Source:
    run = past_run.open_run(origin.path)
    files = run.weight_files("ema")
    if not files:
        raise UserError(f"{origin.path} has no weights yet; finish it with `stbench run` first")
    spec = run.prepared.spec
    network, settings = run.load(files[max(files)]), spec.eval
    dataset = _decoded_by(run.prepared.dataset, origin.vae).to(device)
    return Source(
        backbone=network.to(device),
        objective=build_objective(spec.objective),
        decode=dataset.decode,
        weights=tensors_hash(list(network.state_dict().values())),
        decoder=dataset.decoder,
        defaults={
            "sampler": settings.sampler,
            "steps": settings.steps,
            "labels": settings.labels,
            "interval": settings.interval,
            "channels": settings.channels,
        },
    )


def _decoded_by(dataset: Dataset, vae: str | None) -> Dataset:
    if vae is None:
        return dataset
    if not isinstance(dataset, PathDataset):
        raise UserError(f"--vae is for runs on prepared data: {dataset.name} has its own decoder; drop it")
    return dataset.decoded_by(vae)


def _official(origin: Origin, device: torch.device | str) -> Source:
    if origin.vae is None:
        raise UserError(
            "official weights want a decoder: add --vae sd-vae-ft-ema, sd-vae-ft-mse or a folder, "
            "or none for pixels"
        )
    vae = None if origin.vae == PIXELS else find_vae(origin.vae)
    model = load_official(origin.path, weights=origin.weights, heads=origin.heads, original=origin.original)
    found = model.backbone.info.channels
    if found != (3 if vae is None else vae.latent_channels):
        decodes = "is for pixels, of 3" if vae is None else f"decodes {vae.latent_channels}"
        raise UserError(
            f"{origin.path} makes latents of {found} channels, --vae {origin.vae} {decodes}; "
            "give the autoencoder that it was trained with"
        )
    objective = build_objective(model.objective)
    return Source(
        backbone=model.backbone.to(device),
        objective=objective,
        decode=_decoder(vae, device),
        weights=model.sha256,
        decoder="pixels" if vae is None else vae.sha256,
        defaults={
            "sampler": PUBLISHED_SAMPLERS[model.family],
            "steps": PUBLISHED_STEPS[model.family],
            "labels": "random",
            "interval": (0.0, 1.0),
            "channels": model.guided,
        },
        reading={
            "network": f"{model.family}-{model.size}",
            "objective": model.objective,
            **{name: model.options.get(name) for name in ("heads", "noise_at_zero", "time_scale")},
        },
        note=model.source,
    )


def _decoder(vae: VAEInfo | None, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """From what a network draws (B,C,h,w) to uint8 images; without an autoencoder those are pixels."""
    if vae is None:
        return to_uint8
    autoencoder, scale, shift = vae.load().to(device), vae.scale, vae.shift
    return lambda z: to_uint8(autoencoder.decode(z.float() / scale + shift))
