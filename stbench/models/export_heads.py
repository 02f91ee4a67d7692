"""Heads that published repositories store with the network, under their names: trained, or zeros.

A repository's sampling script loads them with the network although it does not use them, so a file without
them does not load there. Zeros serve as well: the prediction does not depend on them. Only Internal Guidance
samples with its head, which stays with the network; see `official_heads`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from stbench.core.backbone import BackboneInfo
from stbench.models.repositories import KEPT_HEAD
from stbench.models.weights import State

HeadsOf = Literal["repa", "sra", "vae-align", "self-transcendence", "internal-guidance"]
"""Recipes whose repositories store heads with the network."""

RENAMED: Mapping[str, Mapping[str, str]] = {
    "repa": {"": "projectors."},
    "sra": {"head.": "ap_head."},
    "vae-align": {"velocity.0.": "projectors.", "velocity.1.": "projectors_final."},
    "self-transcendence": {"projector.": "projectors."},
}
"""Recipe -> our prefix of a head's parameters -> the repository's."""

PROJECTOR_DIM = 2048
"""Hidden width of the projectors that the scripts of REPA and Self-Transcendence build."""

DINOV2_B = 768
"""Width of REPA's published encoder."""


def stores_heads(recipe: str) -> bool:
    """Whether the repository of a recipe stores heads with the network."""
    return recipe in get_args(HeadsOf)


def rename_heads(recipe: HeadsOf, heads: State) -> dict[str, Tensor]:
    """Return the heads of one of our runs under the names of its repository."""
    renamed = {}
    for key, value in heads.items():
        prefix = next(ours for ours in RENAMED[recipe] if key.startswith(ours))
        renamed[RENAMED[recipe][prefix] + key.removeprefix(prefix)] = value
    return renamed


def zero_heads(recipe: HeadsOf, info: BackboneInfo) -> dict[str, Tensor]:
    """Return heads of zeros, of the shapes that the repository's code builds for this network."""
    width, hidden = info.width, PROJECTOR_DIM
    patch = info.patch**2 * info.channels
    if recipe == "internal-guidance":
        layers = {
            f"{KEPT_HEAD}linear": (patch, width),
            f"{KEPT_HEAD}adaLN_modulation.1": (2 * width, width),
        }
    elif recipe == "sra":
        layers = {"ap_head.linear1": (2 * width, width), "ap_head.linear2": (width, 2 * width)}
    else:
        prefix, out = ("projectors.0", DINOV2_B) if recipe == "repa" else ("projectors", width)
        shapes = ((hidden, width), (hidden, hidden), (out, hidden))
        layers = {f"{prefix}.{2 * k}": shape for k, shape in enumerate(shapes)}
        if recipe == "vae-align":
            layers["projectors_final.linear"] = (patch, width)
    zeros: dict[str, Tensor] = {}
    for name, shape in layers.items():
        zeros |= {f"{name}.weight": torch.zeros(shape), f"{name}.bias": torch.zeros(shape[0])}
    return zeros
