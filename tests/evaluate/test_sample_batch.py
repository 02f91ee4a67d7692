"""Batches of numbered images: fixed rows per call, and the decoder's precision."""

from __future__ import annotations

import torch
from torch import Tensor

from stbench.diffusion.sample import Guidance
from stbench.evaluate.sample_batch import CPU_ROWS, BatchSampler, SampleSpec, rows_per_call
from tests.sampling import RowRecorder, small_model

CPU = torch.device("cpu")


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
