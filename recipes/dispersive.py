"""Dispersive Loss (repository whaletech-ai/Disperse-Loss): features of different samples repel each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.ranges import BatchSize, Block, NonNegativeReal, PositiveReal
from stbench.core.recipe import OptionContext, Stage, Step, Supervision, Term, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.models import align

Setting = Literal["jax", "pytorch"]
Scope = Literal["local", "gathered"]


@dataclass(frozen=True)
class Published:
    """The constants of one published configuration."""

    weight: float
    tau: float
    local_batch: int


PUBLISHED: Mapping[str, Published] = {
    "jax": Published(weight=0.5, tau=0.5, local_batch=16),
    "pytorch": Published(weight=0.25, tau=1.0, local_batch=32),
}
"""Constants of the paper (jax) and of the released PyTorch code; they also tap different blocks."""


@dataclass
class Dispersive(Supervision):
    """log mean exp(-|z_i - z_j|^2 / (N D tau)) over all pairs of a batch, the diagonal included.

    z is the tokens of one block, neither projected nor normalised. The loss depends on the batch size:
    scope "local" computes it on `local_batch` consecutive samples at a time, "gathered" on the global batch.
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
        """Assign to each sample the loss of its batch.

        Raises UserError if scope is "gathered" and the global batch is accumulated or cannot be split evenly,
        or if scope is "local" and the images of a rank are no multiple of `local_batch`.
        """
        tokens, ranks = step.features[self.block], step.world.size
        if self.scope == "gathered":
            if len(tokens) * ranks != step.global_batch:
                raise UserError(
                    f"recipe.scope=gathered needs all {step.global_batch} images of a step at once, found "
                    f"{len(tokens)} on each of {ranks} rank(s); use --set train.accumulate=1 and a batch "
                    f"that the ranks divide, or --set recipe.scope=local"
                )
            loss = align.dispersive(step.world.gather(tokens), self.tau).expand(len(tokens))
        else:
            if ranks > 1 and len(tokens) % (self.local_batch or 1):
                raise UserError(
                    f"recipe.local_batch={self.local_batch} must divide the {len(tokens)} images of each "
                    f"rank; use fewer ranks, or another recipe.local_batch or train.batch"
                )
            loss = align.dispersive_rows(tokens, self.tau, self.local_batch)
        return {"dispersive": Term(loss, self.weight)}


def published_block(c: OptionContext) -> int:
    """Return the default block, 0-based."""
    return max(1, c.info.depth // 4) - 1 if c.options["setting"] == "jax" else c.info.depth - 1


def published_batch(c: OptionContext) -> int | None:
    """Return the default number of samples per loss; None with scope "gathered"."""
    return None if c.options["scope"] == "gathered" else PUBLISHED[c.options["setting"]].local_batch


@RECIPES.register_module(name="dispersive")
@computed_defaults
def dispersive(
    info: BackboneInfo,
    *,
    setting: Setting = "jax",
    block: Block = computed(published_block),
    weight: NonNegativeReal = computed(lambda c: PUBLISHED[c.options["setting"]].weight),
    tau: PositiveReal = computed(lambda c: PUBLISHED[c.options["setting"]].tau),
    scope: Scope = "local",
    local_batch: BatchSize | None = computed(published_batch),
) -> Sequence[Stage]:
    """Push the samples of a batch apart in one block's features (InfoNCE with L2 distance, no positives).

    setting: published configuration that gives the defaults below. `jax` is the paper's: weight 0.5, tau 0.5,
      the block at a quarter of the depth, batches of 16. `pytorch` is the released PyTorch code: weight 0.25,
      tau 1, the last block, batches of 32.
    block: 0-based block whose features are dispersed.
    weight: weight of the loss.
    tau: temperature.
    scope: `local` computes the loss on `local_batch` samples at a time, like one device of the published
      runs; `gathered` on the global batch.
    local_batch: samples per loss with scope `local`.
    """
    if scope == "gathered" and local_batch is not None:
        raise UserError("recipe.local_batch has no effect with recipe.scope=gathered; leave one of them out")
    supervision = Dispersive(
        block=info.block("recipe.block", block),
        weight=weight,
        tau=tau,
        scope=scope,
        local_batch=local_batch,
    )
    return [Stage("dispersive", lambda earlier: supervision)]
