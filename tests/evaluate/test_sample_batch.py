"""Batches of numbered images: fixed rows per call, and the decoder's precision."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.diffusion import LinearFlow
from stbench.diffusion.sample import Guidance
from stbench.evaluate.sample_batch import CPU_ROWS, BatchSampler, SampleSpec, rows_per_call
from stbench.evaluate.sample_model import SamplingModel

CPU = torch.device("cpu")


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
    return (z[:, :3] * 20 + 128).clamp(0, 255).to(torch.uint8)


def small_model(decode: Callable[[Tensor], Tensor] = first_three_channels) -> SamplingModel:
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


def small_spec(precision: str = "fp32") -> SampleSpec:
    return SampleSpec(6, Guidance(), "euler", 3, "balanced", seed=0, batch=5, precision=precision)


def test_every_call_on_a_cpu_has_the_same_number_of_rows() -> None:
    model = small_model()
    assert BatchSampler(model, small_spec(), CPU).sample(0, 6).shape == (6, 8, 8, 3)
    assert isinstance(model.backbone, RowRecorder) and set(model.backbone.rows) == {CPU_ROWS}
    assert rows_per_call(small_spec(), torch.device("cuda")) == 5


def test_the_decoder_runs_in_fp32_whatever_the_network_runs_in() -> None:
    cudnn, matmul, seen = torch.backends.cudnn, torch.backends.cuda.matmul, []

    def decode(z: Tensor) -> Tensor:
        seen.append((cudnn.enabled, cudnn.allow_tf32, matmul.allow_tf32))
        return torch.zeros(len(z), 3, 4, 4, dtype=torch.uint8)

    before = cudnn.enabled, cudnn.allow_tf32, matmul.allow_tf32
    BatchSampler(small_model(decode), small_spec("tf32"), CPU).sample(0, 2)
    assert seen == [(True, False, False)]
    assert before == (cudnn.enabled, cudnn.allow_tf32, matmul.allow_tf32)
