"""A recipe in one file: stbench run --plugin examples/my_recipe.py --backbone sit --recipe ema-pull."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from stbench.core.backbone import BackboneInfo
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES
from stbench.models import align


@dataclass  # the fields identify the stage
class EmaPull(Supervision):
    """1 - cosine(projector(h_k), h_k of the EMA at the same x_t, t and label)."""

    block: int
    weight: float

    @property
    def taps(self) -> Sequence[int]:
        """Student blocks to read, 0-based."""
        return (self.block,)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """Modules trained with the student and discarded at evaluation."""
        return nn.ModuleDict({"projector": align.projector(info.width, info.width, info.width)})

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Auxiliary losses (B,); `step.teach` and `step.project` count their FLOPs."""
        noised, y = step.noised, step.batch.y
        target = step.teach(step.ema, noised.x_t, noised.t, y, block=self.block)
        tokens = step.project("projector", step.features[self.block])
        return {"ema-pull": Term(1.0 - align.cosine(tokens, target), self.weight)}


@RECIPES.register_module(name="ema-pull")
def ema_pull(info: BackboneInfo, *, block: int = 2, weight: float = 0.5) -> Sequence[Stage]:
    """Pull the features of one block (0-based) towards those of the EMA."""
    supervision = EmaPull(info.block("recipe.block", block), weight)
    return [Stage("ema-pull", lambda earlier: supervision)]
