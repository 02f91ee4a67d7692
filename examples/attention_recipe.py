"""Attention maps of the student: stbench run --plugin examples/attention_recipe.py --recipe sharpen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stbench.core.backbone import BackboneInfo
from stbench.core.objective import Batch, Noised
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES


@dataclass
class Sharpen(Supervision):
    """Entropy of the attention of one block, averaged over heads and queries."""

    block: int
    weight: float

    def inputs(self, batch: Batch, noised: Noised) -> Mapping[str, Any]:
        """Ask the forward pass for the block's logits. A `mask` (B,N,N) would be passed in here, too."""
        return {"attention": (self.block,)}

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the entropy from the logits (B,heads,N,N)."""
        log_weights = step.attention[self.block].float().log_softmax(-1)
        entropy = -(log_weights.exp() * log_weights).sum(-1)
        return {"entropy": Term(entropy.mean((1, 2)), self.weight)}


@RECIPES.register_module(name="sharpen")
def sharpen(info: BackboneInfo, *, block: int = 2, weight: float = 0.01) -> Sequence[Stage]:
    """Penalise diffuse attention in one block (0-based)."""
    info.require("attention", "recipe 'sharpen'")
    supervision = Sharpen(info.block("recipe.block", block), weight)
    return [Stage("sharpen", lambda earlier: supervision)]
