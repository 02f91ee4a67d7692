"""Deep supervision (repository csslc/Self-Transcendence, stage 1; CVL-UESTC/Internal-Guidance; SRA 2).

A head on a hidden block learns what the network learns, or the clean latent. SRA 2 was described by its
authors (vvvvvjdy/SRA#6) and has no released code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.objective import Noised, Objective
from stbench.core.ranges import Block, Depth, NonNegativeReal, PositiveReal, Width
from stbench.core.recipe import Stage, Step, Supervision, Term, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.models import align
from stbench.models.align import Clock, Interval
from stbench.models.interval_mask import Mask, apply_mask, noised_rows, select_rows, take
from stbench.models.official_heads import HEAD, head_guide

Target = Literal["velocity", "x0"]
Loss = Literal["mse", "smooth-l1"]
Head = Literal["mlp", "output"]

ALWAYS: Interval = (0.0, 1.0)


def hidden_width(info: BackboneInfo, tiny: int = 4) -> int:
    """Return the default hidden width of an MLP: 2048 as published, or `tiny` D on the `ti` sizes."""
    return tiny * info.width if (info.preset or info.size).startswith("ti") else 2048


@dataclass
class DeepSupervision(Supervision):
    """weight * mask * loss(head(h_k), target).

    The head "mlp" is an MLP and a final layer without conditioning, and is discarded. The head "output" is an
    output layer of the network's own kind, which stays with the network (see `stage`); its velocity is what
    the network itself predicts under its objective, so it is trained with the objective's loss.
    """

    block: int
    target: Target
    loss: Loss
    head: Head
    hidden: int
    layers: int
    weight: float
    interval: Interval = ALWAYS
    mask: Mask = "samples"
    time: Clock = "flow"
    beta: float = 0.05

    @property
    def taps(self) -> Sequence[int]:
        """The supervised block."""
        return (self.block,)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """The MLP and the final layer, named after what they predict; nothing for the head "output"."""
        if self.head == "output":
            return nn.ModuleDict()
        head = nn.Sequential(
            align.projector(info.width, self.hidden, info.width, layers=self.layers),
            align.VelocityHead(info.width, info.patch, info.channels),
        )
        return nn.ModuleDict({self.target: head})

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the masked error of the head."""
        rows, inside = select_rows(step, self.interval, mask=self.mask, time=self.time)
        tokens = take(step.features[self.block], rows)
        if self.head == "mlp":
            found = step.project(self.target, tokens)
        else:
            condition = None if step.condition is None else take(step.condition, rows)
            found = step.project(HEAD, tokens, condition)
        error = self.error(step.objective, found, noised_rows(step.noised, rows, inside))
        return {"deep-supervision": Term(apply_mask(error, rows, inside, mask=self.mask), self.weight)}

    def error(self, objective: Objective, found: Tensor, noised: Noised) -> Tensor:
        """Return the error (n,) of a head's output (n,C,H,W) at the training points `noised`."""
        if self.head == "output" and self.target == "velocity":
            return objective.loss(found, noised)
        target = noised.x0 if self.target == "x0" else objective.velocity_target(noised)
        found = found[:, : target.shape[1]]  # an output layer may also predict a variance
        if self.loss == "smooth-l1":
            return align.smooth_l1(found, target, self.beta)
        return align.mse(found, target)

    def stage(self, name: str) -> Stage:
        """Return the only stage of a recipe; the head "output" belongs to its network.

        If the head predicts what the network does, the network can be guided by it.
        """
        if self.head == "mlp":
            return Stage(name, lambda earlier: self)
        guides = {HEAD: head_guide(self.block)} if self.target == "velocity" else {}
        return Stage(name, lambda earlier: self, heads=lambda net: {HEAD: net.output_head()}, guides=guides)


