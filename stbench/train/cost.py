"""Expected training FLOPs and disk space of a stage, without training it."""

from __future__ import annotations

from typing import Any

import torch

from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import Loader, StageJob
from stbench.config.spec import RunSpec
from stbench.core.backbone import Backbone
from stbench.core.recipe import Cost, Supervision
from stbench.core.rng import Rng
from stbench.train.step import StageModule, make_batch


def meta_loader(spec: RunSpec, dataset: Any) -> Loader:
    """Stand-in networks without memory, for counting."""
    return lambda weights: build_backbone(spec.backbone, spec.objective, dataset, "meta")


def rehearse(job: StageJob, recipe: Supervision, spec: RunSpec, dataset: Any, draws: int = 4) -> Cost:
    """Expected training FLOPs of a stage: a few steps spread over it, without data or memory, averaged.

    `dataset` gives channels, input_size, classes and size. The realised subset sizes vary around this figure.
    """
    student = build_backbone(spec.backbone, spec.objective, dataset, "meta")
    module = StageModule(student, recipe, build_objective(spec.objective), spec.seed, dataset.size).to("meta")
    recipe.setup(torch.device("meta"))
    shape = (dataset.channels, dataset.input_size, dataset.input_size)
    size = spec.train.batch
    for draw in range(draws):
        rng = Rng(spec.seed, draw * job.steps // draws * size, size)
        x0 = torch.empty(size, *shape, device="meta")
        labels = torch.empty(size, dtype=torch.long, device="meta")
        images = torch.empty(size, *dataset.image_shape, dtype=torch.uint8, device="meta")
        extras = {"images": images} if recipe.images else {}
        index = torch.arange(size)
        module(make_batch(x0, labels, index, rng, spec.train.label_drop, dataset.classes, extras))
    scale = job.steps / draws
    return Cost(module.cost.student * scale, module.cost.heads * scale, module.cost.teachers * scale)


def disk_bytes(job: StageJob, backbone: Backbone, keep: str) -> int:
    """Bytes a stage leaves: EMA weights at its points, final raw and EMA weights, the training state."""
    weights = sum(p.numel() for p in backbone.parameters()) * 4
    kept = len(job.points) if keep == "all" else 1
    return weights * (kept + 1) + 4 * weights
