"""HASTE (repository NUS-HPC-AI-Lab/HASTE): REPA and the encoder's attention maps as teachers, up to a step.

Like REPA, it has an external teacher: its leaderboard row names the encoder, whose training cost is not
included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.limits import MAX_ITEMS
from stbench.core.objective import Batch, Noised
from stbench.core.ranges import Block, Name, NonNegativeReal, StepsOrZero, Width
from stbench.core.recipe import OptionContext, Stage, Step, Term, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.models import align, encoders
from stbench.models.encoder_attention import flops_with_logits, layers_of, tokens_and_logits
from stbench.recipes.repa import Repa, default_encoder, default_hidden

Pairs = Annotated[Sequence[tuple[Block, Block]], Field(max_length=MAX_ITEMS)]
"""(student block, encoder layer) of each aligned pair, 0-based."""
PUBLISHED_DEPTHS = (12, 24, 28)
STOP = 250_000


@dataclass(kw_only=True)
class Haste(Repa):
    """REPA's term, and the cross-entropy of attention maps of student blocks and encoder layers.

    Both end after `stop` steps. From then on neither the encoder nor the student's logits are computed.
    """

    pairs: Pairs
    attention_weight: float
    stop: int

    @property
    def takes_subsets(self) -> bool:  # type: ignore[override]
        """No: the attention maps are those of all tokens."""
        return False

    def inputs(self, batch: Batch, noised: Noised) -> Mapping[str, Any]:
        """Ask for the attention logits of the student's aligned blocks."""
        if self.is_over(batch.rng):
            return {}
        return {"attention": tuple(sorted({block for block, _ in self.pairs}))}

    def encode(self, step: Step) -> tuple[Tensor, Mapping[int, Tensor]]:
        """Return the encoder's tokens (B,N,Dz) and, by layer, its attention logits (B,heads,N,N)."""
        (encoder,) = self._encoders
        assert isinstance(encoder, encoders.ImageEncoder), "cached tokens were refused before"
        network, layers = encoder, sorted({layer for _, layer in self.pairs})

        def call(images: Tensor) -> list[Tensor]:
            return tokens_and_logits(network, images, layers)

        flops = flops_with_logits(network, layers)
        tokens, *logits = step.run_frozen(call, step.batch.extras["images"], flops)
        return tokens, dict(zip(layers, logits, strict=True))

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute both terms; none after `stop` steps."""
        if self.is_over(step.batch.rng):
            return {}
        tokens, logits = self.encode(step)
        values = [
            align.attention_cross_entropy(step.attention[block], logits[layer]) for block, layer in self.pairs
        ]
        attention = Term(torch.stack(values).mean(0), self.attention_weight)
        return {**self.aligned(step, [tokens]), "attention": attention}


def last_block(info: BackboneInfo) -> int:
    """Return the default of REPA's block and of the deepest aligned one, 0-based.

    Published, 1-based: 8, for B, L and XL. Other depths use XL's relative depth.
    """
    return 7 if info.depth in PUBLISHED_DEPTHS else align.relative_block(info.depth, 8, 28)


def default_pairs(info: BackboneInfo, layers: int) -> Pairs:
    """Return the default pairs for an encoder with `layers` layers.

    Published, 1-based: blocks 5 to 8 with layers 9 to 12 of DINOv2-B's 12, for B, L and XL. Other depths pair
    the same share of blocks as XL, up to `last_block`, with the encoder's last layers.
    """
    last = last_block(info)
    count = 4 if info.depth in PUBLISHED_DEPTHS else max(1, round(info.depth * 4 / 28))
    count = min(count, last + 1, layers)
    return [(last - k, layers - 1 - k) for k in reversed(range(count))]


def default_stop(c: OptionContext) -> int:
    """Return the default last step: 250K for XL, else half of the steps, as 250K of XL's 500K."""
    return STOP if c.info.depth == 28 or c.steps is None else c.steps // 2


def _pairs_for(c: OptionContext) -> Pairs:
    return default_pairs(c.info, layers_of(_source(c.options["encoder"], c.options["checkpoint"])))


def _source(encoder: str, checkpoint: str | None) -> encoders.EncoderSpec:
    return encoders.find_encoder(encoder, Path(checkpoint) if checkpoint else None)


@RECIPES.register_module(name="haste")
@computed_defaults
def haste(
    info: BackboneInfo,
    *,
    encoder: Name = computed(lambda c: default_encoder(c.info)),
    checkpoint: Name | None = None,
    block: Block = computed(lambda c: last_block(c.info)),
    pairs: Pairs = computed(_pairs_for),
    weight: NonNegativeReal = 0.5,
    attention_weight: NonNegativeReal = 0.5,
    stop: StepsOrZero = computed(default_stop),
    hidden: Width = computed(lambda c: default_hidden(c.info)),
) -> Sequence[Stage]:
    """Align a block's tokens and several blocks' attention maps with a frozen external encoder, then stop.

    encoder: a timm VisionTransformer, or `digits` (the shipped encoder); cached tokens do not suffice.
      Default: `digits` on ti, else vit_base_patch14_dinov2.lvd142m (DINOv2-B) as published.
    checkpoint: file with the weights of the timm model; as in repa.
    block: block of REPA's term, 0-based. Published, 1-based: 8.
    pairs: list of student block and encoder layer, 0-based, such as [[0,1],[1,2]]. Published, 1-based: blocks
      5 to 8 with DINOv2-B's layers 9 to 12, for B, L and XL; other depths use a relative choice. Head i is
      compared with head i, as far as both have one: 12 heads with DINOv2-B.
    weight, attention_weight: weights of the two terms; 0.5 as published.
    stop: step after which both terms end. Default: 250000 for XL as published, else half of the steps.
    hidden: hidden width of REPA's projector; as in repa.
    """
    info.require("attention", "recipe 'haste'")
    source = _source(encoder, checkpoint)
    _check_pairs(pairs, info, layers_of(source))
    supervision = Haste(
        sources=(source,),
        block=info.block("recipe.block", block),
        weight=weight,
        hidden=hidden,
        tokens=info.tokens,
        pairs=tuple((student, layer) for student, layer in pairs),
        attention_weight=attention_weight,
        stop=stop,
    )
    return [Stage("haste", lambda earlier: supervision)]


def _check_pairs(pairs: Pairs, info: BackboneInfo, layers: int) -> None:
    """Raise UserError if there is no pair, or a pair of a block or layer that does not exist."""
    example = f"for example [[{last_block(info)},{layers - 1}]]"
    if not pairs:
        raise UserError(f"recipe.pairs must contain at least one pair, got none; {example}")
    for block, layer in pairs:
        if not (0 <= block < info.depth and 0 <= layer < layers):
            raise UserError(
                f"recipe.pairs contains [{block},{layer}], but {info.name}-{info.size} has blocks "
                f"0..{info.depth - 1} and the encoder layers 0..{layers - 1}; {example}"
            )
