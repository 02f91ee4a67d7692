"""Denoising without supervision: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence

from stbench.core.backbone import BackboneInfo
from stbench.core.recipe import NoSupervision, Stage
from stbench.core.registry import RECIPES


@RECIPES.register_module(name="vanilla")
def vanilla(info: BackboneInfo) -> Sequence[Stage]:
    """Train with the denoising loss alone: the baseline of every speed-up."""
    return [Stage("vanilla", lambda earlier: NoSupervision())]
