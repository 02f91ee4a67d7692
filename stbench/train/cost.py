"""The expected cost of a stage: training FLOPs and disk space, without data or memory for weights."""

from __future__ import annotations

import torch

from stbench.config.build import build_backbone, build_objective
from stbench.config.plan import PlannedStage, PreparedRun
from stbench.core.objective import Batch
from stbench.core.recipe import Cost
from stbench.core.rng import Rng
from stbench.train.batches import make_batch
from stbench.train.step import StageModel


def expected_cost(prepared: PreparedRun, stage: PlannedStage, draws: int = 4) -> Cost:
    """Expected training FLOPs of a stage.

    A few steps, spread over the stage, run on the meta device and are averaged. The number of samples that a
    teacher sees can vary from step to step, so the cost of a real run differs slightly.
    """
    spec, size = prepared.spec, prepared.spec.train.batch
    model = meta_model(prepared, stage)
    for draw in range(draws):
        rng = Rng(spec.seed, draw * stage.steps // draws * size, size)
        model(meta_batch(prepared, stage, rng, size))
    scale = stage.steps / draws
    return Cost(model.cost.student * scale, model.cost.heads * scale, model.cost.teachers * scale)


def meta_model(prepared: PreparedRun, stage: PlannedStage) -> StageModel:
    """The networks of a stage, teachers included, on the meta device."""
    spec = prepared.spec
    model = StageModel(
        build_backbone(spec.backbone, spec.objective, prepared.dataset, "meta", heads=stage.definition.heads),
        stage.supervision,
        build_objective(spec.objective, spec.objective_options),
        seed=spec.seed,
        dataset_size=prepared.dataset.size,
        posthoc=spec.train.posthoc_ema and stage.is_last,
    ).to("meta")
    stage.supervision.setup(torch.device("meta"))
    return model


def meta_batch(prepared: PreparedRun, stage: PlannedStage, rng: Rng, size: int) -> Batch:
    """A batch of `size` images without values, on the meta device."""
    dataset = prepared.dataset
    x0 = torch.empty(size, dataset.channels, dataset.input_size, dataset.input_size, device="meta")
    labels = torch.empty(size, dtype=torch.long, device="meta")
    images = torch.empty(size, *dataset.image_shape, dtype=torch.uint8, device="meta")
    extras = {"images": images} if stage.supervision.images else {}
    return make_batch(
        x0, labels, torch.arange(size), rng, prepared.spec.train.label_drop, dataset.classes, extras
    )


def disk_bytes(prepared: PreparedRun, stage: PlannedStage, keep: str) -> int:
    """Bytes that a stage stores: averages at its points, final raw and EMA weights, the training state."""
    spec = prepared.spec
    heads = stage.definition.heads
    backbone = build_backbone(spec.backbone, spec.objective, prepared.dataset, "meta", heads=heads)
    weights = sum(parameter.numel() for parameter in backbone.parameters()) * 4
    kept = len(stage.points) if keep == "all" else 1
    averages = 2 if spec.train.posthoc_ema and stage.is_last else 1
    state = (3 + averages) * weights  # student, averages and two moments
    return weights * (averages * kept + 1) + state
