"""SRA, self-representation alignment (repository vvvvvjdy/SRA): the EMA network at less noise teaches a
shallower block of the student.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.core.recipe import OptionContext, Stage, Step, Supervision, Term, computed
from stbench.core.registry import RECIPES
from stbench.models import align
from stbench.models.align import Clock, Time

Distance = Literal["smooth-l1", "cosine", "cosine-released", "l1", "l2"]
COSINES = ("cosine", "cosine-released")
Decay = Literal["256", "512", "constant"]
DECAY = {"256": (149, 1000), "512": (99, 800)}
"""Schedule -> last epoch of full weight, and the epochs in which the weight falls to a tenth after that."""


@dataclass
class Sra(Supervision):
    """weight(epoch) * distance(head(h_s of the student), h_t of the EMA at t' <= t).

    The teacher sees the same noise and the same labels, dropped ones included.
    """

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
        """SRA's two-layer head on the student's tokens; the teacher's stay raw."""
        return nn.ModuleDict({"head": align.sra_head(info.width)})

    def teacher_time(self, objective: Objective, t_host: Tensor, u: Tensor) -> Tensor:
        """The teacher's times (B,) on the host for uniform draws u (B,)."""
        return align.cleaner(objective, t_host, self.t_max, u, self.time)

    def measure(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The distance (B,) of projected student tokens from the teacher's, both (B,N,D)."""
        if self.distance == "smooth-l1":
            return align.smooth_l1(student, teacher, self.beta)
        if self.distance in ("l1", "l2"):
            return (align.l1 if self.distance == "l1" else align.mse)(student, teacher)
        similarity = align.cosine if self.distance == "cosine" else align.cosine_released
        return 1.0 - similarity(student, teacher)

    def weight_at(self, epoch: int) -> float:
        """Constant, or a tenth of the weight for every so many epochs after the last full one."""
        if self.schedule == "constant":
            return self.weight
        full, scale = DECAY[self.schedule]
        return float(self.weight * 0.1 ** (max(0, epoch - full) / scale))

    def terms(self, step: Step) -> Mapping[str, Term]:
        """One full-precision forward of the EMA up to its block, and the distance."""
        noised = step.noised
        t = self.teacher_time(step.objective, noised.t_host, step.batch.rng.uniform("sra"))
        cleaner = step.objective.at(noised.x0, noised.noise, t)
        target = step.teach(step.ema, cleaner.x_t, cleaner.t, step.batch.y, block=self.teacher_block)
        value = self.measure(step.project("head", step.features[self.student_block]), target)
        return {"sra": Term(value, self.weight_at(step.images_seen // step.dataset_size))}


def published_blocks(info: BackboneInfo) -> tuple[int, int]:
    """0-based student and teacher block.

    Published (1-based): 8 and 20 of SiT-XL's 28, 8 and 16 of DiT-XL's (README); 4 and 8 of 12 are the code's
    defaults. Other sizes, and U-ViT, follow SiT-XL's relative depth.
    """
    if info.depth == 12:
        return 3, 7
    teacher = 16 if info.name == "dit" else 20
    return align.relative_block(info.depth, 8, 28), align.relative_block(info.depth, teacher, 28)


def _published_weight(c: OptionContext) -> float:
    if c.options["distance"] in COSINES:
        return 0.5
    return 0.04 if c.info.name == "dit" else 0.2


def _published_schedule(c: OptionContext) -> Decay:
    if c.options["distance"] in COSINES:
        return "constant"
    return "512" if c.info.input_size >= 64 and c.info.channels > 3 else "256"


@RECIPES.register_module(name="sra")
def sra(
    info: BackboneInfo,
    *,
    student_block: int = computed(lambda c: published_blocks(c.info)[0]),
    teacher_block: int = computed(lambda c: published_blocks(c.info)[1]),
    distance: Distance = "smooth-l1",
    weight: NonNegativeFloat = computed(_published_weight),
    schedule: Decay = computed(_published_schedule),
    t_max: Time = 0.2,
    time: Clock = computed(lambda c: "native" if c.info.name == "dit" else "flow"),
    beta: PositiveFloat = 0.05,
) -> Sequence[Stage]:
    """Align a block with a deeper block of the EMA network at a cleaner time: same noise, same labels.

    Blocks are 0-based (published, 1-based: 8 to 20 for SiT-XL, 8 to 16 for DiT-XL). distance: `smooth-l1`
    is the paper's; `cosine` is over channels; `cosine-released` is over tokens, as the released code
    computes it; `l1` and `l2` are its other options. weight: 0.5 for the cosines, else 0.2 (DiT 0.04).
    schedule: `256` and `512` lower the weight after epoch 149 and 99, as published for those resolutions
    (default: the latents'); `constant` for the cosines.
    t_max: the teacher has up to this much less noise. time: `flow`-equivalent or `native` clock of t_max;
    DiT's default is native, by whole steps. beta: of smooth-l1.
    """
    student = info.block("recipe.student_block", student_block)
    teacher = info.block("recipe.teacher_block", teacher_block)
    if distance != "smooth-l1" and beta != 0.05:
        raise UserError(f"recipe.beta={beta} has no meaning for distance '{distance}'; it is smooth-l1's")
    recipe = Sra(student, teacher, distance, weight, schedule, t_max, time, beta)
    return [Stage("sra", lambda earlier: recipe)]
