"""Dispersive loss (repository whaletech-ai/Disperse-Loss): the features of different samples repel one
another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.recipe import OptionContext, Stage, Step, Supervision, Term, computed
from stbench.core.registry import RECIPES
from stbench.models import align

Setting = Literal["jax", "pytorch"]
Scope = Literal["local", "gathered"]


@dataclass(frozen=True)
class Published:
    """One of the two published settings."""

    weight: float
    tau: float
    local_batch: int


PUBLISHED: Mapping[str, Published] = {"jax": Published(0.5, 0.5, 16), "pytorch": Published(0.25, 1.0, 32)}


@dataclass
class Dispersive(Supervision):
    """log mean exp(-|z_i - z_j|^2 / (N D tau)) over all pairs of a batch, the diagonal included.

    z is one block's tokens, neither projected nor normalised. The batch is a statistic of the loss: `local`
    takes `local_batch` consecutive samples of the micro-batch at a time, `gathered` the whole global batch.
    """

    block: int
    weight: float
    tau: float
    scope: Scope
    local_batch: int | None
    """None with scope "gathered"."""

    @property
    def taps(self) -> Sequence[int]:
        """The dispersed block."""
        return (self.block,)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Each sample carries the loss of its batch. Raises UserError if the global batch is not at hand."""
        tokens = step.features[self.block]
        if self.scope == "gathered" and len(tokens) != step.global_batch:
            raise UserError(
                f"recipe.scope=gathered wants the global batch of {step.global_batch} at once, found "
                f"{len(tokens)} of it; type --set train.accumulate=1, or --set recipe.scope=local"
            )
        batch = None if self.scope == "gathered" else self.local_batch
        return {"dispersive": Term(align.dispersive_rows(tokens, self.tau, batch), self.weight)}


def _published_block(c: OptionContext) -> int:
    return max(1, c.info.depth // 4) - 1 if c.options["setting"] == "jax" else c.info.depth - 1


def _published_batch(c: OptionContext) -> int | None:
    return None if c.options["scope"] == "gathered" else PUBLISHED[c.options["setting"]].local_batch


@RECIPES.register_module(name="dispersive")
def dispersive(
    info: BackboneInfo,
    *,
    setting: Setting = "jax",
    block: int = computed(_published_block),
    weight: NonNegativeFloat = computed(lambda c: PUBLISHED[c.options["setting"]].weight),
    tau: PositiveFloat = computed(lambda c: PUBLISHED[c.options["setting"]].tau),
    scope: Scope = "local",
    local_batch: PositiveInt | None = computed(_published_batch),
) -> Sequence[Stage]:
    """Spread the samples of a batch apart in one block's features (InfoNCE with L2 distance, no positives).

    setting: `jax`, the paper's (weight 0.5, tau 0.5, the block at a quarter of the depth, batches of 16),
    or `pytorch` (weight 0.25, tau 1, the last block, batches of 32); the other options change one value of
    it. block: 0-based. scope: `local` computes the loss on `local_batch` samples at a time, as on one
    device of the published runs; `gathered` on the global batch.
    """
    block = info.block("recipe.block", block)
    if scope == "gathered" and local_batch is not None:
        raise UserError("recipe.local_batch has no meaning with recipe.scope=gathered; leave one of them out")
    recipe = Dispersive(block, weight, tau, scope, local_batch)
    return [Stage("dispersive", lambda earlier: recipe)]
