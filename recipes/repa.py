"""REPA, representation alignment (repository sihyun-yu/REPA): a frozen external encoder teaches one block.

The only built-in recipe with an external teacher: its leaderboard row names the encoder, whose training cost
is not included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.ranges import Block, Name, NonNegativeReal, Width
from stbench.core.recipe import Stage, Step, Supervision, Term, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.models import align, encoders

T = TypeVar("T")


@dataclass
class Repa(Supervision):
    """-weight * cosine(projector_j(h_k), z_j) over channels, averaged over tokens and encoders j, float32."""

    sources: Sequence[encoders.EncoderSpec]
    """The encoders, or caches of their tokens."""
    block: int
    weight: float
    hidden: int
    tokens: int
    _encoders: list[encoders.ImageEncoder | encoders.CachedTokens] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def needs(self) -> str:
        """The names of the encoders."""
        return ", ".join(source.needs for source in self.sources)

    @property
    def contents(self) -> Mapping[str, Any]:
        """Names of encoders and hashes of files, in place of the paths that the options contain."""
        return {
            "encoder": [s.sha256 if s.kind == "cached" else s.name for s in self.sources],
            "checkpoint": [s.sha256 for s in self.sources],
        }

    @property
    def images(self) -> bool:
        """Whether an encoder runs on the images; cached tokens do not need them."""
        return any(source.kind != "cached" for source in self.sources)

    @property
    def taps(self) -> Sequence[int]:
        """The aligned block."""
        return (self.block,)

    def setup(self, device: torch.device) -> None:
        """Load the encoders."""
        self._encoders = [encoders.open_encoder(source, self.tokens, device) for source in self.sources]

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """One three-layer projector per encoder."""
        return nn.ModuleDict(
            {str(j): align.projector(info.width, self.hidden, s.width) for j, s in enumerate(self.sources)}
        )

    def targets(self, step: Step) -> list[Tensor]:
        """Return the tokens (B,N,Dz) of each encoder."""
        found = []
        for encoder in self._encoders:
            if isinstance(encoder, encoders.ImageEncoder):
                found.append(step.encode(encoder, step.batch.extras["images"]))
                continue
            # A cache costs one forward pass per image of the data set, counted during the first epoch.
            if step.images_seen < step.dataset_size:
                step.count_teacher(encoder.flops * len(step.batch.y))
            tokens = encoder.rows(step.batch.index, step.dataset_size)
            found.append(tokens.to(step.noised.x_t.device, non_blocking=True))
        return found

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the mean negative cosine, in [-1,1]."""
        tokens = step.features[self.block]
        values = [
            -align.cosine(step.project(str(j), tokens), target) for j, target in enumerate(self.targets(step))
        ]
        return {"repa": Term(torch.stack(values).mean(0), self.weight)}


def published_block(info: BackboneInfo) -> int:
    """Return the default block, 0-based.

    Published, 1-based: 8 of XL's 28 (README) and of L's 24, 4 of B's 12. Other sizes use XL's relative depth.
    """
    published = {24: 8, 12: 4}
    if info.depth in published:
        return published[info.depth] - 1
    return align.relative_block(info.depth, 8, 28)


def _is_tiny(info: BackboneInfo) -> bool:
    return (info.preset or info.size).startswith("ti")


@RECIPES.register_module(name="repa")
@computed_defaults
def repa(
    info: BackboneInfo,
    *,
    encoder: Name | Sequence[Name] = computed(
        lambda c: encoders.DIGITS if _is_tiny(c.info) else encoders.DINOV2
    ),
    checkpoint: Name | Sequence[Name | None] | None = None,
    block: Block = computed(lambda c: published_block(c.info)),
    weight: NonNegativeReal = 0.5,
    hidden: Width = computed(lambda c: 4 * c.info.width if _is_tiny(c.info) else 2048),
) -> Sequence[Stage]:
    """Align one block with the tokens of a frozen external encoder on the clean image.

    encoder: a timm model, `digits` (the shipped encoder), a folder of cached tokens, or a list of these.
      Default: `digits` on ti, else vit_base_patch14_dinov2.lvd142m (DINOv2-B, one token per latent patch).
    checkpoint: file with the weights of each timm model; without it, the Hugging Face cache. Nothing is
      downloaded: get them with `hf download timm/MODEL model.safetensors`.
    block: 0-based. Published, 1-based: 8 for XL and L, 4 for B.
    weight: weight of the loss; 0.5 as published.
    hidden: hidden width of the projector. Default: 4 D on ti, else 2048 as published.
    """
    names = _listed(encoder)
    if not names:
        raise UserError(f"recipe.encoder must name at least one encoder; for example {encoders.DINOV2}")
    files = _listed(checkpoint) or [None] * len(names)
    if len(files) != len(names):
        raise UserError(
            f"recipe.checkpoint must name one file for each of {len(names)} encoders, got {len(files)}; "
            f"list one per encoder, null for none"
        )
    sources = tuple(
        encoders.find_encoder(name, Path(file) if file else None)
        for name, file in zip(names, files, strict=True)
    )
    supervision = Repa(
        sources=sources,
        block=info.block("recipe.block", block),
        weight=weight,
        hidden=hidden,
        tokens=info.tokens,
    )
    return [Stage("repa", lambda earlier: supervision)]


def _listed(value: str | Sequence[T] | None) -> list[str | T]:
    """Return an option that is one value, a list or None as a list."""
    return [value] if isinstance(value, str) else list(value or ())
