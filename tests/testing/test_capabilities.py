"""The conformance check of capabilities names every violation, and checks those that `info` names only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from stbench.backbones.sit import SiT
from stbench.core.backbone import Output
from stbench.testing import check_backbone

SMALL = dict(patch=2, width=24, depth=3, heads=2)


class Flawed(SiT):
    """SiT with one violation of the contract of capabilities, or none."""

    def __init__(self, *, flaw: str = "", **options: Any) -> None:
        super().__init__(**options, **SMALL)
        self.flaw = flaw
        if flaw == "unknown":
            self.info = replace(self.info, capabilities=("attention", "masks"))
        if flaw == "both":
            self.info = replace(self.info, lacks={"route": "it has none"})
        if flaw == "none":
            self.info = replace(self.info, capabilities=())

    def forward_intermediates(self, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        change: Callable[..., Output] | None = getattr(self, "_" + self.flaw.replace(" ", "_"), None)
        run = super().forward_intermediates
        return run(x, t, y, **inputs) if change is None else change(run, x, t, y, **inputs)

    def _none(self, run: Any, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        assert inputs.keys() <= {"indices", "stop_early"}
        return run(x, t, y, **inputs)

    def _one_time(self, run: Any, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        return run(x, t if t.ndim == 1 else t[:, 0], y, **inputs)

    def _first_time(self, run: Any, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        return run(x, t if t.ndim == 1 else t[:, :1].expand_as(t), y, **inputs)

    def _every_logit(self, run: Any, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        asked = range(self.info.depth) if inputs.get("attention") else ()
        return run(x, t, y, **{**inputs, "attention": asked})

    def _always_logits(self, run: Any, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        return run(x, t, y, **{"attention": (2,), **inputs})

    def _mean_logits(self, run: Any, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        found = run(x, t, y, **inputs)
        return replace(found, attention={k: v.mean(1) for k, v in found.attention.items()})

    def _no_mask(self, run: Any, x: Tensor, t: Tensor, y: Tensor, mask: Any = None, **inputs: Any) -> Output:
        return run(x, t, y, **inputs)

    def _turned_mask(
        self, run: Any, x: Tensor, t: Tensor, y: Tensor, mask: Any = None, **inputs: Any
    ) -> Output:
        return run(x, t, y, **inputs, mask=None if mask is None else mask.mT)

    def _inverted_mask(
        self, run: Any, x: Tensor, t: Tensor, y: Tensor, mask: Any = None, **inputs: Any
    ) -> Output:
        inverted = None if mask is None else ~mask | torch.eye(self.info.tokens, dtype=torch.bool)
        return run(x, t, y, **inputs, mask=inverted)

    def _no_route(self, run: Any, x: Tensor, t: Tensor, y: Tensor, routes: Any = (), **inputs: Any) -> Output:
        return run(x, t, y, **inputs)

    def _no_kept(self, run: Any, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        return replace(run(x, t, y, **inputs), kept={})

    def _dropped_become_zero(
        self, run: Any, x: Tensor, t: Tensor, y: Tensor, routes: Any = (), **inputs: Any
    ) -> Output:
        found = run(x, t, y, routes=routes, **inputs)
        if not routes or found.prediction is None:
            return found
        inside = torch.zeros(len(x), self.info.tokens, device=x.device).scatter(1, routes[0].kept, 1.0)
        pixels = inside.reshape(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
        return replace(found, prediction=found.prediction * pixels)

    def _dropped_see_the_rest(
        self, run: Any, x: Tensor, t: Tensor, y: Tensor, routes: Any = (), **inputs: Any
    ) -> Output:
        found = run(x, t, y, routes=routes, **inputs)
        if not routes or found.prediction is None or routes[0].kept.shape[1] == self.info.tokens:
            return found
        return replace(found, prediction=found.prediction + x.mean((1, 2, 3), keepdim=True))

    def _no_prefix(
        self, run: Any, x: Tensor, t: Tensor, y: Tensor, prefix: Any = None, **inputs: Any
    ) -> Output:
        return run(x, t, y, **inputs)

    def _no_last_prefix(self, run: Any, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        return replace(run(x, t, y, **inputs), prefix_out=None)

    def _prefix_in_features(self, run: Any, x: Tensor, t: Tensor, y: Tensor, **inputs: Any) -> Output:
        found = run(x, t, y, **inputs)
        joined = {k: torch.cat([v, found.features[k]], dim=1) for k, v in found.prefix.items()}
        return replace(found, features={**found.features, **joined})


FLAWS = {
    "unknown": "info.capabilities has masks; expected some of token-time, attention, route, prefix",
    "both": "info.lacks gives a reason for route, which info.capabilities has",
    "one time": "the condition for a time per token is",
    "first time": "the time of the last token has no effect",
    "every logit": r"asked for the logits of block 2, got those of \[0, 1, 2\]",
    "always logits": "attention logits are returned although nothing asks for them",
    "mean logits": r"attention logits are \(8, 16, 16\), expected \(8, heads, 16, 16\)",
    "no mask": "the mask has no effect",
    "turned mask": "a token that no other token may attend to reaches the others in the first block",
    "inverted mask": "a mask that is true everywhere has an effect",
    "no route": "kept must hold the tokens of the route",
    "no kept": "kept must hold the tokens of the route",
    "dropped become zero": "a dropped token does not have its value from before the route",
    "dropped see the rest": "a kept token has an effect on a token that the route drops",
    "no prefix": r"got prefix tokens of blocks \[\], not \[0, 1, 2\]",
    "no last prefix": r"prefix tokens are None, expected \(8, 2, 24\)",
    "prefix in features": "features contain prefix tokens",
}


@pytest.mark.parametrize("flaw", ["", "none"])
def test_a_sound_backbone_passes_with_and_without_capabilities(flaw: str) -> None:
    check_backbone(partial(Flawed, flaw=flaw))


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_violation_is_named(flaw: str) -> None:
    with pytest.raises(AssertionError, match=FLAWS[flaw]):
        check_backbone(partial(Flawed, flaw=flaw))
