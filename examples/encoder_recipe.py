"""A recipe with an external encoder: stbench run --plugin examples/encoder_recipe.py --recipe relations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stbench.core.backbone import BackboneInfo
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES
from stbench.models import align, encoders


@dataclass
class Relations(Supervision):
    """MSE between the token-to-token cosines of h_k and those of a frozen encoder on the clean image."""

    source: encoders.EncoderSpec
    block: int
    tokens: int
    weight: float
    _encoder: encoders.ImageEncoder | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def needs(self) -> str:
        """Name the encoder in the leaderboard row: its training is not part of the cost."""
        return self.source.needs

    @property
    def contents(self) -> Mapping[str, Any]:
        """Hash what the option `checkpoint` names, not its path: a moved file is the same run."""
        return {"encoder": self.source.name, "checkpoint": self.source.sha256}

    @property
    def images(self) -> bool:
        """Request the clean images, which the encoder sees."""
        return True

    @property
    def taps(self) -> Sequence[int]:
        """Student blocks to read, 0-based."""
        return (self.block,)

    def setup(self, device: torch.device) -> None:
        """Load the encoder, frozen, once."""
        encoder = encoders.open_encoder(self.source, self.tokens, device)
        assert isinstance(encoder, encoders.ImageEncoder)
        self._encoder = encoder

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compare the relations; `step.encode` runs without gradients and counts FLOPs."""
        assert self._encoder is not None, "setup() has not run"
        target = step.encode(self._encoder, step.batch.extras["images"])
        error = align.mse(self.relations(step.features[self.block]), self.relations(target))
        return {"relations": Term(error, self.weight)}

    def relations(self, tokens: Tensor) -> Tensor:
        """Return the cosines (B,N,N) between the tokens (B,N,D) of each image."""
        unit = F.normalize(tokens.float(), dim=-1)
        return unit @ unit.transpose(1, 2)


@RECIPES.register_module(name="relations")
def relations(
    info: BackboneInfo,
    *,
    encoder: str = encoders.DIGITS,
    checkpoint: str | None = None,
    block: int = 2,
    weight: float = 0.5,
) -> Sequence[Stage]:
    """Align the relations between tokens with those of an encoder: `digits`, or a timm model.

    checkpoint: file with local weights of a timm model.
    """
    source = encoders.find_encoder(encoder, Path(checkpoint) if checkpoint else None)
    supervision = Relations(source, info.block("recipe.block", block), info.tokens, weight)
    return [Stage("relations", lambda earlier: supervision)]
