"""What is at a path: a prepared data set, a folder in REPA's layout, or images that are encoded on the fly.

Each is opened to the same thing: rows of moments or pixels, their labels, and who is held out.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np

from stbench.core.device import pick_device
from stbench.core.errors import UserError
from stbench.data.crop import UNREADABLE, decode_image, reason, same_size
from stbench.data.prepare import PIXELS, EncodingTask, encode, make_encoder
from stbench.data.repa_layout import DEFAULT_VAE, Repa, decoder_of, is_repa
from stbench.data.shard_writer import PLAN, REFERENCES, split_of
from stbench.data.shards import MANIFEST, TRAIN, Kind, Manifest, Shards, open_array, read_manifest
from stbench.data.sources import Source, open_source
from stbench.data.spec import DataSpec

ON_THE_FLY = 20_000
"""Images beyond which a folder wants to be prepared first."""


class Reader(ABC):
    """Stored rows: one or two views an image."""

    nbytes: int

    @abstractmethod
    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        """Views (B,) of images (B,): (B,...), fp16 moments or uint8 pixels."""

    @abstractmethod
    def parts(self) -> Iterator[np.ndarray]:
        """All rows in order, a part (n,V,...) at a time."""


@dataclass(frozen=True)
class EncodedImages:
    """Images in a fixed order, in whatever form they are stored."""

    kind: Kind
    shape: tuple[int, ...]
    """Of a stored view: (2C,h,w) or (c,H,W)."""
    image_shape: tuple[int, int, int]
    classes: int
    labels: np.ndarray
    """(N,) int64."""
    split: np.ndarray
    """(N,) TRAIN, HELDOUT or REFERENCE."""
    vae: str
    vae_sha256: str
    scale: float
    shift: float
    flip: bool
    """Whether training mirrors images unless it is told not to."""
    mirrored: bool
    """Whether mirror images can be had."""
    in_memory: bool
    fingerprint: str
    reader: Reader
    pixels: Callable[[np.ndarray], np.ndarray]
    """Pixels uint8 (m,c,H,W) of rows (m,) that are held out or references, or of any if `all_pixels`."""
    all_pixels: bool


def open_data(data: DataSpec) -> EncodedImages:
    """Whatever lies at `data.path`. Raises UserError where it is missing, unfinished or damaged."""
    path = Path(data.path)
    if not path.exists():
        raise UserError(
            f"expected data at {path}, found nothing; if they moved, type `ln -s NEW_PLACE {path}`, "
            f"or give the new place with `stbench run --data`"
        )
    if (path / MANIFEST).is_file():
        return _as_asked(_store(path), data)
    if (path / PLAN).is_file():
        raise UserError(f"{path} is not finished; type the `stbench data` command that began it again")
    if any(path.glob("*-labels.npy")):
        raise UserError(f"{path} holds shards of a prepared set, but no {MANIFEST}; copy that too")
    if is_repa(path):
        if data.vae == PIXELS:
            raise _latents(data)
        return _as_asked(_repa(path, data.vae or DEFAULT_VAE), data)
    return _images(path, data)


def _as_asked(found: EncodedImages, data: DataSpec) -> EncodedImages:
    """Raises UserError where an option is for images that are still to be encoded."""
    if data.size not in (None, found.image_shape[1]):
        raise UserError(
            f"{data.path} holds images of {found.image_shape[1]} pixels, data.size asks for {data.size}; "
            f"leave it out, or prepare another set"
        )
    if data.vae == PIXELS and found.kind != "pixels":
        raise _latents(data)
    return found


def _latents(data: DataSpec) -> UserError:
    return UserError(
        f"{data.path} holds latents; data.vae={PIXELS} is for images: leave it out, "
        f"or prepare another set with --vae none"
    )


@final
class _Mapped(Reader):
    """Shards of a prepared data set."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays, self._shards = arrays, Shards(arrays)
        self.nbytes = self._shards.nbytes

    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        return self._shards.read(rows, view)

    def parts(self) -> Iterator[np.ndarray]:
        yield from self._arrays


def _store(path: Path) -> EncodedImages:
    manifest = read_manifest(path)
    found = {name: _arrays(manifest, path, name) for name in (manifest.kind, "labels", "split", "images")}
    split = np.concatenate(found["split"])
    kept, images = np.flatnonzero(split != TRAIN), Shards([array[:, None] for array in found["images"]])

    def pictures(rows: np.ndarray) -> np.ndarray:
        places = np.searchsorted(kept, rows)
        return images.read(places, np.zeros_like(places))

    return EncodedImages(
        kind=manifest.kind,
        shape=manifest.shape,
        image_shape=manifest.image_shape,
        classes=len(manifest.classes),
        labels=np.concatenate(found["labels"]),
        split=split,
        vae=manifest.vae,
        vae_sha256=manifest.vae_sha256,
        scale=manifest.scale,
        shift=manifest.shift,
        flip=manifest.flip,
        mirrored=manifest.views == 2 or manifest.kind == "pixels",
        in_memory=False,
        fingerprint=manifest.fingerprint(),
        reader=_Mapped(found[manifest.kind]),
        pixels=pictures,
        all_pixels=False,
    )


