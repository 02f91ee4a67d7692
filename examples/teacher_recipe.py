"""A recipe with a frozen teacher: stbench run --plugin examples/teacher_recipe.py --recipe distil."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.recipe import Artifact, NoSupervision, Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES
from stbench.models import align


@dataclass
class Distil(Supervision):
    """1 - cosine(h_k of the student, h_k of an earlier stage's network) at the same x_t, t and label."""

    teacher: Artifact
    """The finished first stage. Its fingerprint becomes part of this stage's."""
    block: int
    weight: float
    _network: Backbone | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def taps(self) -> Sequence[int]:
        """Student blocks to read, 0-based."""
        return (self.block,)

    def setup(self, device: torch.device) -> None:
        """Load the teacher, frozen, once. It never reaches the optimiser or a checkpoint."""
        self._network = self.teacher.load("ema").to(device)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Compare features; `step.teach` runs the teacher without gradients and counts its FLOPs."""
        assert self._network is not None, "setup() has not run"
        noised = step.noised
        target = step.teach(self._network, noised.x_t, noised.t, step.batch.y_true, block=self.block)
        return {"distil": Term(1.0 - align.cosine(step.features[self.block], target), self.weight)}


@RECIPES.register_module(name="distil")
def distil(
    info: BackboneInfo, *, block: int = 2, weight: float = 0.5, length: float = 0.5
) -> Sequence[Stage]:
    """Train a vanilla teacher for `length` times --steps, then align a new network with it."""
    tapped = info.block("recipe.block", block)
    return [
        Stage("teacher", lambda earlier: NoSupervision(), length=length),
        Stage("student", lambda earlier: Distil(earlier["teacher"], tapped, weight)),
    ]
