"""SARA's structural term on top of REPA (third-party repository SwayStar123/REG, branch invae-sara)."""

from __future__ import annotations

from collections.abc import Sequence

from stbench.core.backbone import BackboneInfo
from stbench.core.ranges import Block, Name, NonNegativeReal, StepsOrZero, Width
from stbench.core.recipe import Stage, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.recipes import repa
from stbench.recipes.repa import Names


@RECIPES.register_module(name="sara")
@computed_defaults
def sara(
    info: BackboneInfo,
    *,
    encoder: Names = computed(lambda c: repa.default_encoder(c.info)),
    checkpoint: Name | Sequence[Name | None] | None = None,
    block: Block = computed(lambda c: repa.published_block(c.info)),
    weight: NonNegativeReal = 0.5,
    hidden: Width = computed(lambda c: repa.default_hidden(c.info)),
    structure: NonNegativeReal = 0.5,
    stop: StepsOrZero | None = None,
) -> Sequence[Stage]:
    """REPA that also matches the cosines between the tokens of an image.

    SARA's adversarial term is not implemented. The authors released no code; the third party's leaves that
    term out as well.

    structure: weight of the structural term; 0.5 as in that code.
    encoder, checkpoint, block, weight, hidden, stop: as in repa.
    """
    return repa.stages(
        "sara",
        info,
        encoder,
        checkpoint,
        block=block,
        weight=weight,
        hidden=hidden,
        structure=structure,
        stop=stop,
    )
