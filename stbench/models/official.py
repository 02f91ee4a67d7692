"""Load checkpoints of the published repositories as our networks, configured from their keys and shapes.

DiT, SiT, REPA, SRA, LayerSync, Dispersive loss, Self-Transcendence, Internal Guidance and U-ViT. Networks
that were trained with noise at t=0 are converted to our direction of time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, Weights
from stbench.core.errors import UserError
from stbench.core.guides import Guide, HeadGuide
from stbench.core.registry import BACKBONES, lookup
from stbench.models.external import read_external, shown
from stbench.models.fit import (
    fitting,
    require_heads,
    require_same_keys,
    require_same_shapes,
)
from stbench.models.official_heads import HEAD, attach_head
from stbench.models.repositories import HEAD_PREFIXES, KEPT_HEAD, Repository, identify
from stbench.models.weights import State, require_finite, tensors_sha256

SIT_PATHS = {"linear": "linear", "cosine": "cosine", "gvp": "cosine"}
"""Path types in the options of the SiT repositories -> our objectives."""

SETTINGS = {"path_type": "linear", "prediction": "v"}
"""Options of the SiT repositories that decide the objective -> their default."""

SIT_OBJECTIVES = {
    "linear": "linear",
    "cosine": "cosine",
    "linear-lognormal": "linear",
    "cosine-lognormal": "cosine",
}
"""Values of --objective for a SiT -> the objective whose path they use."""


@dataclass(frozen=True)
class OfficialModel:
    """An official checkpoint as one of our networks, and what it was recognised as."""

    backbone: Backbone
    """Frozen, in eval mode, on the CPU, with data at t=0."""
    objective: str
    family: str
    size: str
    """Preset name; "custom" if the size is not published."""
    dropped: tuple[str, ...]
    """Keys that do not belong to the network: the heads of a recipe."""
    description: str
    """Repository, size, direction of time, objective and file, in words."""
    sha256: str
    """Hash of the network's tensors as stored, without the dropped heads; see `tensors_sha256`."""
    options: Mapping[str, Any]
    """Constructor options of the backbone, as read from the file."""
    guided_channels: int | None = None
    """Number of leading channels that its repository guides; None for all."""
    guides: Mapping[str, Guide] = field(default_factory=dict)
    """How the network can be guided at sampling, as in `Stage.guides`."""


def load_official(
    path: Path,
    *,
    weights: Weights = "ema",
    heads: int | None = None,
    original: str | None = None,
    objective: str | None = None,
    family: str | None = None,
) -> OfficialModel:
    """Load the network in an official .pt or .safetensors file.

    `weights` selects "ema" (published samples use it) or "raw" in a training checkpoint; a flat file has one
    set. `heads` is needed if the width is unpublished, `original` (a name in REPOSITORIES) if the keys fit
    repositories with different conventions, `objective` if a SiT does not say its path. `family` is the
    backbone that the user named, if any. Raises UserError for an unreadable or damaged file, for keys, shapes
    or values that fit no family, for an option that contradicts the file, and if one is needed but missing.
    """
    external = read_external(path, weights)
    return from_state(
        external.state,
        external.where,
        external.settings,
        heads=heads,
        original=original,
        objective=objective,
        family=family,
    )


def from_state(
    state: State,
    where: str = "the weights",
    settings: Mapping[str, Any] | None = None,
    *,
    heads: int | None = None,
    original: str | None = None,
    objective: str | None = None,
    family: str | None = None,
) -> OfficialModel:
    """Build the network from tensors; otherwise like `load_official`.

    `where` names the tensors in messages, `settings` are the options stored with them.
    """
    settings = settings or {}
    repository = identify(state, settings, original=original, family=family, where=where)

    # Separate the network from the recipe's heads, then build and fill it.
    dropped = tuple(sorted(key for key in state if key.startswith(HEAD_PREFIXES)))
    kept = {key: value for key, value in state.items() if key.startswith(KEPT_HEAD)}
    trunk = _renumbered({key: v for key, v in state.items() if key not in dropped and key not in kept})
    net, options = _build(trunk, repository, heads, where)
    guides = {HEAD: attach_head(net, kept, settings, where)} if kept else {}

    objective = _objective(repository, options, settings, asked=objective, where=where)
    if objective == "iddpm" and options["out_channels"] != 2 * options["channels"]:
        raise UserError(
            f"expected a DiT with learned variance, {2 * options['channels']} channels out, in {where}, "
            f"found {options['out_channels']}; use one trained with learn_sigma"
        )
    size = net.info.size
    network = f"{repository.family}-{size}{_heads(heads)}, {_time(repository)}, objective {objective}"
    return OfficialModel(
        backbone=net,
        objective=objective,
        family=repository.family,
        size=size,
        dropped=dropped,
        description=f"{repository.title}, {network}{_with(guides)}{_without(dropped)}, from {where}",
        sha256=tensors_sha256(trunk | kept),
        options=options,
        guided_channels=repository.guided_channels,
        guides=guides,
    )


