"""The expected cost of a stage: training FLOPs and disk space, without data or memory for weights."""

from __future__ import annotations

import torch

from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import PlannedStage, PreparedRun
from stbench.core.recipe import Cost
from stbench.core.rng import Rng
from stbench.train.step import StageModel, make_batch


def expected_cost(prepared: PreparedRun, stage: PlannedStage, draws: int = 4) -> Cost:
    """Expected training FLOPs of a stage.

    A few steps, spread over the stage, run on the meta device and are averaged. The number of samples that a
    teacher sees can vary from step to step, so the cost of a real run differs slightly.
    """
    spec, dataset, size = prepared.spec, prepared.dataset, prepared.spec.train.batch
    model = StageModel(
        build_backbone(spec.backbone, spec.objective, dataset, "meta"),
        stage.supervision,
        build_objective(spec.objective),
        seed=spec.seed,
        dataset_size=dataset.size,
    ).to("meta")
    stage.supervision.setup(torch.device("meta"))
    shape = (dataset.channels, dataset.input_size, dataset.input_size)
    for draw in range(draws):
        rng = Rng(spec.seed, draw * stage.steps // draws * size, size)
        x0 = torch.empty(size, *shape, device="meta")
        labels = torch.empty(size, dtype=torch.long, device="meta")
        images = torch.empty(size, *dataset.image_shape, dtype=torch.uint8, device="meta")
        extras = {"images": images} if stage.supervision.images else {}
        index = torch.arange(size)
        model(make_batch(x0, labels, index, rng, spec.train.label_drop, dataset.classes, extras))
    scale = stage.steps / draws
    return Cost(model.cost.student * scale, model.cost.heads * scale, model.cost.teachers * scale)


def disk_bytes(prepared: PreparedRun, stage: PlannedStage, keep: str) -> int:
    """Bytes that a stage stores: EMA weights at its points, final raw and EMA weights, the training state."""
    spec = prepared.spec
    backbone = build_backbone(spec.backbone, spec.objective, prepared.dataset, "meta")
    weights = sum(parameter.numel() for parameter in backbone.parameters()) * 4
    kept = len(stage.points) if keep == "all" else 1
    state = 4 * weights  # student, EMA and two moments
    return weights * (kept + 1) + state
