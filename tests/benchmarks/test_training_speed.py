"""Seconds of a float32 training step, for every backbone under every recipe, and its ratio to vanilla's.

Both are measured in turn, so that a machine that slows down slows both; the ratio stands in the name.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import plan
from stbench.config.resolve import Request, resolve
from stbench.config.spec import RunSpec
from stbench.core.backbone import Backbone, Weights
from stbench.core.recipe import Artifact
from stbench.core.registry import BACKBONES, RECIPES, load_builtins, names
from stbench.core.rng import Rng
from stbench.data.dataset import get_dataset
from stbench.train.step import StageModule, make_batch, make_optimizer, update_ema

load_builtins()
pytestmark = pytest.mark.benchmark
WARMUP, ROUNDS = 3, 15

Step = Callable[[], None]


def last_stage(spec: RunSpec) -> StageModule:
    """The stage that is evaluated, ready to train, with untrained networks for its teachers."""
    dataset = get_dataset(spec.dataset)
    student = build_backbone(spec.backbone, spec.objective, dataset)

    def load(weights: Weights) -> Backbone:
        return build_backbone(spec.backbone, spec.objective, dataset)

    jobs = plan(spec, student.info)
    earlier = {j.name: Artifact(j.name, "", "", {}, j.steps, j.images, 0.0, 0.0, load) for j in jobs[:-1]}
    recipe = jobs[-1].stage.supervision(earlier)
    module = StageModule(student, recipe, build_objective(spec.objective), spec.seed, dataset.size)
    module.prepare(torch.device("cpu"))
    return module


def training_step(backbone: str, recipe: str) -> Step:
    """One optimiser step of the preset's batch, data and EMA included, as a call without arguments."""
    spec = resolve(Request(backbone, recipe))
    train, dataset, module = spec.train, get_dataset(spec.dataset), last_stage(spec)
    optimizer = make_optimizer(module.trained(), train, torch.device("cpu"))
    shape = (dataset.channels, dataset.input_size, dataset.input_size)
    seen = 0

    def step() -> None:
        nonlocal seen
        rng = Rng(spec.seed, seen, train.batch)
        index = dataset.order(spec.seed, seen, train.batch)
        latents = dataset.latents(index, rng.normal("posterior", shape))
        extras = {"images": dataset.images(index)} if module.recipe.images else {}
        labels = dataset.labels(index)
        batch = make_batch(latents, labels, index, rng, train.label_drop, dataset.classes, extras)
        optimizer.zero_grad(set_to_none=True)
        module(batch).total.backward()
        optimizer.step()
        update_ema(module.ema, module.student, train.ema_decay)
        seen += train.batch

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
    vanilla, step = training_step(backbone, "vanilla"), training_step(backbone, recipe)
    pairs = [(seconds(vanilla), seconds(step)) for _ in range(ROUNDS)]
    ratio = median(own / plain for plain, own in pairs)
    benchmark.group = f"training step, {backbone}"
    benchmark.name = f"{recipe}: {ratio:.2f} x vanilla"
    benchmark.extra_info["ratio_to_vanilla"] = ratio
    benchmark.pedantic(step, rounds=5)
    assert ratio > 0.5
