"""The guidance interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.diffusion import LinearFlow
from stbench.diffusion.sample import Guidance, sample


class CallRecorder(Backbone):
    """Predicts by label, so that guided and unguided latents differ; records time and rows of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.info = BackboneInfo("recorder", "custom", 1, 1, 16, 2, 4, 8, 10)
        self.calls: list[tuple[float, int]] = []

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        self.calls.append((float(t[0]), len(x)))
        return 0.1 * x + y.view(-1, 1, 1, 1), {}


@pytest.mark.parametrize("sampler", ["euler", "euler-maruyama", "heun"])
def test_guidance_outside_its_interval_costs_nothing(sampler: str) -> None:
    network, z = CallRecorder(), torch.zeros(5, 4, 8, 8)
    options: dict[str, Any] = {"steps": 10, "noise": lambda draw: z}
    sample(sampler, network, LinearFlow(), z, torch.arange(5), guidance=Guidance(1.8, 0.2, 0.7), **options)
    inside = [rows for t, rows in network.calls if 0.2 <= t <= 0.7]
    outside = [rows for t, rows in network.calls if not 0.2 <= t <= 0.7]
    if sampler == "heun":  # the correction takes the decision at the start of its step
        assert {rows for _, rows in network.calls} == {5, 10}
        assert sum(rows for _, rows in network.calls) < 10 * len(network.calls)
    else:
        assert set(inside) == {10} and set(outside) == {5}
    assert len(inside) > 3 and len(outside) > 3
    plain = CallRecorder()
    sample(sampler, plain, LinearFlow(), z, torch.arange(5), guidance=Guidance(1.0, 0.2, 0.7), **options)
    assert {rows for _, rows in plain.calls} == {5} and len(plain.calls) == len(network.calls)