@dataclass
class VaeAlign(Supervision):
    """Deep supervision with a velocity head of three layers; the fields are those of earlier versions."""

    block: int
    hidden: int
    coefficient: float = 0.5
    interval: Interval = (0.4, 0.7)
    mask: Mask = "samples"
    time: Clock = "flow"

    @property
    def general(self) -> DeepSupervision:
        """The same supervision with every option of the family."""
        head = DeepSupervision(self.block, "velocity", "mse", "mlp", self.hidden, 3, self.coefficient)
        return replace(head, interval=self.interval, mask=self.mask, time=self.time)

    @property
    def taps(self) -> Sequence[int]:
        """The aligned block."""
        return self.general.taps

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """A three-layer projector followed by a final layer, without conditioning."""
        return self.general.heads(info)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the masked velocity error of the head."""
        (term,) = self.general.terms(step).values()
        return {"vae-align": term}


@RECIPES.register_module(name="deep-supervision")
@computed_defaults
def deep_supervision(
    info: BackboneInfo,
    *,
    block: Block = computed(lambda c: align.relative_block(c.info.depth, 2, 12)),
    target: Target = "velocity",
    loss: Loss = "mse",
    head: Head = "mlp",
    weight: NonNegativeReal = 0.5,
    interval: Interval = ALWAYS,
    hidden: Width = computed(lambda c: hidden_width(c.info)),
    layers: Depth = 3,
    mask: Mask = "samples",
    time: Clock = "flow",
    beta: PositiveReal = 0.05,
) -> Sequence[Stage]:
    """Supervise a hidden block directly: the family of vae-align, sra2 and internal-guidance.

    block: 0-based block that the head reads. Default: as in vae-align.
    target: `velocity`, or the clean latent `x0`.
    loss: `mse` or `smooth-l1`.
    head: `mlp` is an MLP and a final layer without conditioning, discarded after training; `output` is an
      output layer of the network's own kind, which stays with the network. With target velocity, it predicts
      what the network does under its objective, is trained with that objective's loss, and can guide the
      network at sampling (--guide head:1.4).
    weight: weight of the loss.
    interval: closed interval of times in which the loss applies. Default: all times.
    hidden, layers: hidden width and number of linear layers of the MLP.
    mask: `samples` averages the samples inside the interval over the batch, `inside-mean` over the samples
      inside; `released` scales all samples by the share inside.
    time: clock of the interval, `flow` for flow-equivalent or `native` for the objective's own time.
    beta: threshold of smooth-l1.
    """
    align.check_interval(interval)
    block = info.block("recipe.block", block)
    supervision = DeepSupervision(
        block, target, loss, head, hidden, layers, weight, interval, mask, time, beta
    )
    _check_combination(supervision, info)
    return [supervision.stage("deep-supervision")]


def _check_combination(chosen: DeepSupervision, info: BackboneInfo) -> None:
    """Raise UserError for options that would have no effect."""
    if chosen.loss == "mse" and chosen.beta != 0.05:
        raise UserError(
            f"recipe.beta={chosen.beta} has no effect with recipe.loss=mse; leave it out, or use "
            f"--set recipe.loss=smooth-l1"
        )
    if chosen.head == "output" and (chosen.hidden, chosen.layers) != (hidden_width(info), 3):
        raise UserError(
            f"recipe.hidden={chosen.hidden} and recipe.layers={chosen.layers} have no effect with "
            f"recipe.head=output, which has no MLP; leave them out, or use --set recipe.head=mlp"
        )
    if chosen.head == "output" and chosen.target == "velocity" and chosen.loss != "mse":
        raise UserError(
            f"recipe.loss={chosen.loss} has no effect with recipe.head=output and recipe.target=velocity, "
            f"which use the loss of the objective; leave it out, or use --set recipe.head=mlp"
        )


@RECIPES.register_module(name="vae-align")
@computed_defaults
def vae_align(
    info: BackboneInfo,
    *,
    align_block: Block = computed(lambda c: align.relative_block(c.info.depth, 2, 12)),
    coefficient: NonNegativeReal = 0.5,
    interval: Interval = (0.4, 0.7),
    hidden: Width = computed(lambda c: hidden_width(c.info)),
    mask: Mask = "samples",
    time: Clock = "flow",
) -> Sequence[Stage]:
    """Align a shallow block with the clean VAE latent: stage 1 of Self-Transcendence alone, for --steps.

    align_block: 0-based block (published: 1, the second of B/2's twelve).
    coefficient: weight of the loss.
    interval: closed interval of times in which the loss applies.
    hidden: hidden width of the projector. Default: 4 D on ti, else 2048 as published.
    mask: `samples` selects the samples inside the interval, as described; `inside-mean` divides by their
      number instead of the batch; `released` scales all samples by the share inside, as the released code
      does.
    time: clock of the interval, `flow` for flow-equivalent or `native` for the objective's own time.
    """
    align.check_interval(interval)
    block = info.block("recipe.align_block", align_block)
    supervision = VaeAlign(block, hidden, coefficient, interval, mask, time)
    return [Stage("vae-align", lambda earlier: supervision)]


def sra2_block(info: BackboneInfo) -> int:
    """Return SRA 2's block, 0-based: 1-based 2 for B, 8 for L and XL, and relative to B or XL elsewhere."""
    if info.depth == 24:
        return 7
    published = (2, 12) if info.depth <= 12 else (8, 28)
    return align.relative_block(info.depth, *published)


@RECIPES.register_module(name="sra2")
@computed_defaults
def sra2(
    info: BackboneInfo,
    *,
    block: Block = computed(lambda c: sra2_block(c.info)),
    weight: NonNegativeReal = 1.0,
    beta: PositiveReal = 0.05,
    hidden: Width = computed(lambda c: hidden_width(c.info, tiny=1)),
    layers: Depth = 5,
) -> Sequence[Stage]:
    """Predict the clean latent from a shallow block, without a teacher: SRA 2, from its description.

    There is no released code. The number of linear layers is the authors' "about five"; the hidden width,
    and whether the last layer sees the condition, are not published (here: not conditioned). The target is
    the latent that the network is trained on, a sample of the autoencoder's posterior.

    block: 0-based. Published, 1-based: 2 for B, 8 for L and XL.
    weight: weight of the loss.
    beta: threshold of smooth-l1.
    hidden: hidden width of the MLP. Default: D on ti, else 2048 as in vae-align, so that the head costs
      little: 4 % of the forward pass are quoted, without a size.
    layers: number of linear layers of the MLP, which a final layer follows.
    """
    block = info.block("recipe.block", block)
    supervision = DeepSupervision(block, "x0", "smooth-l1", "mlp", hidden, layers, weight, beta=beta)
    return [supervision.stage("sra2")]


@RECIPES.register_module(name="internal-guidance")
@computed_defaults
def internal_guidance(
    info: BackboneInfo,
    *,
    block: Block = computed(lambda c: align.relative_block(c.info.depth, 8, 28)),
    weight: NonNegativeReal = 0.5,
) -> Sequence[Stage]:
    """Let a shallow block predict as well, through an output layer that stays and guides the sampling.

    The head sees the condition and is trained with the objective's loss at all times. At sampling,
    --guide head:1.4 extrapolates from its prediction to the network's.

    block: 0-based. Published for XL, 1-based: 8 of 28; the released trainer uses 8 for every size. Default:
      the relative depth of XL's.
    weight: weight of the head's loss.
    """
    block = info.block("recipe.block", block)
    supervision = DeepSupervision(block, "velocity", "mse", "output", hidden=0, layers=0, weight=weight)
    return [supervision.stage("internal-guidance")]
