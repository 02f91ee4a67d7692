"""VAE alignment, the first stage of Self-Transcendence (repository csslc/Self-Transcendence).

Aligns one shallow block with the clean latent through a velocity head. Also defines what both stages share:
the interval mask and the defaults by size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo, Weights
from stbench.core.ranges import Block, NonNegativeReal, Width
from stbench.core.recipe import Stage, Step, Supervision, Term, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.models import align
from stbench.models.align import Clock, Interval

Mask = Literal["samples", "released"]
"""How the interval restricts the loss: to the samples inside it, or as in the released code."""


@dataclass(frozen=True)
class Defaults:
    """Default options of both stages that depend on the size of the network."""

    align_block: int
    student_block: int
    teacher_block: int
    hidden: int
    guidance: float
    weights: Weights
    teacher_length: float


def defaults(info: BackboneInfo) -> Defaults:
    """Return the published options for B/2, adapted to other sizes.

    Published (SiT-B/2, 12 blocks, 1-based): align 2, student 6, teacher 8, guidance 30, hidden 2048, raw
    teacher weights, a teacher of 200K steps for a student of 400K. Nothing was released for other sizes or
    for U-ViT: they use the relative depth of B/2's blocks. The `ti` sizes have their own options, chosen on
    the digits.
    """
    if (info.preset or info.size).startswith("ti"):
        return Defaults(
            align_block=0,
            student_block=2,
            teacher_block=3,
            hidden=4 * info.width,
            guidance=10.0,
            weights="ema",
            teacher_length=1.0,
        )
    return Defaults(
        align_block=align.relative_block(info.depth, 2, 12),
        student_block=align.relative_block(info.depth, 6, 12),
        teacher_block=align.relative_block(info.depth, 8, 12),
        hidden=2048,
        guidance=30.0,
        weights="raw",
        teacher_length=0.5,
    )


@dataclass
class VaeAlign(Supervision):
    """mask * MSE(velocity head(h_k), velocity), with a target that depends on the clean VAE latent."""

    block: int
    hidden: int
    coefficient: float = 0.5
    interval: Interval = (0.4, 0.7)
    mask: Mask = "samples"
    time: Clock = "flow"

    @property
    def taps(self) -> Sequence[int]:
        """The aligned block."""
        return (self.block,)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """A three-layer projector followed by a final layer, without conditioning."""
        head = nn.Sequential(
            align.projector(info.width, self.hidden, info.width),
            align.VelocityHead(info.width, info.patch, info.channels),
        )
        return nn.ModuleDict({"velocity": head})

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the masked velocity error of the head."""
        rows, inside = select_rows(step, self.interval, mask=self.mask, time=self.time)
        velocity = step.project("velocity", step.features[self.block][rows])
        error = align.mse(velocity, step.objective.velocity_target(step.noised)[rows])
        return {"vae-align": Term(apply_mask(error, rows, inside, mask=self.mask), self.coefficient)}


def select_rows(step: Step, interval: Interval, *, mask: Mask, time: Clock) -> tuple[Tensor, Tensor]:
    """Return the rows to compute (n,) on the batch's device, and whether each row is inside (B,) on the host.

    The released mask needs every row.
    """
    inside = align.in_interval(step.objective, step.noised.t_host, interval, native=time == "native")
    rows = torch.arange(len(inside)) if mask == "released" else inside.nonzero().squeeze(1)
    return rows.to(step.noised.x_t.device, non_blocking=True), inside


def apply_mask(error: Tensor, rows: Tensor, inside: Tensor, *, mask: Mask) -> Tensor:
    """Return values (B,) whose mean is the loss, from the errors (n,) of the selected rows (n,).

    "samples" averages the errors inside the interval over the full batch. "released" multiplies every error
    by the share of samples inside, the result of a (B,) loss times a (B,1,1,1) mask.
    """
    if mask == "released":
        return align.released_mask(error, inside)
    return align.masked(error, rows, len(inside))


@RECIPES.register_module(name="vae-align")
@computed_defaults
def vae_align(
    info: BackboneInfo,
    *,
    align_block: Block = computed(lambda c: defaults(c.info).align_block),
    coefficient: NonNegativeReal = 0.5,
    interval: Interval = (0.4, 0.7),
    hidden: Width = computed(lambda c: defaults(c.info).hidden),
    mask: Mask = "samples",
    time: Clock = "flow",
) -> Sequence[Stage]:
    """Align a shallow block with the clean VAE latent: stage 1 of Self-Transcendence alone, for --steps.

    align_block: 0-based block (published: 1, the second of B/2's twelve).
    coefficient: weight of the loss.
    interval: closed interval of times in which the loss applies.
    hidden: hidden width of the projector. Default: 4 D on ti, else 2048 as published.
    mask: `samples` selects the samples inside the interval, as described; `released` scales all samples by
      the share inside, as the released code does.
    time: clock of the interval, `flow` for flow-equivalent or `native` for the objective's own time.
    """
    align.check_interval(interval)
    supervision = VaeAlign(
        block=info.block("recipe.align_block", align_block),
        hidden=hidden,
        coefficient=coefficient,
        interval=interval,
        mask=mask,
        time=time,
    )
    return [Stage("vae-align", lambda earlier: supervision)]
