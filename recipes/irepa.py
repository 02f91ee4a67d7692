"""iREPA (repository End2End-Diffusion/iREPA): REPA that stresses the spatial structure of the tokens."""

from __future__ import annotations

from collections.abc import Sequence

from stbench.core.backbone import BackboneInfo
from stbench.core.ranges import Block, Fraction, Name, NonNegativeReal, Pixels, StepsOrZero, Width
from stbench.core.recipe import Stage, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.recipes import repa
from stbench.recipes.repa import Names, Normalise, Projector


@RECIPES.register_module(name="irepa")
@computed_defaults
def irepa(
    info: BackboneInfo,
    *,
    encoder: Names = computed(lambda c: repa.default_encoder(c.info)),
    checkpoint: Name | Sequence[Name | None] | None = None,
    block: Block = computed(lambda c: repa.published_block(c.info)),
    weight: NonNegativeReal = 1.0,
    projector: Projector = "conv",
    hidden: Width | None = computed(repa.hidden_of),
    kernel: Pixels | None = computed(repa.kernel_of),
    normalise: Normalise = "spatial",
    alpha: Fraction | None = computed(repa.alpha_of),
    stop: StepsOrZero | None = None,
) -> Sequence[Stage]:
    """REPA with a convolution as projector and targets that are normalised over the image.

    weight: weight of the loss; 1.0 as published for latent diffusion (JiT: 0.5).
    kernel: kernel of the convolution, an odd number; 3 as published. The released configuration for latent
      diffusion leaves it at 1.
    alpha: share of the mean that is subtracted; 0.6 as published for latent diffusion (JiT: 0.8).
    encoder: as in repa; published for B/2: PE-G.
    checkpoint, block, projector, hidden, normalise, stop: as in repa.
    """
    return repa.stages(
        "irepa",
        info,
        encoder,
        checkpoint,
        block=block,
        weight=weight,
        projector=projector,
        hidden=hidden,
        kernel=kernel,
        normalise=normalise,
        alpha=alpha,
        stop=stop,
    )
