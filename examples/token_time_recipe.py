"""A time per token: stbench run --plugin examples/token_time_recipe.py --recipe half-clean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stbench.core.backbone import BackboneInfo
from stbench.core.objective import Batch, Noised, Objective
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES


@dataclass
class HalfClean(Supervision):
    """No auxiliary loss, but the input has two noise levels."""

    amount: float
    tokens: int

    def corrupt(self, objective: Objective, batch: Batch) -> Noised:
        """Let every second token have less noise; the time of all tokens is (B,N)."""
        times = objective.sample_t(batch.rng)
        cleaner = objective.earlier(times, self.amount, batch.rng.uniform("half-clean"))
        odd = torch.arange(self.tokens) % 2 == 1
        noise = batch.rng.normal("noise", tuple(batch.x0.shape[1:])).to(batch.x0.device)
        return objective.at(batch.x0, noise, torch.where(odd, cleaner[:, None], times[:, None]))

    def terms(self, step: Step) -> Mapping[str, Term]:
        """Return no terms."""
        return {}


@RECIPES.register_module(name="half-clean")
def half_clean(info: BackboneInfo, *, amount: float = 0.2) -> Sequence[Stage]:
    """Remove up to `amount` of the time from every second token."""
    info.require("token-time", "recipe 'half-clean'")
    return [Stage("half-clean", lambda earlier: HalfClean(amount, info.tokens))]
