"""A GPU computes what the CPU does: steps of every recipe, bfloat16, compiled blocks, samples."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stbench.bench.measure import first_losses
from stbench.bench.workload import Case, Workload
from stbench.core.registry import RECIPES, load_builtins, names
from stbench.diffusion.sample import Guidance, sample
from stbench.train.step import StageModel

load_builtins()

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BATCH = 16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def workload(
    recipe: str, device: torch.device, *, precision: str = "fp32", compiled: bool = False
) -> Workload:
    return Workload(Case("sit", recipe, batch=BATCH, precision=precision, compile=compiled), device)


def weights(model: StageModel) -> torch.Tensor:
    return torch.cat([parameter.detach().cpu().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("recipe", names(RECIPES))
def test_a_gpu_trains_as_the_cpu_does(recipe: str) -> None:
    host, device = workload(recipe, CPU), workload(recipe, GPU)
    assert first_losses(device.step) == pytest.approx(first_losses(host.step), rel=1e-4)
    difference = weights(device.model) - weights(host.model)
    assert difference.norm() < 1e-3 * weights(host.model).norm()


@pytest.mark.parametrize("recipe", names(RECIPES))
def test_bfloat16_gives_about_the_same_losses(recipe: str) -> None:
    exact, rounded = (first_losses(workload(recipe, GPU, precision=p).step) for p in ("fp32", "bf16"))
    assert rounded == pytest.approx(exact, rel=0.05, abs=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", ["vanilla", "self-transcendence"])
def test_compiled_blocks_give_the_same_losses(recipe: str, precision: str) -> None:
    eager, compiled = (
        first_losses(workload(recipe, GPU, precision=precision, compiled=flag).step) for flag in (False, True)
    )
    assert compiled == pytest.approx(eager, rel=1e-3 if precision == "fp32" else 0.02)


@pytest.fixture
def waits_are_errors() -> Iterator[None]:
    """Within the test, an operation that makes the host wait for the GPU raises an error."""
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", names(RECIPES))
def test_a_step_does_not_wait_for_the_gpu(recipe: str, precision: str, waits_are_errors: None) -> None:
    found = workload(recipe, GPU, precision=precision)
    for _ in range(2):  # tables and counts of FLOPs are computed once
        found.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        found.step()


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_gpu_samples_as_the_cpu_does(scale: float) -> None:
    host, device = workload("vanilla", CPU).model, workload("vanilla", GPU).model
    noise = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = [
        sample(
            "euler",
            model.student.eval(),
            model.objective,
            noise.to(where),
            torch.arange(8, device=where),
            steps=5,
            guidance=Guidance(scale),
        ).cpu()
        for model, where in ((host, CPU), (device, GPU))
    ]
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-3, atol=1e-4)


def test_peak_memory_is_near_the_estimate() -> None:
    from stbench.bench.measure import peak_memory, reset_peak_memory
    from stbench.train.memory import estimate_memory

    found = Workload(Case("sit-s/2", "vanilla", batch=32, precision="bf16"), GPU)
    reset_peak_memory(GPU)
    for _ in range(3):
        found.step()
    estimate = estimate_memory(found.prepared, found.stage)
    # The data set of the benchmark is on the GPU as well.
    images = found.dataset.train_images()
    data = images.numel() + 512 * 4 * 32 * 32 * 4
    assert peak_memory(GPU, was_reset=True) - data == pytest.approx(estimate.total, rel=0.25)
