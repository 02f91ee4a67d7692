"""A recipe that needs images: stbench run --plugin examples/image_recipe.py --recipe patch-colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES
from stbench.models import align


@dataclass
class PatchColours(Supervision):
    """MSE between a projection of h_k and the mean colour of the image patch of each token."""

    block: int
    weight: float
    channels: int = 3
    """Most channels that an image can have; a grey image is repeated to this number."""

    @property
    def images(self) -> bool:
        """Request the clean images: uint8 (B,c,H,W) in `step.batch.extras["images"]`."""
        return True

    @property
    def taps(self) -> Sequence[int]:
        """Student blocks to read, 0-based."""
        return (self.block,)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """A projector from the student's width to a colour."""
        return nn.ModuleDict({"projector": align.projector(info.width, info.width, self.channels)})

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the error of the colours in [0,1]."""
        found = step.project("projector", step.features[self.block])
        target = self.colours(step.batch.extras["images"].to(found.device), step.info.tokens)
        return {"patch-colours": Term(align.mse(found, target), self.weight)}

    def colours(self, images: Tensor, tokens: int) -> Tensor:
        """Return the mean colours (B,N,3) of the patches of uint8 images (B,c,H,W), one per token."""
        pooled = F.adaptive_avg_pool2d(images.float() / 255.0, math.isqrt(tokens))
        return pooled.expand(-1, self.channels, -1, -1).flatten(2).transpose(1, 2)


@RECIPES.register_module(name="patch-colours")
def patch_colours(info: BackboneInfo, *, block: int = 1, weight: float = 0.5) -> Sequence[Stage]:
    """Predict the mean colour of each image patch from the features of one block (0-based)."""
    supervision = PatchColours(info.block("recipe.block", block), weight)
    return [Stage("patch-colours", lambda earlier: supervision)]
