"""The batches of a step: rows, posterior noise and dropped labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from stbench.config.spec import TrainSpec
from stbench.core.objective import Batch
from stbench.core.phases import phase
from stbench.core.recipe import Supervision
from stbench.core.rng import Rng
from stbench.core.world import ALONE, World
from stbench.data.dataset import Dataset


def draw_batches(
    dataset: Dataset,
    train: TrainSpec,
    supervision: Supervision,
    *,
    seed: int,
    step: int,
    world: World = ALONE,
) -> Iterator[Batch]:
    """Draw this rank's part of the micro-batches of one step: rows, posterior noise and dropped labels.

    All random numbers are those of the global batch, so they do not depend on how it is split.
    """
    seen = step * train.batch
    index = dataset.order(seed, seen, train.batch)
    shape = (dataset.channels, dataset.input_size, dataset.input_size)
    size = train.batch // train.accumulate
    for part in range(train.accumulate):
        is_last = part == train.accumulate - 1  # the last micro-batch takes the remainder
        start, stop = world.part(part * size, train.batch if is_last else (part + 1) * size)
        rng = Rng(seed, seen, train.batch, start, stop)
        rows = index[start:stop]
        with phase("data"):
            latents = dataset.latents(rows, rng.normal("posterior", shape))
            extras = {"images": dataset.images(rows)} if supervision.images else {}
            labels = dataset.labels(rows)
            batch = make_batch(latents, labels, rows, rng, train.label_drop, dataset.classes, extras)
        yield batch


def make_batch(
    x0: Tensor,
    y_true: Tensor,
    index: Tensor,
    rng: Rng,
    label_drop: float,
    null: int,
    extras: Mapping[str, Tensor] = MappingProxyType({}),
) -> Batch:
    """Build a batch, replacing each label by the null label with probability `label_drop`.

    Labels are dropped here and nowhere else, so student and teachers see the same ones.
    """
    dropped = (rng.uniform("label-drop") < label_drop).to(y_true.device, non_blocking=True)
    return Batch(x0, torch.where(dropped, null, y_true), y_true, index, rng, extras)
