"""`stbench data prepare`: crop and encode images, and write them as a prepared data set."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stbench.core.errors import UserError
from stbench.core.files import absolute_path
from stbench.core.world import ALONE, World
from stbench.data.encode import Advance, EncodingTask, encode, make_row_encoder
from stbench.data.shard_writer import shard_bounds, write_shards
from stbench.data.shards import Manifest
from stbench.data.sources import open_source
from stbench.data.split import REFERENCES, TRAIN, assign_split


@dataclass(frozen=True)
class PrepareOptions:
    """The options of `stbench data prepare`."""

    source: Path
    target: Path
    vae: str
    size: int = 256
    flip: bool = False
    shards: int | None = None
    precision: str = "fp32"
    batch: int = 32
    references: int = REFERENCES
    classes: Path | None = None
    device: torch.device = torch.device("cpu")


def open_task(options: PrepareOptions) -> EncodingTask:
    """List the images and find the autoencoder. Raises UserError for options that are wrong or do not fit."""
    for name, value, least in (
        ("size", options.size, 1),
        ("batch", options.batch, 1),
        ("references", options.references, 0),
    ):
        if value < least:
            raise UserError(f"--{name} must be at least {least}, got {value}; leave it out for the default")
    encoder = make_row_encoder(
        options.vae,
        options.size,
        flip=options.flip,
        precision=options.precision,
        device=options.device,
    )
    source = open_source(options.source, options.classes)
    return EncodingTask(source, assign_split(source.ids, options.references), encoder, options.batch)


def prepare(
    options: PrepareOptions, task: EncodingTask, advance: Advance, world: World = ALONE
) -> tuple[Manifest, bool]:
    """Write, or finish, the data set; return its manifest and whether anything was missing.

    Raises UserError as `write_shards` does.
    """
    source, encoder, count = task.source, task.encoder, len(task.source.ids)
    draft = Manifest(
        kind=encoder.kind,
        shape=encoder.shape,
        views=encoder.views,
        flip=options.flip,
        image_shape=encoder.image_shape,
        classes=list(source.classes),
        vae=encoder.vae,
        vae_sha256=encoder.vae_sha256,
        scale=encoder.scale,
        shift=encoder.shift,
        plan=_plan(options, task),
        shards=(),
        ignored=dict(source.ignored),
    )
    # Disk space: float16 moments or uint8 pixels of all images, and pixels for the evaluation.
    row_bytes = encoder.views * int(np.prod(encoder.shape)) * (2 if encoder.kind == "moments" else 1)
    pixel_bytes = int((task.split != TRAIN).sum()) * int(np.prod(encoder.image_shape))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return write_shards(
            options.target,
            draft,
            bounds=shard_bounds(count, options.shards),
            total_bytes=count * row_bytes + pixel_bytes,
            make=lambda start, stop: encode(task, range(start, stop), pool=pool, advance=advance),
            advance=advance,
            world=world,
        )


def _plan(options: PrepareOptions, task: EncodingTask) -> dict[str, object]:
    """Return what a rerun must have in common with the first command."""
    return {
        "source": str(absolute_path(options.source)),
        "images": len(task.source.ids),
        "listing": task.source.digest(),
        "autoencoder": [task.encoder.vae or "none", task.encoder.vae_sha256],
        "size": options.size,
        "flip": options.flip,
        "shards": options.shards,
        "precision": options.precision,
        "batch": options.batch,
        "references": options.references,
        "device": options.device.type if task.encoder.vae else None,
    }
