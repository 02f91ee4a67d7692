"""REPA, representation alignment (repository sihyun-yu/REPA): a frozen external encoder teaches one block.

The external reference of the suite: its row names the encoder, whose own training is in no figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.recipe import Stage, Step, Supervision, Term, computed
from stbench.core.registry import RECIPES
from stbench.models import align
from stbench.models import encoders as teachers

T = TypeVar("T")


@dataclass
class Repa(Supervision):
    """-weight * cosine(projector_j(h_k), z_j) over channels, averaged over tokens and encoders j, in
    float32.
    """

    sources: Sequence[teachers.EncoderSpec]
    block: int
    weight: float
    hidden: int
    tokens: int
    _encoders: list[teachers.ImageEncoder | teachers.CachedTokens] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def needs(self) -> str:
        """The encoders."""
        return ", ".join(source.needs for source in self.sources)

    @property
    def contents(self) -> Mapping[str, Any]:
        """Names of networks, and hashes of the files that options name."""
        return {
            "encoder": [s.sha256 if s.kind == "cached" else s.name for s in self.sources],
            "checkpoint": [s.sha256 for s in self.sources],
        }

    @property
    def images(self) -> bool:
        """Whether an encoder runs on the images; cached tokens need none."""
        return any(source.kind != "cached" for source in self.sources)

    @property
    def taps(self) -> Sequence[int]:
        """The aligned block."""
        return (self.block,)

    def setup(self, device: torch.device) -> None:
        """Load the encoders."""
        self._encoders = [teachers.open_encoder(source, self.tokens, device) for source in self.sources]

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """A three-layer projector for each encoder."""
        return nn.ModuleDict(
            {str(j): align.projector(info.width, self.hidden, s.width) for j, s in enumerate(self.sources)}
        )

    def targets(self, step: Step) -> list[Tensor]:
        """Each encoder's tokens (B,N,Dz). Cached ones cost one forward for each image of the data set."""
        found = []
        for encoder in self._encoders:
            if isinstance(encoder, teachers.ImageEncoder):
                found.append(step.encode(encoder, step.batch.extras["images"]))
                continue
            if step.images_seen < step.dataset_size:
                step.count_teacher(encoder.flops * len(step.batch.y))
            tokens = encoder.rows(step.batch.index, step.dataset_size)
            found.append(tokens.to(step.noised.x_t.device, non_blocking=True))
        return found

    def terms(self, step: Step) -> Mapping[str, Term]:
        """The mean negative cosine, in [-1,1]."""
        tokens = step.features[self.block]
        values = [
            -align.cosine(step.project(str(j), tokens), target) for j, target in enumerate(self.targets(step))
        ]
        return {"repa": Term(torch.stack(values).mean(0), self.weight)}


def published_block(info: BackboneInfo) -> int:
    """0-based. Published (1-based): 8 of XL's 28 (README) and of L's 24, 4 of B's 12; others follow XL."""
    named = {24: 8, 12: 4}
    return named[info.depth] - 1 if info.depth in named else align.relative_block(info.depth, 8, 28)


def _tiny(info: BackboneInfo) -> bool:
    return info.size.startswith("ti")


@RECIPES.register_module(name="repa")
def repa(
    info: BackboneInfo,
    *,
    encoder: str | Sequence[str] = computed(lambda c: teachers.DIGITS if _tiny(c.info) else teachers.DINOV2),
    checkpoint: str | Sequence[str | None] | None = None,
    block: int = computed(lambda c: published_block(c.info)),
    weight: NonNegativeFloat = 0.5,
    hidden: PositiveInt = computed(lambda c: 4 * c.info.width if _tiny(c.info) else 2048),
) -> Sequence[Stage]:
    """Align one block with a frozen external encoder's tokens of the clean image.

    encoder: a timm model (default vit_base_patch14_dinov2.lvd142m, DINOv2-B, at one token a latent patch),
    `digits` (the shipped encoder, default on ti), a folder of cached tokens, or a list of these.
    checkpoint: local weights for each timm model; from the hub without. block: 0-based (published, 1-based:
    8 for XL and L, 4 for B). weight: 0.5 as published. hidden: projector width, 2048 as published; 4 D on
    ti.
    """
    names = _listed(encoder)
    if not names:
        raise UserError(f"recipe.encoder must name at least one encoder; for example {teachers.DINOV2}")
    files = _listed(checkpoint) or [None] * len(names)
    if len(files) != len(names):
        raise UserError(
            f"recipe.checkpoint wants a file for each of {len(names)} encoders, found {len(files)}; "
            f"name them all"
        )
    sources = tuple(
        teachers.find_encoder(name, Path(file) if file else None)
        for name, file in zip(names, files, strict=True)
    )
    recipe = Repa(sources, info.block("recipe.block", block), weight, hidden, info.tokens)
    return [Stage("repa", lambda earlier: recipe)]


def _listed(value: str | Sequence[T] | None) -> list[str | T]:
    return [value] if isinstance(value, str) else list(value or ())
