"""Blocks that see fewer tokens: stbench run --plugin examples/route_recipe.py --recipe checkerboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stbench.core.backbone import BackboneInfo, Route
from stbench.core.guides import RouteGuide
from stbench.core.objective import Batch, Noised
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES


@dataclass
class Checkerboard(Supervision):
    """No auxiliary loss: the blocks between the first and the last one see every second token."""

    depth: int
    tokens: int

    def inputs(self, batch: Batch, noised: Noised) -> Mapping[str, Any]:
        """Route the kept tokens (B,n); the prediction and the loss still cover all tokens."""
        kept = torch.arange(0, self.tokens, 2, device=batch.x0.device).expand(len(batch.y), -1)
        return {"routes": (Route(1, self.depth - 2, kept),)}

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Return no terms."""
        return {}


@RECIPES.register_module(name="checkerboard")
def checkerboard(info: BackboneInfo) -> Sequence[Stage]:
    """Let the middle blocks process half of the tokens; sampling uses all of them."""
    info.require("route", "recipe 'checkerboard'")
    supervision, guide = Checkerboard(info.depth, info.tokens), RouteGuide(1, info.depth - 2, scale=1.5)
    return [Stage("checkerboard", lambda earlier: supervision, guides={"route": guide})]