def _time(repository: Repository) -> str:
    return "converted from noise at t=0" if repository.noise_at_zero else "data at t=0"


def _heads(given: int | None) -> str:
    """Return " with N heads" if the user gave the number: nothing in the file may confirm it."""
    return "" if given is None else f" with {given} heads"


def _with(guides: Mapping[str, HeadGuide]) -> str:
    """Return ", with its head final_layer_xr after block 8" if the network keeps it, counted as published."""
    return "".join(f", with its head {KEPT_HEAD[:-1]} after block {g.block + 1}" for g in guides.values())


def _without(dropped: Sequence[str]) -> str:
    """Return ", without its heads projectors" for keys that start with "projectors.", "" for no keys."""
    heads = sorted({key.partition(".")[0] for key in dropped})
    return f", without its heads {' and '.join(heads)}" if heads else ""


def _renumbered(state: State) -> dict[str, Tensor]:
    """Rename decoder_blocks.k to blocks.(k+depth): early REPA files restart numbers after the projector."""
    # Blocks before the projector keep their numbers; their count is the offset of the others.
    encoder = len({key.split(".")[1] for key in state if key.startswith("blocks.")})

    def name(key: str) -> str:
        found = re.fullmatch(r"decoder_blocks\.([0-9]{1,6})\.(.*)", key)
        return f"blocks.{int(found[1]) + encoder}.{found[2]}" if found else key

    return {name(key): value for key, value in state.items()}


def _build(
    state: State, repository: Repository, heads: int | None, where: str
) -> tuple[Backbone, dict[str, Any]]:
    """Build the network that the tensors fit, with these weights; returns it and its options."""
    # Infer the constructor options from shapes, and add those that depend on the repository.
    cls = lookup(BACKBONES, repository.family)
    with fitting(repository.family, where):
        options: dict[str, Any] = cls.infer(state, heads)
        require_heads(options, heads, where)
    if repository.noise_at_zero:
        options["noise_at_zero"] = True
    if repository.time_scale is not None:
        options["time_scale"] = repository.time_scale
    elif repository.family == "uvit" and "time_scale" not in options:
        raise UserError(
            f"{where} is a U-ViT of unpublished size, and weights do not tell its time scale; say which: "
            f"--original uvit-discrete or --original uvit-continuous"
        )

    # The meta device initialises nothing: the weights replace every parameter.
    with torch.device("meta"), fitting(repository.family, where):
        net: Backbone = cls(**options)
    require_same_keys(set(net.state_dict()), set(state), repository.family, where)
    require_same_shapes(net.state_dict(), state, repository.family, where)
    values = {key: value.float().clone() for key, value in state.items()}
    require_finite(values, where, "it is damaged, or its training diverged: use another checkpoint")
    net.load_state_dict(values, assign=True)
    return net.eval().requires_grad_(False), options


def _objective(
    repository: Repository,
    options: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    asked: str | None,
    where: str,
) -> str:
    """Return the objective the weights were trained with.

    Raises UserError for one that we do not have, if `asked` is another one, and if neither the file nor
    `asked` says it.
    """
    # The objective of a SiT is a training option; other families have one per repository or size.
    cls = lookup(BACKBONES, repository.family)
    preset = cls.presets.get(options["size"], {})
    if repository.family != "sit":
        own = repository.objective or str(preset.get("objective", cls.objective))
        _require_agreement(own, asked, {}, where)
        return own
    if "path_type" not in settings:
        if asked not in SIT_OBJECTIVES:
            found = "neither" if asked is None else f"--objective {asked}"
            raise UserError(
                f"expected the path of a SiT in {where} or in --objective, found {found}; "
                f"type --objective linear (as all published files) or --objective cosine (GVP)"
            )
        return asked
    path, predicted = (str(shown(settings.get(key, default))) for key, default in SETTINGS.items())
    if path.lower() not in SIT_PATHS or predicted not in ("v", "velocity"):
        raise UserError(
            f"expected a velocity on one of the paths {', '.join(SIT_PATHS)} in {where}, found prediction "
            f"'{predicted}' on path '{path.lower()}'; use another checkpoint"
        )
    own = SIT_PATHS[path.lower()]
    _require_agreement(own, asked, SIT_OBJECTIVES, where)
    return asked or own


def _require_agreement(own: str, asked: str | None, same: Mapping[str, str], where: str) -> None:
    """Raise UserError if `asked` is not None and, translated by `same`, differs from `own`."""
    if asked is not None and same.get(asked, asked) != own:
        raise UserError(
            f"expected weights trained with objective '{asked}' in {where}, found '{own}'; "
            f"use --objective {own}, or another checkpoint"
        )
