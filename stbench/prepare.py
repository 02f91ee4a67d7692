"""From a source of images to a prepared data set: crop, encode, write."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stbench.encoding import Encoder, make_encoder
from stbench.errors import UserError
from stbench.images import UNREADABLE, decode_image, reason
from stbench.latent_store import TRAIN, Manifest
from stbench.sources import Source, open_source
from stbench.store_writer import REFERENCES, Rows, build, shard_bounds, split_of

Advance = Callable[[int], None]
"""Told how many images are done since the last call."""


@dataclass(frozen=True)
class Job:
    """The arguments of `stbench data prepare`."""

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


@dataclass(frozen=True)
class Listed:
    """A source with its split and encoder: all that is needed to make rows."""

    source: Source
    split: np.ndarray
    encoder: Encoder
    batch: int


def open_job(job: Job) -> Listed:
    """List the images and find the autoencoder. Raises UserError for whatever does not fit."""
    for name, value, least in (
        ("size", job.size, 1),
        ("batch", job.batch, 1),
        ("references", job.references, 0),
    ):
        if value < least:
            raise UserError(f"--{name} wants at least {least}, got {value}; leave it out for the default")
    encoder = make_encoder(job.vae, job.size, job.flip, job.precision, job.device)
    source = open_source(job.source, job.classes)
    return Listed(source, split_of(source.ids, job.references), encoder, job.batch)


def prepare(job: Job, listed: Listed, advance: Advance) -> tuple[Manifest, bool]:
    """Write, or finish, the data set; returns its manifest and whether anything was to do.

    Raises UserError as `store_writer.build` does.
    """
    source, encoder, count = listed.source, listed.encoder, len(listed.source.ids)
    draft = Manifest(
        kind=encoder.kind,
        shape=encoder.shape,
        views=encoder.views,
        flip=job.flip,
        image_shape=encoder.image_shape,
        classes=list(source.classes),
        vae=encoder.vae,
        vae_sha256=encoder.vae_sha256,
        scale=encoder.scale,
        shift=encoder.shift,
        plan=_plan(job, listed),
        shards=(),
        ignored=dict(source.ignored),
    )
    row = encoder.views * int(np.prod(encoder.shape)) * (2 if encoder.kind == "moments" else 1)
    pixels = int((listed.split != TRAIN).sum()) * int(np.prod(encoder.image_shape))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return build(
            job.target,
            draft,
            shard_bounds(count, job.shards),
            count * row + pixels,
            lambda start, stop: encode(listed, range(start, stop), pool, advance),
            advance,
        )


def _plan(job: Job, listed: Listed) -> dict[str, object]:
    """What a command that goes on must share with the one that began."""
    return {
        "source": str(job.source.resolve()),
        "images": len(listed.source.ids),
        "listing": listed.source.digest(),
        "autoencoder": [listed.encoder.vae or "none", listed.encoder.vae_sha256],
        "size": job.size,
        "flip": job.flip,
        "shards": job.shards,
        "precision": job.precision,
        "batch": job.batch,
        "references": job.references,
        "device": job.device.type if listed.encoder.vae else None,
    }


def encode(listed: Listed, rows: Sequence[int], pool: ThreadPoolExecutor, advance: Advance) -> Rows:
    """Read, crop and encode some rows of a source; what cannot be read is named and left out.

    Threads read the next batch while one is encoded. Batches begin at the first of `rows`, so a shard's
    content does not depend on what was made before it.
    """
    kept: list[int] = []
    parts, pixels, unreadable = [], [], []
    for numbers, loaded in _batches(listed, rows, pool):
        good = [(n, image) for n, image in zip(numbers, loaded, strict=True) if not isinstance(image, str)]
        unreadable += [
            (listed.source.ids[n], image)
            for n, image in zip(numbers, loaded, strict=True)
            if isinstance(image, str)
        ]
        if good:
            parts.append(listed.encoder(np.stack([image for _, image in good])))
        kept += [n for n, _ in good]
        pixels += [image for n, image in good if listed.split[n] != TRAIN]
        advance(len(numbers))
    encoder = listed.encoder
    dtype = np.float16 if encoder.kind == "moments" else np.uint8
    return Rows(
        ids=[listed.source.ids[n] for n in kept],
        labels=[listed.source.labels[n] for n in kept],
        split=[int(listed.split[n]) for n in kept],
        data=np.concatenate(parts) if parts else np.empty((0, encoder.views, *encoder.shape), dtype),
        images=np.stack(pixels) if pixels else np.empty((0, *encoder.image_shape), np.uint8),
        unreadable=unreadable,
    )


def _batches(
    listed: Listed, rows: Sequence[int], pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[int], list[np.ndarray | str]]]:
    channels, size = listed.encoder.image_shape[:2]

    def load(number: int) -> np.ndarray | str:
        try:
            return decode_image(listed.source.content(number), channels, size)
        except UNREADABLE as error:
            return reason(error)

    batches = [rows[k : k + listed.batch] for k in range(0, len(rows), listed.batch)]

    def submit(batch: Sequence[int]) -> list[Future[np.ndarray | str]]:
        return [pool.submit(load, number) for number in batch]

    ahead = submit(batches[0])
    for number, batch in enumerate(batches):
        current, ahead = ahead, submit(batches[number + 1]) if number + 1 < len(batches) else []
        yield batch, [future.result() for future in current]
