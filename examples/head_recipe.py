"""A head that stays with the network: stbench run --plugin examples/head_recipe.py --recipe early-exit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from stbench.core.backbone import BackboneInfo
from stbench.core.guides import HeadGuide
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES


@dataclass
class EarlyExit(Supervision):
    """The denoising loss of an output layer on a hidden block."""

    block: int
    weight: float

    @property
    def taps(self) -> Sequence[int]:
        """Student blocks to read, 0-based."""
        return (self.block,)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Predict from the block; the head also needs the embedding of time and label."""
        early = step.project("exit", step.features[self.block], step.condition)
        return {"early-exit": Term(step.objective.loss(early, step.noised), self.weight)}


@RECIPES.register_module(name="early-exit")
def early_exit(info: BackboneInfo, *, block: int = 2, weight: float = 0.5) -> Sequence[Stage]:
    """Let one block (0-based) predict as well, through an output layer that is saved with the network."""
    supervision = EarlyExit(info.block("recipe.block", block), weight)
    stage = Stage("early-exit", lambda earlier: supervision, heads=lambda net: {"exit": net.output_head()})
    return [replace(stage, guides={"exit": HeadGuide("exit", block, scale=1.4)})]  # for --guide exit:1.4
