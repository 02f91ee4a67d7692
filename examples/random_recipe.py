"""A recipe with random numbers: stbench run --plugin examples/random_recipe.py --recipe cross-time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stbench.core.backbone import BackboneInfo
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES
from stbench.models import align


@dataclass
class CrossTime(Supervision):
    """MSE between a random subset of the tokens of h_k and those of the EMA at a random earlier time."""

    block: int
    weight: float
    share: float

    @property
    def taps(self) -> Sequence[int]:
        """Student blocks to read, 0-based."""
        return (self.block,)

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Draw from `step.batch.rng`, under names that only this recipe uses."""
        # Per-sample numbers: keyed by seed, stream and images seen, for the rows of this device.
        rng, noised = step.batch.rng, step.noised
        u = rng.uniform("cross-time")
        t = align.cleaner(step.objective, noised.t_host, amount=0.2, u=u, clock="flow")
        earlier = step.objective.at(noised.x0, noised.noise, t)

        # Numbers for the whole step: a host generator, equal on every device.
        tokens = max(1, round(self.share * step.info.tokens))
        chosen = torch.randperm(step.info.tokens, generator=rng.generator("cross-time tokens"))[:tokens]
        chosen = chosen.to(noised.x_t.device)

        target = step.teach(step.ema, earlier.x_t, earlier.t, step.batch.y, block=self.block)
        error = align.mse(step.features[self.block][:, chosen], target[:, chosen])
        return {"cross-time": Term(error, self.weight)}


@RECIPES.register_module(name="cross-time")
def cross_time(
    info: BackboneInfo, *, block: int = 2, weight: float = 0.1, share: float = 0.5
) -> Sequence[Stage]:
    """Align a random share of the tokens with those of the EMA at a random earlier time."""
    supervision = CrossTime(info.block("recipe.block", block), weight, share)
    return [Stage("cross-time", lambda earlier: supervision)]
