"""LayerSync (repository vita-epfl/LayerSync): deeper blocks of the same forward pass teach shallower ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.limits import MAX_ITEMS
from stbench.core.ranges import Block, NonNegativeReal
from stbench.core.recipe import Stage, Step, Supervision, Term, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.models import align

Pairs = Annotated[Sequence[tuple[Block, Block]], Field(max_length=MAX_ITEMS)]
"""(weak block, strong block) of each aligned pair, 0-based."""
Several = Literal["sum", "released"]
"""How several pairs are combined."""


@dataclass
class LayerSync(Supervision):
    """-cosine(h_weak, stopgrad(h_strong)) over channels, summed over pairs.

    Needs neither a head nor a second forward pass.
    """

    takes_subsets: ClassVar[bool] = True

    pairs: Pairs
    weight: float
    several: Several

    @property
    def taps(self) -> Sequence[int]:
        """Every block of every pair, once."""
        return sorted({block for pair in self.pairs for block in pair})

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Sum over all pairs, or the last pair alone as in the released code."""
        # The released loop over pairs overwrites its loss, so that only the last pair contributes.
        pairs = self.pairs[-1:] if self.several == "released" else self.pairs
        values = [-align.cosine(*self._both(step, weak, strong)) for weak, strong in pairs]
        return {"layersync": Term(torch.stack(values).sum(0), self.weight)}

    @staticmethod
    def _both(step: Step, weak: int, strong: int) -> tuple[Tensor, Tensor]:
        """Return the features of two blocks: of the tokens that both have, if one is inside a route."""
        a, b, kept = step.features[weak], step.features[strong].detach(), step.kept
        if (weak in kept) == (strong in kept):
            return a, b
        return align.at_kept(a, kept.get(strong)), align.at_kept(b, kept.get(weak))


def published_pairs(info: BackboneInfo) -> Pairs:
    """Return the default pair: the relative depth of blocks 8 and 16 (1-based) of SiT-XL's 28."""
    return [(align.relative_block(info.depth, 8, 28), align.relative_block(info.depth, 16, 28))]


@RECIPES.register_module(name="layersync")
@computed_defaults
def layersync(
    info: BackboneInfo,
    *,
    pairs: Pairs = computed(lambda c: published_pairs(c.info)),
    weight: NonNegativeReal = 0.2,
    several: Several = "sum",
) -> Sequence[Stage]:
    """Align a weak block with a stronger, stop-gradient block of the same forward pass.

    pairs: list of weak and strong block, 0-based, such as [[1,3],[2,5]]. Default: the relative depth of the
      published pair (1-based: 8 and 16 of SiT-XL's 28).
    weight: weight of the loss; 0.2 as published for XL.
    several: `sum` adds the losses of all pairs; `released` keeps the last pair only, as the released loop
      does.
    """
    _check_pairs(pairs, info)
    supervision = LayerSync(
        pairs=tuple(tuple(pair) for pair in pairs),  # type: ignore[misc]
        weight=weight,
        several=several,
    )
    return [Stage("layersync", lambda earlier: supervision)]


def _check_pairs(pairs: Pairs, info: BackboneInfo) -> None:
    """Raise UserError if there is no pair, or a pair of equal or missing blocks."""
    if not pairs:
        raise UserError("recipe.pairs must contain at least one pair, got none; for example [[1,3]]")
    for weak, strong in pairs:
        if weak == strong:
            # The cosine of a block with itself is constant: the run would be vanilla under another name.
            raise UserError(
                f"recipe.pairs must pair two different blocks, got [{weak},{strong}], which would train "
                f"vanilla; for example [[0,{info.depth - 1}]]"
            )
        if not (0 <= weak < info.depth and 0 <= strong < info.depth):
            raise UserError(
                f"recipe.pairs contains [{weak},{strong}], but {info.name}-{info.size} has blocks "
                f"0..{info.depth - 1}; try --set recipe.pairs=[[0,{info.depth - 1}]]"
            )
