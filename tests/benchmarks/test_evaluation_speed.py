"""Time of samplers, data loading and metrics on the embedded digits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stbench.config.build import build_backbone, build_objective
from stbench.config.resolve import RunRequest, resolve
from stbench.core.registry import OBJECTIVES, load_builtins, lookup, names
from stbench.core.rng import Rng
from stbench.data.dataset import get_dataset
from stbench.diffusion.sample import Guidance, nfe, resolve_sampler, sample
from stbench.evaluate.metrics import BASIC_METRICS, EXTRA_METRICS, compute_metrics

load_builtins()
pytestmark = pytest.mark.benchmark
IMAGES, STEPS = 50, 20
PAIRS = [(o, s, 1.0) for o in sorted(names(OBJECTIVES)) for s in lookup(OBJECTIVES, o).samplers]


@pytest.mark.parametrize(("objective", "sampler", "guidance"), [*PAIRS, ("linear", "euler", 1.5)])
def test_sampler(benchmark: BenchmarkFixture, objective: str, sampler: str, guidance: float) -> None:
    digits, process = get_dataset("digits"), build_objective(objective)
    spec = resolve(RunRequest("sit", "vanilla", objective=objective))
    network = build_backbone(spec.backbone, objective, digits).eval()
    shape = (IMAGES, digits.channels, digits.input_size, digits.input_size)
    noise, labels = torch.randn(shape), torch.arange(IMAGES) % digits.classes

    def draw() -> torch.Tensor:
        return sample(
            resolve_sampler(sampler, process),
            network,
            process,
            noise,
            labels,
            steps=STEPS,
            guidance=Guidance(guidance),
            noise=lambda i: torch.randn(shape),
        )

    benchmark.group = f"{IMAGES} samples of {STEPS} steps"
    benchmark.extra_info["network_evaluations"] = nfe(sampler, STEPS) * (2 if guidance > 1.0 else 1)
    assert benchmark.pedantic(draw, rounds=3, warmup_rounds=1).isfinite().all()


def test_a_batch_of_latents(benchmark: BenchmarkFixture) -> None:
    digits = get_dataset("digits")
    shape, size = (digits.channels, digits.input_size, digits.input_size), digits.preset.batch

    def load() -> torch.Tensor:
        index = digits.order(0, 6400, size)
        digits.labels(index)
        return digits.latents(index, Rng(0, 6400, size).normal("posterior", shape))

    benchmark.group = f"data, a batch of {size}"
    assert benchmark(load).shape == (size, *shape)


@pytest.mark.parametrize(
    "wanted", [BASIC_METRICS, EXTRA_METRICS], ids=["at every point", "at the last point"]
)
def test_metrics(benchmark: BenchmarkFixture, wanted: tuple[str, ...], tmp_path: Path) -> None:
    digits = get_dataset("digits")
    images, labels = digits.train_images()[:1000], torch.arange(1000) % digits.classes
    benchmark.group = "metrics of 1000 images"
    found = benchmark.pedantic(
        lambda: compute_metrics(images, digits, wanted, cache_dir=tmp_path, labels=labels),
        rounds=3,
        warmup_rounds=1,
    )
    assert found.keys() == set(wanted)
