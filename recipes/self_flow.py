"""Self-Flow, self-alignment with two noise levels in one sample (repository black-forest-labs/Self-Flow).

A random group of tokens has one time and the other tokens another. The EMA of the network, given less noise,
teaches a shallower block of the student. Self-Flow's training code is not public: settings that its README
does not state are those of SRA's follow-up (dual timesteps; repository vvvvvjdy/SRA, folder SiT-SRA_DTS_AS).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from stbench.core.backbone import BackboneInfo
from stbench.core.device import upload
from stbench.core.errors import UserError
from stbench.core.objective import Batch, Noised, Objective, on_pixels
from stbench.core.ranges import Block, NonNegativeReal, PositiveReal
from stbench.core.recipe import Stage, Step, Supervision, Term, computed, computed_defaults
from stbench.core.registry import RECIPES
from stbench.core.rng import Rng, key
from stbench.models import align
from stbench.models.align import Clock, Time
from stbench.recipes.sra import Distance, check_beta, token_distance

Ratio = Annotated[float, Field(gt=0, lt=1)]
TeacherInput = Literal["min", "per-group", "same", "min-released"]
Labels = Literal["true", "dropped"]
Separation = Literal["none", "student", "both"]


def first_count(ratio: float, tokens: int) -> int:
    """Return how many of `tokens` are in group 0: a share `ratio`, rounded."""
    return math.floor(ratio * tokens + 0.5)


@dataclass
class SelfFlow(Supervision):
    """weight * distance(head(h_s of the student), h_t of the EMA); two times per sample, a time per token."""

    student_block: int
    teacher_block: int
    ratio: float
    teacher: TeacherInput
    distance: Distance
    weight: float
    labels: Labels
    separation: Separation
    t_max: float
    time: Clock
    beta: float
    tokens: int

    @property
    def taps(self) -> Sequence[int]:
        """The student's aligned block."""
        return (self.student_block,)

    def heads(self, info: BackboneInfo) -> nn.ModuleDict:
        """SRA's two-layer head on the student's tokens; the teacher's tokens are not projected."""
        return nn.ModuleDict({"head": align.sra_head(info.width)})

    # Random numbers, on the host. They depend on the step only, so each method may draw them again.

    def order(self, rng: Rng) -> Tensor:
        """Draw independent numbers (B,N), whose order decides which tokens are in group 0."""
        return rng.normal("self-flow-groups", (self.tokens,))

    def times(self, objective: Objective, rng: Rng) -> tuple[Tensor, Tensor]:
        """Draw the times (B,) of groups 0 and 1, independent of each other, as the objective draws times."""
        first, second = (replace(rng, seed=key(rng.seed, f"self-flow-{group}")) for group in (0, 1))
        return objective.sample_t(first), objective.sample_t(second)

    def offsets(self, rng: Rng) -> tuple[Tensor, Tensor]:
        """Draw uniform numbers (B,) for the teacher's times of groups 0 and 1."""
        return rng.uniform("self-flow-teacher-0"), rng.uniform("self-flow-teacher-1")

    # Groups

    def first_group(self, rng: Rng) -> Tensor:
        """Return whether each token is in group 0, bool (B,N): those with the smallest numbers of `order`."""
        return self.order(rng).argsort(1).argsort(1) < first_count(self.ratio, self.tokens)

    def on_tokens(self, rng: Rng, times: tuple[Tensor, Tensor]) -> Tensor:
        """Return the time of every token (B,N) for the times (B,) of the two groups."""
        return torch.where(self.first_group(rng), times[0][:, None], times[1][:, None])

    def own_group(self, batch: Batch) -> Tensor:
        """Return the mask (B,N,N) that lets a token attend to the tokens of its own group."""
        first = upload(self.first_group(batch.rng), batch.x0.device)
        return first[:, :, None] == first[:, None, :]

    # The student's input and the teacher's

    def corrupt(self, objective: Objective, batch: Batch) -> Noised:
        """Corrupt both groups with the same noise, each at its own time."""
        noise = upload(batch.rng.normal("noise", tuple(batch.x0.shape[1:])), batch.x0.device)
        return objective.at(batch.x0, noise, self.on_tokens(batch.rng, self.times(objective, batch.rng)))

    def inputs(self, batch: Batch, noised: Noised) -> Mapping[str, Any]:
        """The attention mask of the student, if its groups are separated."""
        return {} if self.separation == "none" else {"mask": self.own_group(batch)}

    def teacher_input(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return the teacher's latents (B,C,H,W) and their times (B,), or (B,N) with one per token."""
        noised, objective, rng = step.noised, step.objective, step.batch.rng
        if self.teacher == "same":
            return noised.x_t, noised.t
        times = self.times(objective, rng)
        if self.teacher == "per-group":
            first, second = (
                align.cleaner(objective, t, amount=self.t_max, u=u, clock=self.time)
                for t, u in zip(times, self.offsets(rng), strict=True)
            )
            cleaner = objective.at(noised.x0, noised.noise, self.on_tokens(rng, (first, second)))
        else:
            cleaner = objective.at(noised.x0, noised.noise, torch.minimum(*times))
        if self.teacher != "min-released":
            return cleaner.x_t, cleaner.t
        first_group = upload(self.first_group(rng), noised.x0.device)
        noisy = on_pixels(first_group, noised.x0.shape[-1])
        return torch.where(noisy, cleaner.x_t, noised.x0), cleaner.t

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compute the distance between the student's block and the EMA's block."""
        x, t = self.teacher_input(step)
        y = step.batch.y_true if self.labels == "true" else step.batch.y
        mask: Any = {"mask": self.own_group(step.batch)} if self.separation == "both" else {}
        target = step.teach(step.ema, x, t, y, block=self.teacher_block, **mask)
        student = step.project("head", step.features[self.student_block])
        return {"self-flow": Term(token_distance(self.distance, student, target, self.beta), self.weight)}


def published_blocks(info: BackboneInfo) -> tuple[int, int]:
    """Return the default student and teacher block, 0-based.

    Published, 1-based: 8 and 20 of XL's 28 (Self-Flow), 3 and 8 of B's 12 (follow-up). Other sizes use XL's
    relative depth.
    """
    if info.depth == 12:
        return 2, 7
    return align.relative_block(info.depth, 8, 28), align.relative_block(info.depth, 20, 28)


@RECIPES.register_module(name="self-flow")
@computed_defaults
def self_flow(
    info: BackboneInfo,
    *,
    student_block: Block = computed(lambda c: published_blocks(c.info)[0]),
    teacher_block: Block = computed(lambda c: published_blocks(c.info)[1]),
    ratio: Ratio = 0.25,
    teacher: TeacherInput = "min",
    distance: Distance = "cosine",
    weight: NonNegativeReal = 0.5,
    labels: Labels = "true",
    separation: Separation = "none",
    t_max: Time = 0.2,
    time: Clock = computed(lambda c: "native" if c.info.name == "dit" else "flow"),
    beta: PositiveReal = 0.05,
) -> Sequence[Stage]:
    """Give two groups of tokens independent times, and align a block with one of the EMA at less noise.

    student_block, teacher_block: 0-based. Published, 1-based: 8 and 20 for XL, 3 and 8 for B (follow-up).
    ratio: share of the tokens in group 0, chosen at random; 0.25 as published.
    teacher: times of the EMA's input. `min`, the smaller of the two for all tokens (Self-Flow); `per-group`,
      each group's time reduced by up to t_max (follow-up); `same`, the student's input; `min-released`, a bug
      of the follow-up's code: group 1 is clean although the teacher is told the smaller time.
    distance: as in sra: `cosine` over channels; `cosine-released` over tokens, as the follow-up's code
      computes it; `smooth-l1`, `l1` and `l2`.
    weight: weight of the loss; 0.5 as in the follow-up's code.
    labels: the teacher's labels, `true` as in that code, or `dropped` as the student's (SRA).
    separation: `student` restricts attention in training to the tokens of the same group, `both` also in the
      teacher, as the follow-up does with `per-group`. Sampling always uses full attention.
    t_max, time: the largest reduction of the teacher's times, and its clock, with `per-group`; as in sra.
    beta: threshold of smooth-l1.
    """
    info.require("token-time", "recipe 'self-flow'")
    if separation != "none":
        info.require("attention", f"recipe.separation={separation}")
    check_beta(distance, beta)
    if not 0 < first_count(ratio, info.tokens) < info.tokens:
        raise UserError(
            f"recipe.ratio={ratio} leaves one of the groups of {info.tokens} tokens empty; try 0.25"
        )
    if teacher != "per-group" and t_max != 0.2:
        raise UserError(
            f"recipe.t_max={t_max} has no effect with recipe.teacher={teacher}; "
            f"leave it out, or use --set recipe.teacher=per-group"
        )
    supervision = SelfFlow(
        student_block=info.block("recipe.student_block", student_block),
        teacher_block=info.block("recipe.teacher_block", teacher_block),
        ratio=ratio,
        teacher=teacher,
        distance=distance,
        weight=weight,
        labels=labels,
        separation=separation,
        t_max=t_max,
        time=time,
        beta=beta,
        tokens=info.tokens,
    )
    return [Stage("self-flow", lambda earlier: supervision)]
