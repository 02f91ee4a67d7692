"""SRA, self-representation alignment (repository vvvvvjdy/SRA).

The EMA of the network, given the same sample with less noise, teaches a shallower block of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.core.ranges import Block, NonNegativeReal, PositiveReal
from stbench.core.recipe import OptionContext, Stage, Step, Supervision, Term, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.models import align
from stbench.models.align import Clock, Time

Distance = Literal["smooth-l1", "cosine", "cosine-released", "l1", "l2"]
COSINES = ("cosine", "cosine-released")
Decay = Literal["256", "512", "constant"]
DECAY = {"256": (149, 1000), "512": (99, 800)}
"""Schedule -> last epoch at full weight, and the number of epochs in which the weight then falls by 10x."""


def token_distance(distance: Distance, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """Return a distance (B,) between projected student tokens and teacher tokens, both (B,N,D)."""
    if distance == "smooth-l1":
        return align.smooth_l1(student, teacher, beta)
    if distance in ("l1", "l2"):
        return (align.l1 if distance == "l1" else align.mse)(student, teacher)
    return 1.0 - (align.cosine if distance == "cosine" else align.cosine_released)(student, teacher)


def check_beta(distance: Distance, beta: float) -> None:
    """Raise UserError if `recipe.beta` is set for a distance that does not use it."""
    if distance != "smooth-l1" and beta != 0.05:
        raise UserError(
            f"recipe.beta={beta} has no effect with recipe.distance={distance}; "
            f"leave it out, or use --set recipe.distance=smooth-l1"
        )


@dataclass
class Sra(Supervision):
    """weight(epoch) * distance(head(h_s of the student), h_t of the EMA at t' <= t).

    The teacher receives the same noise and the same labels as the student, dropped labels included.
    """

    takes_subsets: ClassVar[bool] = True

    student_block: int
    teacher_block: int
    distance: Distance
    weight: float
    schedule: Decay
    t_max: float
    time: Clock
    beta: float

    @property
    def taps(self) -> Sequence[int]:
        """The student's aligned block."""
        return (self.student_block,)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """SRA's two-layer head on the student's tokens; the teacher's tokens are not projected."""
        return nn.ModuleDict({"head": align.sra_head(info.width)})

    def teacher_time(self, objective: Objective, t_host: Tensor, u: Tensor) -> Tensor:
        """Return the teacher's times (B,) on the host for the student's times and uniform draws u (B,)."""
        return align.cleaner(objective, t_host, amount=self.t_max, u=u, clock=self.time)

    def measure(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return the distance (B,) between projected student tokens and teacher tokens, both (B,N,D)."""
        return token_distance(self.distance, student, teacher, self.beta)

    def weight_at(self, epoch: int) -> float:
        """Return the weight of the loss: constant, or decaying exponentially after the last full epoch."""
        if self.schedule == "constant":
            return self.weight
        last_full, epochs_per_decade = DECAY[self.schedule]
        return float(self.weight * 0.1 ** (max(0, epoch - last_full) / epochs_per_decade))

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the distance between the student's block and the EMA's block at less noise."""
        # The teacher's input: the student's sample and noise at an earlier time
        noised = step.noised
        t = self.teacher_time(step.objective, noised.t_host, step.batch.rng.uniform("sra"))
        cleaner = step.objective.at(noised.x0, noised.noise, t)
        target = step.teach(step.ema, cleaner.x_t, cleaner.t, step.batch.y, block=self.teacher_block)
        # The student's projected tokens, and the weight of this epoch
        target = align.at_kept(target, step.kept.get(self.student_block))
        value = self.measure(step.project("head", step.features[self.student_block]), target)
        return {"sra": Term(value, self.weight_at(step.images_seen // step.dataset_size))}


def published_blocks(info: BackboneInfo) -> tuple[int, int]:
    """Return the default student and teacher block, 0-based.

    Published, 1-based: 8 and 20 of SiT-XL's 28, 8 and 16 of DiT-XL's 28 (README); 4 and 8 of 12 (defaults of
    the code). Other sizes, and U-ViT, use the relative depth of SiT-XL's blocks.
    """
    if info.depth == 12:
        return 3, 7
    teacher = 16 if info.name == "dit" else 20
    return align.relative_block(info.depth, 8, 28), align.relative_block(info.depth, teacher, 28)


def published_weight(c: OptionContext) -> float:
    """Return the default weight of the loss."""
    if c.options["distance"] in COSINES:
        return 0.5
    return 0.04 if c.info.name == "dit" else 0.2


def published_schedule(c: OptionContext) -> Decay:
    """Return the default weight schedule."""
    if c.options["distance"] in COSINES:
        return "constant"
    # Three channels are pixels, whose size is the image's own.
    return "512" if c.info.input_size >= 64 and c.info.channels > 3 else "256"


@RECIPES.register_module(name="sra")
@computed_defaults
def sra(
    info: BackboneInfo,
    *,
    student_block: Block = computed(lambda c: published_blocks(c.info)[0]),
    teacher_block: Block = computed(lambda c: published_blocks(c.info)[1]),
    distance: Distance = "smooth-l1",
    weight: NonNegativeReal = computed(published_weight),
    schedule: Decay = computed(published_schedule),
    t_max: Time = 0.2,
    time: Clock = computed(lambda c: "native" if c.info.name == "dit" else "flow"),
    beta: PositiveReal = 0.05,
) -> Sequence[Stage]:
    """Align a block with a deeper block of the EMA, which sees the same sample at a lower noise level.

    student_block, teacher_block: 0-based. Published, 1-based: 8 and 20 for SiT-XL, 8 and 16 for DiT-XL.
    distance: `smooth-l1` as published; `cosine` over channels; `cosine-released` over tokens, as the released
      code computes it; `l1` and `l2`, the other options of that code.
    weight: weight of the loss. Default: 0.5 for the cosines, 0.04 for DiT, else 0.2.
    schedule: `256` and `512` lower the weight after epochs 149 and 99, as published for those resolutions;
      `constant` keeps it. Default: `constant` for the cosines, else by the size of the latents.
    t_max: the largest reduction of the teacher's time.
    time: clock of t_max, `flow` for flow-equivalent or `native` for the objective's own time. Default:
      `native` for DiT, by whole steps as published, else `flow`.
    beta: threshold of smooth-l1.
    """
    check_beta(distance, beta)
    supervision = Sra(
        student_block=info.block("recipe.student_block", student_block),
        teacher_block=info.block("recipe.teacher_block", teacher_block),
        distance=distance,
        weight=weight,
        schedule=schedule,
        t_max=t_max,
        time=time,
        beta=beta,
    )
    return [Stage("sra", lambda earlier: supervision)]
