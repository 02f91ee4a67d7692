"""LayerSync (repository vita-epfl/LayerSync): deeper blocks of the same forward pass teach shallower ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import NonNegativeFloat

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.recipe import Stage, Step, Supervision, Term, computed
from stbench.core.registry import RECIPES
from stbench.models import align

Pairs = Sequence[tuple[int, int]]
Several = Literal["sum", "released"]


@dataclass
class LayerSync(Supervision):
    """-cosine(h_weak, stopgrad(h_strong)) over channels, summed over pairs; no head, no second forward."""

    pairs: Pairs
    weight: float
    several: Several

    @property
    def taps(self) -> Sequence[int]:
        """Every block of every pair, once."""
        return sorted({block for pair in self.pairs for block in pair})

    def terms(self, step: Step) -> Mapping[str, Term]:
        """The sum over pairs, or the last pair alone, which is all that the released loop keeps."""
        pairs = self.pairs[-1:] if self.several == "released" else self.pairs
        features = step.features
        values = [-align.cosine(features[weak], features[strong].detach()) for weak, strong in pairs]
        return {"layersync": Term(torch.stack(values).sum(0), self.weight)}


def published_pairs(info: BackboneInfo) -> Pairs:
    """Blocks 8 and 16 (1-based) of SiT-XL's 28; other depths keep the relative position."""
    return [(align.relative_block(info.depth, 8, 28), align.relative_block(info.depth, 16, 28))]


@RECIPES.register_module(name="layersync")
def layersync(
    info: BackboneInfo,
    *,
    pairs: Sequence[tuple[int, int]] = computed(lambda c: published_pairs(c.info)),
    weight: NonNegativeFloat = 0.2,
    several: Several = "sum",
) -> Sequence[Stage]:
    """Align a weak block with a stronger, stop-gradient block of the same forward pass.

    pairs: [[weak, strong], ...], 0-based (published, 1-based: 8 and 16 of SiT-XL's 28; other sizes follow
    its relative depth). weight: 0.2 as published for XL. several: `sum` adds the pairs up; `released` keeps
    the last one, as the released loop does.
    """
    if not pairs:
        raise UserError("recipe.pairs wants at least one pair, got none; for example [[1,3]]")
    for weak, strong in pairs:
        if weak == strong:
            raise UserError(
                f"recipe.pairs wants two different blocks, got [{weak},{strong}], which would train vanilla; "
                f"for example [[0,{info.depth - 1}]]"
            )
        if not (0 <= weak < info.depth and 0 <= strong < info.depth):
            raise UserError(
                f"recipe.pairs holds [{weak},{strong}], {info.name}-{info.size} has blocks "
                f"0..{info.depth - 1}; try --set recipe.pairs=[[0,{info.depth - 1}]]"
            )
    recipe = LayerSync(tuple(tuple(pair) for pair in pairs), weight, several)  # type: ignore[misc]
    return [Stage("layersync", lambda earlier: recipe)]
