"""Training steps as the engine would build them, for tests of supervisions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stbench.config.build import build_backbone
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.objective import Objective
from stbench.core.recipe import Cost, Stage, Step, Supervision
from stbench.core.rng import Rng
from stbench.data.dataset import get_dataset
from stbench.train.batches import make_batch
from stbench.train.step import StageModel

BATCH = 8
DATASET_SIZE = 1500


def network(backbone: str = "sit", objective: str = "linear") -> Backbone:
    """A `ti/2` network with every parameter perturbed, so that no block is the identity."""
    spec = resolve(RunRequest(backbone, "vanilla", objective=objective))
    net = build_backbone(spec.backbone, objective, get_dataset("digits"))
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
    return net


def info(name: str, size: str, depth: int, width: int = 96, tokens: int = 16) -> BackboneInfo:
    """Facts of a backbone that is never built."""
    return BackboneInfo(name, size, depth, width, tokens, patch=2, channels=4, input_size=8, classes=10)


def only(stages: Sequence[Stage]) -> Any:
    """The supervision of a recipe's only stage."""
    (stage,) = stages
    return stage.supervision({})


def step_of(
    supervision: Supervision,
    net: Backbone,
    objective: Objective,
    *,
    images_seen: int = 0,
    label_drop: float = 0.5,
) -> Step:
    """One step on the first digits, with the supervision set up."""
    module = StageModel(net, supervision, objective, seed=0, dataset_size=DATASET_SIZE)
    supervision.setup(torch.device("cpu"))
    rng = Rng(0, images_seen, BATCH)
    index = torch.arange(BATCH)
    data = get_dataset("digits")
    extras = {"images": data.images(index)} if supervision.images else {}
    x0, labels = rng.normal("x0", (4, 8, 8)), data.labels(index)
    batch = make_batch(x0, labels, index, rng, label_drop, 10, extras)
    noised = supervision.corrupt(objective, batch)
    inputs = supervision.inputs(batch, noised)
    found = net.run(noised.x_t, noised.t, batch.y, indices=tuple(supervision.taps), **inputs)
    assert found.prediction is not None
    return Step(
        batch=batch,
        noised=noised,
        prediction=found.prediction,
        features=found.features,
        condition=found.condition,
        attention=found.attention,
        kept=found.kept,
        prefix=found.prefix,
        prefix_out=found.prefix_out,
        heads=module.trained_heads(),
        ema=module.ema,
        objective=objective,
        info=net.info,
        images_seen=images_seen,
        dataset_size=DATASET_SIZE,
        global_batch=BATCH,
        cost=Cost(),
    )


def value(supervision: Supervision, step: Step) -> Tensor:
    """The value (B,) of the supervision's only term."""
    (term,) = supervision.terms(step).values()
    assert term.value.shape == (BATCH,)
    return term.value
