"""Seconds of a training step: against the loop of the published scripts, and of every recipe against vanilla.

What is compared is measured in turn, so that a machine that slows down slows both; the ratio is in the name.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stbench.bench.measure import measure
from stbench.bench.workload import Case
from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import PreparedRun, prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, Weights
from stbench.core.recipe import Artifact, Cost
from stbench.core.registry import BACKBONES, RECIPES, load_builtins, names
from stbench.train.step import StageModel, make_optimizer, training_step
from tests.refusals import skip_if_refused

load_builtins()
pytestmark = pytest.mark.benchmark
WARMUP, ROUNDS = 3, 15

Step = Callable[[], None]


def last_stage(prepared: PreparedRun) -> StageModel:
    """The stage that is evaluated, ready to train, with untrained networks as teachers."""
    spec, dataset, stage = prepared.spec, prepared.dataset, prepared.stages[-1]

    def load(weights: Weights) -> Backbone:
        return build_backbone(spec.backbone, spec.objective, dataset)

    earlier = {
        s.name: Artifact(s.name, "", "", {}, s.steps, s.images, 0.0, 0.0, load) for s in prepared.stages[:-1]
    }
    model = StageModel(
        build_backbone(spec.backbone, spec.objective, dataset),
        stage.definition.supervision(earlier),
        build_objective(spec.objective),
        seed=spec.seed,
        dataset_size=dataset.size,
    )
    model.prepare(torch.device("cpu"))
    return model


def one_step(backbone: str, recipe: str) -> tuple[Step, StageModel]:
    """One optimiser step of the preset's batch, data and EMA included, as a call without arguments.

    Also returns the model, which counts the FLOPs of the steps.
    """
    prepared = prepare(resolve(RunRequest(backbone, recipe)))
    spec, model = prepared.spec, last_stage(prepared)
    optimizer = make_optimizer(model.trained_parameters(), spec.train, torch.device("cpu"))
    steps = itertools.count()

    def step() -> None:
        training_step(
            model,
            optimizer,
            prepared.dataset,
            spec.train,
            seed=spec.seed,
            step=next(steps),
            device=torch.device("cpu"),
        )

    for _ in range(WARMUP):
        step()
    model.cost = Cost()
    return step, model


def seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


@pytest.mark.parametrize("recipe", names(RECIPES))
@pytest.mark.parametrize("backbone", names(BACKBONES))
def test_training_step(benchmark: BenchmarkFixture, backbone: str, recipe: str) -> None:
    with skip_if_refused():
        (vanilla, vanilla_model), (step, model) = one_step(backbone, "vanilla"), one_step(backbone, recipe)
    pairs = [(seconds(vanilla), seconds(step)) for _ in range(ROUNDS)]
    ratio = median(own / plain for plain, own in pairs)
    predicted = model.cost.total / vanilla_model.cost.total
    benchmark.group = f"training step, {backbone}"
    benchmark.name = f"{recipe}: {ratio:.2f} x vanilla, {predicted:.2f} by FLOPs"
    benchmark.extra_info |= {"ratio_to_vanilla": ratio, "flops_ratio_to_vanilla": predicted}
    benchmark.pedantic(step, rounds=5)
    assert ratio > 0.5


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_against_the_loop_of_the_published_scripts(benchmark: BenchmarkFixture, precision: str) -> None:
    """SiT-S/2, batch 16, stage 2 of Self-Transcendence: the same losses in less time."""
    case = Case("sit-s/2", "self-transcendence", 16, precision)
    found = measure(case, torch.device("cpu"), seconds=20.0, rounds=2, against_plain=True)
    assert found.ratio is not None and found.plain_step_seconds is not None
    benchmark.group = "training step against the plain loop"
    benchmark.name = f"{case.backbone} {case.recipe}, {precision}: {found.ratio:.2f} x as fast"
    benchmark.extra_info |= {"ratio_to_plain": found.ratio, "matmul_peak": found.peak_flops}
    benchmark.extra_info |= {"step": found.step_seconds, "plain_step": found.plain_step_seconds}
    benchmark.pedantic(lambda: None, rounds=1)
    for name, loss in found.losses["plain"].items():
        assert found.losses["engine"][name] == pytest.approx(loss, rel=1e-4 if precision == "fp32" else 0.02)
    assert found.ratio > 1.0
