"""Self-Transcendence (repository csslc/Self-Transcendence): a frozen earlier network teaches with guidance.

Stage 1 is VAE alignment (recipes/deep_supervision.py). Stage 2 trains a new network whose middle block
regresses the guided features of the frozen stage-1 network. Implemented as the repository describes it; where
the released code differs, that is an option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo, Weights
from stbench.core.errors import UserError
from stbench.core.ranges import Block, Guidance, NonNegativeReal, Steps, StepsOrZero, Width
from stbench.core.recipe import (
    Artifact,
    NoSupervision,
    OptionContext,
    Stage,
    Step,
    Supervision,
    Term,
    computed,
    computed_defaults,
)
from stbench.core.registry import RECIPES
from stbench.models import align
from stbench.models.align import Clock, Interval
from stbench.models.interval_mask import Mask, apply_mask, select_rows
from stbench.recipes.deep_supervision import VaeAlign, hidden_width


@dataclass(frozen=True)
class Defaults:
    """Default options that depend on the size of the network."""

    student_block: int
    teacher_block: int
    guidance: float
    weights: Weights
    teacher_length: float


def defaults(info: BackboneInfo) -> Defaults:
    """Return the published options for B/2, adapted to other sizes.

    Published (SiT-B/2, 12 blocks, 1-based): student 6, teacher 8, guidance 30, raw teacher weights, a teacher
    of 200K steps for a student of 400K. Nothing was released for other sizes or for U-ViT: they use the
    relative depth of B/2's blocks. The `ti` sizes have their own options, chosen on the digits.
    """
    if (info.preset or info.size).startswith("ti"):
        return Defaults(student_block=2, teacher_block=3, guidance=10.0, weights="ema", teacher_length=1.0)
    return Defaults(
        student_block=align.relative_block(info.depth, 6, 12),
        teacher_block=align.relative_block(info.depth, 8, 12),
        guidance=30.0,
        weights="raw",
        teacher_length=0.5,
    )


@dataclass
class SelfTranscendence(Supervision):
    """mask * MSE(projector(h_s), f_u + w (f_c - f_u)), where f is block k_t of the frozen stage-1 network.

    The teacher receives the student's x_t and t. Its conditional branch f_c receives the true label, also
    where the student's label was dropped. With mask "samples", it runs on the samples inside the interval
    only, which gives the same loss.
    """

    takes_subsets: ClassVar[bool] = True

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
        """Return the teacher's guided features (n,N,D) for the samples `rows` (n,).

        Both branches run as one batch of 2n.
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
            most=2 * len(step.batch.y),
        )
        conditional, unconditional = both.chunk(2)
        return unconditional + self.guidance * (conditional - unconditional)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the masked feature error; no term after `guidance_stop` steps."""
        if step.images_seen >= self.guidance_stop * step.global_batch:
            return {}
        rows, inside = select_rows(step, self.interval, mask=self.mask, time=self.time)
        projected = step.project("projector", step.features[self.student_block][rows])
        kept = step.kept.get(self.student_block)
        target = align.at_kept(self.guided(step, rows), None if kept is None else kept[rows])
        error = align.mse(projected, target)
        return {"self-transcendence": Term(apply_mask(error, rows, inside, mask=self.mask), self.coefficient)}


def published_teacher_steps(c: OptionContext) -> int | None:
    """Return the default length of the first stage; None if the length of the run is not known."""
    return None if c.steps is None else max(1, round(defaults(c.info).teacher_length * c.steps))


@RECIPES.register_module(name="self-transcendence")
@computed_defaults
def self_transcendence(
    info: BackboneInfo,
    *,
    align_block: Block = computed(lambda c: align.relative_block(c.info.depth, 2, 12)),
    student_block: Block = computed(lambda c: defaults(c.info).student_block),
    teacher_block: Block = computed(lambda c: defaults(c.info).teacher_block),
    guidance: Guidance = computed(lambda c: defaults(c.info).guidance),
    coefficient: NonNegativeReal = 0.5,
    interval: Interval = (0.4, 0.7),
    hidden: Width = computed(lambda c: hidden_width(c.info)),
    mask: Mask = "samples",
    time: Clock = "flow",
    teacher: Literal["vae-align", "vanilla"] = "vae-align",
    teacher_weights: Weights = computed(lambda c: defaults(c.info).weights),
    teacher_steps: Steps | None = computed(published_teacher_steps),
    guidance_stop: StepsOrZero = 100_000,
) -> Sequence[Stage]:
    """Train a teacher with VAE alignment, freeze it, and align a new network with its guided features.

    align_block, student_block, teacher_block: 0-based. Published for B/2, 1-based: 2, 6 and 8.
    guidance: scale w of feature guidance. Default: 10 on ti, else 30 as published for B/2.
    teacher: recipe that trains the teacher; `vanilla` is a control.
    teacher_weights: `raw` or `ema` weights of the teacher. Default: `ema` on ti, else `raw` as released.
    teacher_steps: length of the first stage. Default: --steps on ti, else half of it (published: 200K for
      400K).
    guidance_stop: step after which the alignment ends.
    coefficient, interval, hidden, mask, time: as in vae-align, for both stages.
    """
    # Options of both stages
    align.check_interval(interval)
    align_block = info.block("recipe.align_block", align_block)
    student_block = info.block("recipe.student_block", student_block)
    teacher_block = info.block("recipe.teacher_block", teacher_block)
    if guidance != 1.0 and not info.null_label:
        raise UserError(
            f"recipe.guidance={guidance} needs a null label, but {info.name}-{info.size} has none; "
            f"use --set recipe.guidance=1"
        )

    # The two stages; the second needs the first one's artifact
    def first_stage(earlier: Mapping[str, Artifact]) -> Supervision:
        if teacher == "vanilla":
            return NoSupervision()
        return VaeAlign(
            block=align_block,
            hidden=hidden,
            coefficient=coefficient,
            interval=interval,
            mask=mask,
            time=time,
        )

    def second_stage(earlier: Mapping[str, Artifact]) -> Supervision:
        return SelfTranscendence(
            teacher=earlier[teacher],
            student_block=student_block,
            teacher_block=teacher_block,
            hidden=hidden,
            guidance=guidance,
            weights=teacher_weights,
            coefficient=coefficient,
            interval=interval,
            mask=mask,
            time=time,
            guidance_stop=guidance_stop,
        )

    return [
        Stage(teacher, first_stage, length=defaults(info).teacher_length, steps=teacher_steps),
        Stage("self-transcendence", second_stage),
    ]
