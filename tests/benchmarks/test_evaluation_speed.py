"""Time of samplers, data loading and metrics on the embedded digits.

A ratio compares two things that are measured in turn, so that a machine that slows down slows both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stbench.config.build import build_backbone, build_objective
from stbench.config.resolve import RunRequest, resolve
from stbench.core.registry import OBJECTIVES, load_builtins, lookup, names
from stbench.core.rng import Rng
from stbench.data.dataset import get_dataset
from stbench.diffusion.sample import Guidance, nfe, resolve_sampler, sample
from stbench.evaluate import generate
from stbench.evaluate.extractors import get_extractor
from stbench.evaluate.metrics import BASIC_METRICS, EXTRA_METRICS, compute_metrics, reference_statistics

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


def ratio(slow: Callable[[], object], fast: Callable[[], object], rounds: int = 5) -> float:
    """Median over the rounds of the time of `slow` divided by that of `fast`."""
    found = []
    for _ in range(rounds):
        seconds = []
        for call in (slow, fast):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        found.append(seconds[0] / seconds[1])
    return median(found)


def generation(guidance: Guidance) -> Callable[[], torch.Tensor]:
    """Generation of a batch of 250 digits with SiT in four steps, as a call."""
    digits, process = get_dataset("digits"), build_objective("linear")
    network = build_backbone(resolve(RunRequest("sit", "vanilla")).backbone, "linear", digits).eval()
    return lambda: generate.generate(
        network,
        process,
        digits,
        n=250,
        labels="balanced",
        seed=0,
        sampler="euler",
        steps=4,
        guidance=guidance,
        device="cpu",
    )[0]


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="torch uses one core")
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_parts_in_threads_against_all_cores_for_every_operation(
    benchmark: BenchmarkFixture, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw, divisible = generation(Guidance(scale)), generate._is_divisible

    def plain() -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(generate, "_is_divisible", lambda *_: False)
            return draw()

    assert generate._is_divisible is divisible and (draw().int() - plain().int()).abs().max() <= 1
    found = ratio(plain, draw)
    benchmark.group, benchmark.extra_info["ratio"] = "250 samples of 4 steps", found
    benchmark.name = f"threads, guidance {scale:g}: {found:.2f} x"
    benchmark.pedantic(draw, rounds=1)
    # The processor's other work may take a core, but threads must not be slower.
    assert found > 0.9


def test_a_guidance_interval_saves_the_second_pass_outside_it(benchmark: BenchmarkFixture) -> None:
    everywhere, inside = generation(Guidance(1.5)), generation(Guidance(1.5, 0.0, 0.4))
    everywhere(), inside()
    found = ratio(everywhere, inside)
    benchmark.group, benchmark.extra_info["ratio"] = "250 samples of 4 steps", found
    benchmark.name = f"guidance everywhere / in [0,0.4]: {found:.2f} x"
    benchmark.pedantic(inside, rounds=1)
    assert found > 1.1  # 8 passes against 5, and a decoder


def test_cached_reference_statistics(benchmark: BenchmarkFixture, tmp_path: Path) -> None:
    digits, extractor = get_dataset("digits"), get_extractor("stbench-digits")

    def statistics() -> object:
        return reference_statistics(digits, "train", extractor, cache_dir=tmp_path)

    def uncached() -> object:
        for file in tmp_path.iterdir():
            file.unlink()
        return statistics()

    found = ratio(uncached, statistics)
    benchmark.group, benchmark.extra_info["ratio"] = "reference of 1500 images", found
    benchmark.name = f"measured / cached: {found:.1f} x"
    benchmark.pedantic(statistics, rounds=1)
    assert found > 1.5