def _arrays(manifest: Manifest, path: Path, name: str) -> list[np.ndarray]:
    return [open_array(manifest, path, shard, name) for shard in manifest.shards]


@final
class _Files(Reader):
    """The single files of REPA's layout."""

    def __init__(self, repa: Repa) -> None:
        self._repa = repa
        self.nbytes = 2 * len(repa.ids) * int(np.prod(repa.shape))

    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), *self._repa.shape), np.float16)
        for place, row in enumerate(rows):
            out[place] = self._repa.moments(int(row))
        return out

    def parts(self) -> Iterator[np.ndarray]:
        for row in range(len(self._repa.ids)):
            yield self._repa.moments(row)[None, None]


def _repa(path: Path, vae: str) -> EncodedImages:
    repa = Repa(path)
    decoder = decoder_of(repa, vae)
    facts = [repa.fingerprint(), decoder.scale, decoder.shift]
    return EncodedImages(
        kind="moments",
        shape=repa.shape,
        image_shape=decoder.image_shape,
        classes=int(repa.labels.max()) + 1,
        labels=repa.labels,
        split=split_of(repa.ids, REFERENCES),
        vae=decoder.vae,
        vae_sha256=decoder.sha256,
        scale=decoder.scale,
        shift=decoder.shift,
        flip=False,
        mirrored=False,
        in_memory=False,
        fingerprint=hashlib.sha256(json.dumps(facts).encode()).hexdigest(),
        reader=_Files(repa),
        pixels=lambda rows: repa.pictures(rows.tolist(), decoder.image_shape),
        all_pixels=True,
    )


@final
class _Memory(Reader):
    """Rows that were encoded just now."""

    def __init__(self, rows: np.ndarray) -> None:
        self._rows, self.nbytes = rows, rows.nbytes

    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        return self._rows[rows, view]

    def parts(self) -> Iterator[np.ndarray]:
        yield self._rows


def _images(path: Path, data: DataSpec) -> EncodedImages:
    """A small set of images, cropped and encoded now. The fingerprint is that of the cropped pixels, so it is
    the same whatever device encoded them.
    """
    source = open_source(path)
    _check_images(path, data, source)
    size = data.size or _common_size(source)
    flip = bool(data.flip)
    encoder = make_encoder(data.vae, size, flip, "fp32", pick_device("auto"))
    # Every row is kept as pixels: the set is small, and its fingerprint is made of them.
    split = split_of(source.ids, len(source.ids))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = encode(
            EncodingTask(source, split, encoder, 32), range(len(source.ids)), pool, lambda count: None
        )
    for name, why in rows.unreadable:
        print(f"left out: {name}: {why}", file=sys.stderr)
    if len(rows.ids) < 2:
        raise UserError(f"{path}: expected at least 2 readable images, found {len(rows.ids)}")
    facts = [list(rows.ids), list(rows.labels), encoder.vae_sha256, encoder.scale, encoder.shift, flip]
    digest = hashlib.sha256(json.dumps(facts).encode())
    digest.update(rows.images.tobytes())
    return EncodedImages(
        kind=encoder.kind,
        shape=encoder.shape,
        image_shape=encoder.image_shape,
        classes=len(source.classes),
        labels=np.asarray(rows.labels, np.int64),
        split=np.asarray(rows.split, np.uint8),
        vae=encoder.vae,
        vae_sha256=encoder.vae_sha256,
        scale=encoder.scale,
        shift=encoder.shift,
        flip=flip,
        mirrored=flip or encoder.kind == "pixels",
        in_memory=True,
        fingerprint=digest.hexdigest(),
        reader=_Memory(rows.data),
        pixels=lambda chosen: rows.images[chosen],
        all_pixels=True,
    )


def _check_images(path: Path, data: DataSpec, source: Source) -> None:
    if not data.vae:
        raise UserError(
            f"{path} holds images: which autoencoder is to encode them? --set data.vae=sd-vae-ft-ema "
            f"(or a folder), or --set data.vae={PIXELS} to train on pixels"
        )
    if len(source.ids) > ON_THE_FLY:
        raise UserError(
            f"{path} holds {len(source.ids)} images, more than the {ON_THE_FLY} that are encoded on the fly; "
            f"prepare it once: stbench data prepare {path} NEW_FOLDER --vae {data.vae}"
        )


def _common_size(source: Source) -> int:
    """Height = width of all images. Raises UserError if they differ."""
    images, names = [], []
    for number, name in enumerate(source.ids):
        try:
            images.append(decode_image(source.content(number), 3, None))
            names.append(name)
        except UNREADABLE as error:
            print(f"cannot be read: {name}: {reason(error)}", file=sys.stderr)
    remedy = "give the size to crop them to, for example --set data.size=64"
    same_size(images, names, remedy)
    if not images or images[0].shape[1] != images[0].shape[2]:
        raise UserError(f"expected square images; {remedy}")
    return int(images[0].shape[1])
