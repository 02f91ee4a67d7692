"""A model to sample from that is not trained and costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.diffusion import LinearFlow
from stbench.evaluate.sample_model import SamplingModel


class RowRecorder(Backbone):
    """Predicts by label, so that guided and unguided images differ; records the rows of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.info = BackboneInfo("recorder", "custom", 1, 1, 16, 2, 4, 8, 10)
        self.rows: list[int] = []

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        self.rows.append(len(x))
        return 0.1 * x + y.view(-1, 1, 1, 1), {}


def first_three_channels(z: Tensor) -> Tensor:
    """Decode latents to uint8 images."""
    return (z[:, :3] * 20 + 128).clamp(0, 255).to(torch.uint8)


def small_model(decode: Callable[[Tensor], Tensor] = first_three_channels) -> SamplingModel:
    """A model of 4x8x8 latents and ten classes that guides between t=0.2 and 0.7."""
    return SamplingModel(
        backbone=RowRecorder(),
        objective=LinearFlow(),
        decode=decode,
        weights_hash="w",
        decoder_hash="d",
        defaults={
            "sampler": "euler",
            "steps": 10,
            "labels": "random",
            "interval": (0.2, 0.7),
            "channels": None,
        },
    )
