"""`stbench data import`: convert a folder in REPA's layout to a prepared data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from stbench.core.files import absolute_path
from stbench.data.repa_layout import DecoderInfo, RepaFolder
from stbench.data.shard_writer import ShardRows, shard_bounds, write_shards
from stbench.data.shards import Manifest
from stbench.data.split import TRAIN, assign_split


def convert(
    folder: RepaFolder,
    target: Path,
    decoder: DecoderInfo,
    *,
    shards: int | None,
    references: int,
    advance: Callable[[int], None],
) -> tuple[Manifest, bool]:
    """Write a prepared data set; return its manifest and whether anything was missing.

    Unlike `prepare`, this leaves no image out: a damaged file is an error. Raises UserError as `write_shards`
    does.
    """
    split = assign_split(folder.ids, references)
    draft = Manifest(
        kind="moments",
        shape=folder.shape,
        views=1,
        flip=False,
        image_shape=decoder.image_shape,
        classes=[str(label) for label in range(int(folder.labels.max()) + 1)],
        vae=decoder.vae,
        vae_sha256=decoder.sha256,
        scale=decoder.scale,
        shift=decoder.shift,
        plan=_plan(folder, decoder, shards, references),
        shards=(),
    )

    def make(start: int, stop: int) -> ShardRows:
        # Moments of all images; pixels of held-out and reference images.
        data = np.empty((stop - start, 1, *folder.shape), np.float16)
        for row in range(start, stop):
            data[row - start, 0] = folder.moments(row)
            advance(1)
        kept = [row for row in range(start, stop) if split[row] != TRAIN]
        return ShardRows(
            ids=folder.ids[start:stop],
            labels=folder.labels[start:stop].tolist(),
            split=split[start:stop].tolist(),
            data=data,
            images=folder.pixels(kept, decoder.image_shape),
        )

    pixel_bytes = int((split != TRAIN).sum()) * int(np.prod(decoder.image_shape))
    return write_shards(
        target,
        draft,
        bounds=shard_bounds(len(folder.ids), shards),
        total_bytes=len(folder.ids) * int(np.prod(folder.shape)) * 2 + pixel_bytes,
        make=make,
        advance=advance,
    )


def _plan(folder: RepaFolder, decoder: DecoderInfo, shards: int | None, references: int) -> dict[str, object]:
    """Return what a rerun must have in common with the first command."""
    return {
        "source": str(absolute_path(folder.path)),
        "layout": "repa",
        "images": len(folder.ids),
        "listing": folder.fingerprint(),
        "autoencoder": [decoder.vae, decoder.sha256],
        "shards": shards,
        "references": references,
    }
