"""Self-Transcendence and its first stage, VAE alignment (repository csslc/Self-Transcendence; methods as
described there).

Stage 1 aligns one shallow block with the clean latent through a velocity head. Stage 2 trains a fresh network
whose middle block regresses the guided features of the frozen stage-1 network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo, Weights
from stbench.core.errors import UserError
from stbench.core.recipe import (
    Artifact,
    NoSupervision,
    OptionContext,
    Stage,
    Step,
    Supervision,
    Term,
    computed,
)
from stbench.core.registry import RECIPES
from stbench.models import align
from stbench.models.align import Clock, Interval

Mask = Literal["samples", "released"]


@dataclass(frozen=True)
class Defaults:
    """What the size of the network decides."""

    align_block: int
    student_block: int
    teacher_block: int
    hidden: int
    guidance: float
    weights: Weights
    teacher_length: float


def defaults(info: BackboneInfo) -> Defaults:
    """Published values for B/2; the embedded `ti` sizes have their own; other sizes follow B/2's relative
    depth.

    Published (SiT-B/2, 12 blocks, 1-based): align 2, student 6, teacher 8, guidance 30, hidden 2048, raw
    teacher weights, a 200K-step teacher for a 400K-step student. Nothing was released for the other sizes or
    for U-ViT.
    """
    if info.size.startswith("ti"):
        return Defaults(0, 2, 3, 4 * info.width, 10.0, "ema", 1.0)
    first, middle, deep = (align.relative_block(info.depth, k, 12) for k in (2, 6, 8))
    return Defaults(first, middle, deep, 2048, 30.0, "raw", 0.5)


@dataclass
class VaeAlign(Supervision):
    """Stage 1: mask * MSE(velocity head(h_k), velocity), the target that needs the clean VAE latent."""

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
        """A three-layer projector and a small final layer; no conditioning."""
        head = nn.Sequential(
            align.projector(info.width, self.hidden, info.width),
            align.VelocityHead(info.width, info.patch, info.channels),
        )
        return nn.ModuleDict({"velocity": head})

    def terms(self, step: Step) -> Mapping[str, Term]:
        """The masked velocity error of the head."""
        rows, inside = _selection(step, self.interval, self.mask, self.time)
        velocity = step.project("velocity", step.features[self.block][rows])
        error = align.mse(velocity, step.objective.velocity_target(step.noised)[rows])
        return {"vae-align": Term(_reduced(error, rows, inside, self.mask), self.coefficient)}


@dataclass
class SelfTranscendence(Supervision):
    """Stage 2: mask * MSE(projector(h_s), f_u + w (f_c - f_u)) with f the frozen stage-1 network's block k_t.

    The teacher sees the student's x_t and t. Its conditional branch is told the true label, also where the
    student's was dropped. With mask="samples" it runs on the samples inside the interval only, which is the
    same loss.
    """

    teacher: Artifact
    student_block: int
    teacher_block: int
    hidden: int
    guidance: float
    weights: Weights = "ema"
    coefficient: float = 0.5
    interval: Interval = (0.4, 0.7)
    mask: Mask = "samples"
    time: Clock = "flow"
    guidance_stop: int = 100_000
    _network: Backbone | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def taps(self) -> Sequence[int]:
        """The student's aligned block."""
        return (self.student_block,)

    def setup(self, device: torch.device) -> None:
        """Load the frozen stage-1 network."""
        self._network = self.teacher.load(self.weights).to(device)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """A three-layer projector from the student's width to the teacher's."""
        return nn.ModuleDict({"projector": align.projector(info.width, self.hidden, info.width)})

    def guided(self, step: Step, rows: Tensor) -> Tensor:
        """The teacher's guided features (n,N,D) for the chosen rows: one doubled batch, stopped after its
        block.
        """
        assert self._network is not None, "setup() has not run"
        x, t, y = step.noised.x_t[rows], step.noised.t[rows], step.batch.y_true[rows]
        null = torch.full_like(y, step.info.classes)
        both = step.teach(
            self._network,
            torch.cat([x, x]),
            torch.cat([t, t]),
            torch.cat([y, null]),
            block=self.teacher_block,
        )
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """The masked feature error; nothing once `guidance_stop` steps are done."""
        if step.images_seen >= self.guidance_stop * step.global_batch:
            return {}
        rows, inside = _selection(step, self.interval, self.mask, self.time)
        projected = step.project("projector", step.features[self.student_block][rows])
        error = align.mse(projected, self.guided(step, rows))
        return {"self-transcendence": Term(_reduced(error, rows, inside, self.mask), self.coefficient)}


