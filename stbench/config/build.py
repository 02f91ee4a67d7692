"""Build backbones, objectives and stages from a run specification."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from stbench.config.spec import BackboneSpec, RunSpec
from stbench.core.backbone import Backbone, BackboneInfo, attach_heads
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.core.recipe import Stage
from stbench.core.registry import BACKBONES, OBJECTIVES, RECIPES, lookup


def build_backbone(
    spec: BackboneSpec,
    objective: str,
    dataset: Any,
    device: str = "cpu",
    seed: int = 0,
    heads: Callable[[Backbone], Mapping[str, nn.Module]] | None = None,
) -> Backbone:
    """Build the network of a specification for the latents of a data set.

    The weights are drawn from a separate generator, so the global random state does not change. `heads`
    builds the heads that belong to the network of a stage (see `Stage.heads`).

    Raises:
        UserError: If the options do not fit together.
    """
    family = lookup(BACKBONES, spec.name)
    out = build_objective(objective).out_channels(dataset.channels)
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network: Backbone = family(
                channels=dataset.channels,
                input_size=dataset.input_size,
                classes=dataset.classes,
                out_channels=out,
                size=spec.size_name,
                **spec.effective,
            )
        except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{spec.name}-{spec.size_name} cannot be built with {spec.options}: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; "
                f"change the backbone.* options"
            ) from error
        if heads is not None:
            attach_heads(network, heads(network))
    if spec.size_name != spec.size:
        with suppress(AttributeError):  # a plug-in may compute its info
            network.info = replace(network.info, preset=spec.size)
    if network.info.depth < 1:
        raise UserError(
            f"{spec.name} must have at least one block, got {network.info.depth}; increase backbone.depth"
        )
    return network


def build_objective(name: str, options: Mapping[str, Any] = MappingProxyType({})) -> Objective:
    """Build a registered objective.

    Raises:
        UserError: If it cannot be built with these options.
    """
    try:
        return lookup(OBJECTIVES, name)(**options)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"objective '{name}' cannot be built with {dict(options)}: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            f"change the objective.* options"
        ) from error


def recipe_stages(spec: RunSpec, info: BackboneInfo) -> list[Stage]:
    """Call the recipe function of a specification with its effective options.

    Raises:
        UserError: If the function fails or does not return stages.
    """
    name = spec.recipe.name
    try:
        stages: Sequence[Stage] = list(lookup(RECIPES, name)(info, **spec.recipe.effective))
    except UserError:
        raise
    except Exception as error:  # the recipe function of a plug-in may raise anything
        raise UserError(
            f"recipe '{name}' failed: {type(error).__name__}: {error}; fix the recipe function"
        ) from error
    if not stages or not all(isinstance(stage, Stage) for stage in stages):
        raise UserError(
            f"recipe '{name}' must return a list of at least one Stage, got {stages!r}; "
            f"fix the recipe function"
        )
    return list(stages)
