"""A training step and sampling on the meta device, which fails where devices mix and where a value is read.

A tensor that stays on the host meets one on the meta device, and reading a value of a meta tensor raises an
error. So these tests find, without a GPU, what would fail or wait on one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import PlannedStage, PreparedRun, prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.registry import BACKBONES, OBJECTIVES, RECIPES, SAMPLERS, load_builtins, lookup, names
from stbench.data.dataset import get_dataset
from stbench.diffusion.sample import Guidance, sample
from stbench.train.step import StageModel, make_optimizer, training_step
from tests.refusals import skip_if_refused

load_builtins()

META = torch.device("meta")
BATCH = 16
OVERRIDES = {
    "train.batch": BATCH,
    "train.accumulate": 2,
    "backbone.width": 24,
    "backbone.heads": 2,
    "backbone.depth": 5,
}
PRODUCTS = [(b, r, o) for b in names(BACKBONES) for r in names(RECIPES) for o in names(OBJECTIVES)]


def every(n: int, products: list[tuple[str, str, str]]) -> list[Any]:
    """Each combination as a test parameter. All but every n-th are slow tests."""
    return [pytest.param(*p, marks=[pytest.mark.slow] if k % n else []) for k, p in enumerate(products)]


def planned(backbone: str, recipe: str, objective: str) -> PreparedRun:
    request = RunRequest(backbone, recipe, objective=objective, steps=100, overrides=OVERRIDES)
    return prepare(resolve(request))


def take_steps(prepared: PreparedRun, stage: PlannedStage) -> list[dict[str, Tensor]]:
    """Two optimiser steps, the first ones of the stage and the last ones."""
    spec = prepared.spec
    dataset = prepared.dataset.to(META)
    model = StageModel(
        build_backbone(spec.backbone, spec.objective, dataset, "meta", heads=stage.definition.heads),
        stage.supervision,
        build_objective(spec.objective),
        seed=spec.seed,
        dataset_size=dataset.size,
    )
    model.prepare(META)
    optimizer = make_optimizer(model.trained_parameters(), spec.train, META)
    return [
        training_step(model, optimizer, dataset, spec.train, seed=spec.seed, step=step, device=META)
        for step in (0, stage.steps - 1)
    ]


@pytest.mark.parametrize(("backbone", "recipe", "objective"), every(23, PRODUCTS))
def test_a_step_neither_mixes_devices_nor_reads_a_value(backbone: str, recipe: str, objective: str) -> None:
    with skip_if_refused():
        prepared = planned(backbone, recipe, objective)
    for stage in prepared.stages:
        for losses in take_steps(prepared, stage):
            assert "denoise" in losses
            assert {loss.device for loss in losses.values()} == {META}
            assert all(loss.shape == () for loss in losses.values())


SAMPLED = [
    (backbone, objective, sampler)
    for backbone in names(BACKBONES)
    for objective in names(OBJECTIVES)
    for sampler in lookup(OBJECTIVES, objective)().samplers
    if sampler in names(SAMPLERS)
]


@pytest.mark.parametrize(("backbone", "objective", "sampler"), every(5, SAMPLED))
@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(1.5, 0.2, 0.8, channels=3)], ids=["none", "interval"]
)
def test_sampling_neither_mixes_devices_nor_reads_a_value(
    backbone: str, objective: str, sampler: str, guidance: Guidance
) -> None:
    dataset = get_dataset("digits").to(META)
    spec = resolve(RunRequest(backbone, "vanilla", objective=objective, overrides=OVERRIDES))
    network = build_backbone(spec.backbone, objective, dataset, "meta").eval()
    z = torch.empty(BATCH, 4, 8, 8, device=META)
    latents = sample(
        sampler,
        network,
        build_objective(objective),
        z,
        torch.zeros(BATCH, dtype=torch.long, device=META),
        steps=3,
        guidance=guidance,
        noise=lambda draw: torch.empty(z.shape, dtype=torch.float64, device=META),
    )
    assert latents.device == META and latents.shape == z.shape
    images = dataset.decode(latents)
    assert images.device == META and images.shape == (BATCH, *dataset.image_shape)