def _selection(step: Step, interval: Interval, mask: Mask, time: Clock) -> tuple[Tensor, Tensor]:
    """Rows to compute (on the batch's device) and which rows lie inside the interval (host)."""
    inside = align.in_interval(step.objective, step.noised.t_host, interval, native=time == "native")
    rows = torch.arange(len(inside)) if mask == "released" else inside.nonzero().squeeze(1)
    return rows.to(step.noised.x_t.device, non_blocking=True), inside


def _reduced(error: Tensor, rows: Tensor, inside: Tensor, mask: Mask) -> Tensor:
    """(B,) values whose mean is the stage's loss: selected errors over the full batch, or the released
    broadcast.

    "released" multiplies every error by the share of the micro-batch inside the interval, which is what a
    (B,) loss times a (B,1,1,1) mask comes to.
    """
    if mask == "released":
        return align.released_mask(error, inside)
    return align.masked(error, rows, len(inside))


def _teacher_steps(c: OptionContext) -> int | None:
    return None if c.steps is None else max(1, round(defaults(c.info).teacher_length * c.steps))


@RECIPES.register_module(name="vae-align")
def vae_align(
    info: BackboneInfo,
    *,
    align_block: int = computed(lambda c: defaults(c.info).align_block),
    coefficient: float = 0.5,
    interval: Interval = (0.4, 0.7),
    hidden: PositiveInt = computed(lambda c: defaults(c.info).hidden),
    mask: Mask = "samples",
    time: Clock = "flow",
) -> Sequence[Stage]:
    """Align a shallow block with the clean VAE latent: stage 1 of Self-Transcendence alone, for --steps.

    align_block: 0-based block (published: 1, the second of B/2's twelve). hidden: projector width (published
    2048; 4 D on ti). interval: flow-equivalent times, closed. mask: `samples` selects samples, as described;
    `released` scales all of them by the share inside, as the released code does. time: `flow` or `native`
    clock of the interval.
    """
    align.check_interval(interval)
    block = info.block("recipe.align_block", align_block)
    recipe = VaeAlign(block, hidden, coefficient, interval, mask, time)
    return [Stage("vae-align", lambda earlier: recipe)]


@RECIPES.register_module(name="self-transcendence")
def self_transcendence(
    info: BackboneInfo,
    *,
    align_block: int = computed(lambda c: defaults(c.info).align_block),
    student_block: int = computed(lambda c: defaults(c.info).student_block),
    teacher_block: int = computed(lambda c: defaults(c.info).teacher_block),
    guidance: float = computed(lambda c: defaults(c.info).guidance),
    coefficient: float = 0.5,
    interval: Interval = (0.4, 0.7),
    hidden: PositiveInt = computed(lambda c: defaults(c.info).hidden),
    mask: Mask = "samples",
    time: Clock = "flow",
    teacher: Literal["vae-align", "vanilla"] = "vae-align",
    teacher_weights: Weights = computed(lambda c: defaults(c.info).weights),
    teacher_steps: PositiveInt | None = computed(_teacher_steps),
    guidance_stop: int = 100_000,
) -> Sequence[Stage]:
    """Train a teacher by VAE alignment, freeze it, and let its guided features teach a fresh network.

    Blocks are 0-based (published for B/2, 1-based: align 2, student 6, teacher 8). guidance: feature guidance
    scale w (published 30 for B/2; 10 on ti). teacher: what trains the teacher, `vanilla` is a control.
    teacher_weights: `raw` as released, `ema` on ti. teacher_steps: absolute length of the first stage;
    default --steps on ti, half of it elsewhere (200K for 400K). guidance_stop: step after which the alignment
    ends. mask, time, interval, hidden: as in vae-align, for both stages.
    """
    align.check_interval(interval)
    shallow = info.block("recipe.align_block", align_block)
    student = info.block("recipe.student_block", student_block)
    deep = info.block("recipe.teacher_block", teacher_block)
    if guidance != 1.0 and not info.null_label:
        raise UserError(
            f"recipe.guidance={guidance} wants a null label, which {info.name}-{info.size} has no row for; "
            f"type --set recipe.guidance=1"
        )

    def first(earlier: Mapping[str, Artifact]) -> Supervision:
        return VaeAlign(shallow, hidden, coefficient, interval, mask, time)

    def second(earlier: Mapping[str, Artifact]) -> Supervision:
        source = earlier[teacher]
        return SelfTranscendence(
            source,
            student,
            deep,
            hidden,
            guidance,
            teacher_weights,
            coefficient,
            interval,
            mask,
            time,
            guidance_stop,
        )

    trained_by = first if teacher == "vae-align" else lambda earlier: NoSupervision()
    first_stage = Stage(teacher, trained_by, defaults(info).teacher_length, teacher_steps)
    return [first_stage, Stage("self-transcendence", second)]
