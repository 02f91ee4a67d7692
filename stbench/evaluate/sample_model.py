"""Load a network to sample from, with its decoder: from a run folder, or from an official checkpoint."""

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
from stbench.core.registry import load_builtins, load_plugins
from stbench.data.dataset import Dataset
from stbench.data.path_dataset import PathDataset
from stbench.data.spec import PIXELS
from stbench.evaluate.extractors import tensors_hash
from stbench.evaluate.guides import LoadedGuides, load_guides
from stbench.evaluate.past_run import open_run
from stbench.evaluate.run_plugins import PluginChoice
from stbench.models.autoencoder import ROUNDING, VAEInfo, find_vae, to_uint8
from stbench.models.official import load_official
from stbench.runs.recorded import require_recorded

PUBLISHED_SAMPLERS = {"dit": "ddpm", "sit": "euler-maruyama", "uvit": "dpm-solver"}
"""Backbone family -> sampler that its paper uses."""
PUBLISHED_STEPS = {"dit": 250, "sit": 250, "uvit": 50}
"""Backbone family -> number of sampler steps that its paper uses."""


@dataclass(frozen=True)
class ModelLocation:
    """Where the network and its decoder are stored. Picklable: every worker process loads them again."""

    path: Path
    """A run folder, or a file of official weights."""
    official: bool = False
    vae: str | None = None
    """Decoder: a diffusers folder, a published name, or "none" for pixels; None for a run's own."""
    original: str | None = None
    """Repository of official weights, if their keys are ambiguous."""
    heads: int | None = None
    """Attention heads of official weights of an unpublished width."""
    weights: Weights = "ema"
    """Which weights of an official training checkpoint."""
    objective: str | None = None
    """Objective of official weights that do not say the path of their SiT."""
    plugins: PluginChoice = field(default_factory=PluginChoice)
    """Plug-in files that may be executed."""
    guides: str = ""
    """Guides to sample with; see docs/guidance.md."""


@final
@dataclass(frozen=True)
class SamplingModel:
    """A network and the decoder that turns its latents into uint8 images, on one device."""

    backbone: Backbone
    objective: Objective
    decode: Callable[[Tensor], Tensor]
    """Latents (B,C,h,w) to uint8 (B,c,H,W), c 1 or 3."""
    weights_hash: str
    decoder_hash: str
    """ "pixels" for a network that generates pixels."""
    defaults: dict[str, Any]
    """Values of the `SampleSpec` fields that a request leaves open."""
    import_options: dict[str, Any] = field(default_factory=dict)
    """How official weights were interpreted, or which plug-ins of a run have changed; no hash covers this."""
    description: str = ""
    """Which official checkpoint was recognised; empty for a run."""
    guides: LoadedGuides = field(default_factory=LoadedGuides)
    """Guides on the same device."""

    def identity(self) -> dict[str, Any]:
        """Return what the stored sampling settings record of the model."""
        return {
            "weights": self.weights_hash,
            "decoder": self.decoder_hash,
            "rounding": ROUNDING,
            **self.import_options,
            **({"guides": self.guides.text} if self.guides.text else {}),
        }


def load_model(location: ModelLocation, device: torch.device | str = "cpu") -> SamplingModel:
    """Load a run's final EMA weights, or official weights, on `device`.

    Raises UserError if the run has no weights yet, if a file is missing or damaged, or if the decoder does
    not fit the network.
    """
    load_builtins()  # a worker process starts with empty registries
    return _load_official(location, device) if location.official else _load_run(location, device)


def _load_run(location: ModelLocation, device: torch.device | str) -> SamplingModel:
    run = open_run(location.path, location.plugins)
    spec = run.prepared.spec
    network, settings = run.load(run.final_file("ema")), spec.eval
    objective = build_objective(spec.objective, spec.objective_options)
    declared = run.last_stage.definition.guides
    dataset = _with_decoder(run.prepared.dataset, location.vae).to(device)
    return SamplingModel(
        backbone=network.to(device),
        objective=objective,
        guides=load_guides(location.guides, declared, objective, device),
        decode=dataset.decode,
        weights_hash=tensors_hash(list(network.state_dict().values())),
        decoder_hash=dataset.decoder,
        defaults={
            "sampler": settings.sampler,
            "steps": settings.steps,
            "labels": settings.labels,
            "interval": settings.interval,
            "channels": settings.channels,
        },
        import_options={"changed_plugins": dict(run.changed)} if run.changed else {},
    )


def _with_decoder(dataset: Dataset, vae: str | None) -> Dataset:
    """Return the data set with another decoder, or unchanged for None."""
    if vae is None:
        return dataset
    if not isinstance(dataset, PathDataset):
        raise UserError(
            f"--vae applies to runs on prepared data; {dataset.name} has its own decoder; drop it"
        )
    return dataset.decoded_by(vae)


def _load_official(location: ModelLocation, device: torch.device | str) -> SamplingModel:
    if location.vae is None:
        raise UserError(
            "official weights need a decoder: add --vae sd-vae-ft-ema, sd-vae-ft-mse or a folder, "
            "or none for pixels"
        )
    load_plugins(location.plugins.files)
    # "none" is a value of --vae: the network generates pixels.
    vae = None if location.vae == PIXELS else find_vae(location.vae)
    require_recorded(location.path)
    model = load_official(
        location.path,
        weights=location.weights,
        heads=location.heads,
        original=location.original,
        objective=location.objective,
    )

    # The decoder must take as many channels as the network generates.
    channels = model.backbone.info.channels
    expected = 3 if vae is None else vae.latent_channels
    if channels != expected:
        raise UserError(
            f"{location.path} generates {channels} channels, but --vae {location.vae} takes {expected}; "
            "give the autoencoder it was trained with"
        )
    objective = build_objective(model.objective)
    return SamplingModel(
        backbone=model.backbone.to(device),
        objective=objective,
        guides=load_guides(location.guides, model.guides, objective, device),
        decode=_decoder(vae, device),
        weights_hash=model.sha256,
        decoder_hash="pixels" if vae is None else vae.sha256,
        defaults={
            "sampler": PUBLISHED_SAMPLERS[model.family],
            "steps": PUBLISHED_STEPS[model.family],
            "labels": "random",
            "interval": (0.0, 1.0),
            "channels": model.guided_channels,
        },
        import_options={
            "network": f"{model.family}-{model.size}",
            "objective": model.objective,
            **{name: model.options.get(name) for name in ("heads", "noise_at_zero", "time_scale")},
        },
        description=model.description,
    )


def _decoder(vae: VAEInfo | None, device: torch.device | str) -> Callable[[Tensor], Tensor]:
    """Return the map from generated latents (B,C,h,w) to uint8 images; None decodes pixels."""
    if vae is None:
        return to_uint8
    autoencoder, scale, shift = vae.load().to(device), vae.scale, vae.shift
    return lambda z: to_uint8(autoencoder.decode(z.float() / scale + shift))
