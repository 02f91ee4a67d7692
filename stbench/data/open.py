"""Open the data at a path: a prepared data set, a folder in REPA's layout, or images encoded on the fly.

All are opened as `EncodedImages`: rows of moments or pixels, with labels and split.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from stbench.core.errors import UserError
from stbench.data.encoded import EncodedImages, MappedRows, RepaRows
from stbench.data.on_the_fly import encode_folder
from stbench.data.repa_layout import DEFAULT_VAE, RepaFolder, find_decoder, is_repa
from stbench.data.shard_writer import PLAN
from stbench.data.shards import MANIFEST, ShardedRows, open_array, read_manifest
from stbench.data.spec import PIXELS, DataSpec
from stbench.data.split import REFERENCES, TRAIN, assign_split
from stbench.data.verify import require_intact


def open_data(data: DataSpec) -> EncodedImages:
    """Open the data at `data.path`. Raises UserError if they are missing, unfinished or damaged."""
    path = Path(data.path)
    if not path.exists():
        raise UserError(
            f"expected data at {path}, found nothing; if they were moved, type `ln -s NEW_PLACE {path}`, "
            f"or give the new path with `stbench run --data`"
        )
    # A prepared data set, or what is left of one.
    if (path / MANIFEST).is_file():
        return _check_options(_open_prepared(path), data)
    if (path / PLAN).is_file():
        raise UserError(f"{path} is not finished; rerun the `stbench data` command that started it")
    # Without this check, a copy without its manifest would be reported as a folder without images.
    if any(path.glob("*-labels.npy")):
        raise UserError(f"{path} contains shards of a prepared data set but no {MANIFEST}; copy that too")
    if is_repa(path):
        if data.vae == PIXELS:
            raise _latents_error(data)
        return _check_options(_open_repa(path, data.vae or DEFAULT_VAE), data)
    return encode_folder(path, data)


def _check_options(found: EncodedImages, data: DataSpec) -> EncodedImages:
    """Raise a UserError for options that only apply to images that are encoded on the fly."""
    if data.size not in (None, found.image_shape[1]):
        raise UserError(
            f"{data.path} contains images of {found.image_shape[1]} pixels, data.size is {data.size}; "
            f"leave it out, or prepare another data set"
        )
    if data.vae == PIXELS and found.kind != "pixels":
        raise _latents_error(data)
    return found


def _latents_error(data: DataSpec) -> UserError:
    return UserError(
        f"{data.path} contains latents, data.vae={PIXELS} is for images; leave it out, "
        f"or prepare another data set with --vae {PIXELS}"
    )


def _open_prepared(path: Path) -> EncodedImages:
    """Open a prepared data set, memory-mapped."""
    manifest = read_manifest(path)
    require_intact(path, manifest)
    arrays = {
        name: [open_array(manifest, path, shard, name) for shard in manifest.shards]
        for name in (manifest.kind, "labels", "split", "images")
    }
    split = np.concatenate(arrays["split"])
    # Pixels are stored only for held-out and reference rows: row -> position among those.
    with_pixels = np.flatnonzero(split != TRAIN)
    stored = ShardedRows([array[:, None] for array in arrays["images"]])

    def pixels(rows: np.ndarray) -> np.ndarray:
        places = np.searchsorted(with_pixels, rows)
        return stored.read(places, np.zeros_like(places))

    return EncodedImages(
        kind=manifest.kind,
        shape=manifest.shape,
        image_shape=manifest.image_shape,
        classes=len(manifest.classes),
        labels=np.concatenate(arrays["labels"]),
        split=split,
        vae=manifest.vae,
        vae_sha256=manifest.vae_sha256,
        scale=manifest.scale,
        shift=manifest.shift,
        flip=manifest.flip,
        has_mirrored=manifest.views == 2 or manifest.kind == "pixels",
        in_memory=False,
        fingerprint=manifest.fingerprint(),
        rows=MappedRows(arrays[manifest.kind]),
        pixels=pixels,
        has_all_pixels=False,
    )


def _open_repa(path: Path, vae: str) -> EncodedImages:
    """Open a folder in REPA's layout, which stores neither a split nor mirror images."""
    folder = RepaFolder(path)
    folder.require_unchanged()
    decoder = find_decoder(folder, vae)
    facts = [folder.fingerprint(), decoder.scale, decoder.shift]
    return EncodedImages(
        kind="moments",
        shape=folder.shape,
        image_shape=decoder.image_shape,
        classes=int(folder.labels.max()) + 1,
        labels=folder.labels,
        split=assign_split(folder.ids, REFERENCES),
        vae=decoder.vae,
        vae_sha256=decoder.sha256,
        scale=decoder.scale,
        shift=decoder.shift,
        flip=False,
        has_mirrored=False,
        in_memory=False,
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        rows=RepaRows(folder),
        pixels=lambda rows: folder.pixels(rows.tolist(), decoder.image_shape),
        has_all_pixels=True,
    )
