"""Seconds of a float32 training step, for every backbone under every recipe, and its ratio to vanilla's.

Both are measured in turn, so that a machine that slows down slows both; the ratio stands in the name.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import PreparedRun, prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, Weights
from stbench.core.recipe import Artifact
from stbench.core.registry import BACKBONES, RECIPES, load_builtins, names
from stbench.train.step import StageModel, make_optimizer, training_step

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


def one_step(backbone: str, recipe: str) -> Step:
    """One optimiser step of the preset's batch, data and EMA included, as a call without arguments."""
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
    return step


def seconds(step: Step) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


@pytest.mark.parametrize("recipe", names(RECIPES))
@pytest.mark.parametrize("backbone", names(BACKBONES))
def test_training_step(benchmark: BenchmarkFixture, backbone: str, recipe: str) -> None:
    vanilla, step = one_step(backbone, "vanilla"), one_step(backbone, recipe)
    pairs = [(seconds(vanilla), seconds(step)) for _ in range(ROUNDS)]
    ratio = median(own / plain for plain, own in pairs)
    benchmark.group = f"training step, {backbone}"
    benchmark.name = f"{recipe}: {ratio:.2f} x vanilla"
    benchmark.extra_info["ratio_to_vanilla"] = ratio
    benchmark.pedantic(step, rounds=5)
    assert ratio > 0.5
