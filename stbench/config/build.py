"""Build backbones, objectives and stages from a run specification."""

from __future__ import annotations

from typing import Any

import torch

from stbench.config.spec import BackboneSpec, RunSpec
from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.core.recipe import Stage
from stbench.core.registry import BACKBONES, OBJECTIVES, RECIPES, lookup


def build_backbone(
    spec: BackboneSpec, objective: str, dataset: Any, device: str = "cpu", seed: int = 0
) -> Backbone:
    """The network of a spec for a data set's latents, freshly initialised from a generator of its own."""
    family = lookup(BACKBONES, spec.name)
    preset = {k: v for k, v in family.presets[spec.size].items() if k != "objective"}
    kwargs = {**preset, **spec.options}
    out = build_objective(objective).out_channels(dataset.channels)
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network: Backbone = family(
                channels=dataset.channels,
                input_size=dataset.input_size,
                classes=dataset.classes,
                out_channels=out,
                size=spec.size,
                **kwargs,
            )
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{spec.name}-{spec.size} cannot be built with {spec.options}: {error}; "
                f"change the backbone.* options"
            ) from error
    if network.info.depth < 1:
        raise UserError(
            f"{spec.name} wants at least one block, got {network.info.depth}; raise backbone.depth"
        )
    return network


def build_objective(name: str) -> Objective:
    """A registered objective by name."""
    return lookup(OBJECTIVES, name)()


def stages_of(spec: RunSpec, info: BackboneInfo) -> list[Stage]:
    """The method's stages for this network."""
    name = spec.recipe.name
    try:
        stages = list(lookup(RECIPES, name)(info, **spec.recipe.resolved))
    except UserError:
        raise
    except Exception as error:  # a plug-in's method may raise anything
        raise UserError(
            f"recipe '{name}' failed: {type(error).__name__}: {error}; mend its method"
        ) from error
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise UserError(
            f"recipe '{name}' wants a list of at least one Stage, got {stages!r}; mend its method"
        )
    return stages
