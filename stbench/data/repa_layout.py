"""REPA's layout (sihyun-yu/REPA preprocessing): read as it is, and converted to a prepared data set.

images/**/*.png are the crops, vae-sd/**/*.npy hold (2C,h,w): the posterior's mean, then its standard
deviation; vae-sd/dataset.json is {"labels": [[file name, label], ...]}. Images and moments belong together by
their places among the sorted file names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, final
from zipfile import BadZipFile

import numpy as np

from stbench.core.errors import UserError
from stbench.data.crop import SUFFIXES, UNREADABLE, decode_image, reason, same_size
from stbench.data.shard_writer import Rows, build, shard_bounds, split_of
from stbench.data.shards import TRAIN, Manifest
from stbench.models.autoencoder import PUBLISHED_SCALE, VAEInfo, find_vae, is_published

FEATURES, IMAGES, LABELS = "vae-sd", "images", "dataset.json"
DEFAULT_VAE = "sd-vae-ft-mse"
"""The one REPA's preprocessing encodes with."""
SAMPLED = 256
"""Moment files whose content is in the fingerprint of a folder that is read as it is."""

Second = Literal["std", "logvar"]
"""What the second half of the channels holds."""


def is_repa(path: Path) -> bool:
    """Whether a folder has REPA's layout."""
    return (path / FEATURES / LABELS).is_file()


@final
class Repa:
    """A folder in REPA's layout, listed. Raises UserError where names, labels and files do not fit."""

    def __init__(self, path: Path, second: Second = "std") -> None:
        self.path, self._features, self._second = path, path / FEATURES, second
        self.ids = _names(self._features, {".npy"})
        if not self.ids:
            raise UserError(
                f"expected .npy files under {self._features}, found none; see REPA's preprocessing"
            )
        self.labels = _labels(self._features / LABELS, self.ids)
        self.shape = self._load(0).shape

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.shape[0] // 2

    @cached_property
    def image_names(self) -> list[str]:
        """Sorted names under images/, one for each moment file."""
        found = _names(self.path / IMAGES, SUFFIXES)
        if len(found) != len(self.ids):
            raise UserError(
                f"expected {len(self.ids)} images under {self.path / IMAGES}, one for each moment file, "
                f"found {len(found)}; evaluation needs them: copy the whole folder"
            )
        return found

    def fingerprint(self) -> str:
        """Hash of names, labels and up to 256 evenly spaced moment files: all of a small set.

        `stbench data import` hashes every file.
        """
        digest = hashlib.sha256(json.dumps([self.ids, self.labels.tolist(), self._second]).encode())
        for index in np.linspace(0, len(self.ids) - 1, min(SAMPLED, len(self.ids))).astype(int):
            digest.update((self._features / self.ids[index]).read_bytes())
        return digest.hexdigest()

    def _load(self, index: int) -> np.ndarray:
        path = self._features / self.ids[index]
        try:
            moments = np.load(path, allow_pickle=False)
            if not isinstance(moments, np.ndarray):
                raise ValueError("an archive, no array")
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise UserError(
                f"{path} is truncated or no .npy file ({reason(error)}); copy it again"
            ) from error
        if moments.ndim != 3 or moments.shape[0] % 2 or moments.shape[1] != moments.shape[2]:
            raise UserError(
                f"{path}: expected moments (2C,h,h), found {moments.shape}; see REPA's preprocessing"
            )
        return moments

    def moments(self, index: int) -> np.ndarray:
        """Mean and standard deviation (2C,h,w) of one image as fp16, as a prepared data set holds them.

        Raises UserError for a file of another shape, one that is damaged, or standard deviations below 0.
        """
        found, path = self._load(index), self._features / self.ids[index]
        if found.shape != self.shape:
            raise UserError(
                f"expected moments of one shape, found {self.shape} in {self.ids[0]} and {found.shape} in "
                f"{self.ids[index]}; keep images of one size in a folder"
            )
        mean, second = np.split(found.astype(np.float32), 2)
        if self._second == "logvar":
            second = np.exp(0.5 * second.clip(-30.0, 20.0))
        elif second.min() < 0:
            raise UserError(
                f"{path}: a standard deviation is negative, so these are log-variances; "
                f"convert the folder with `stbench data import --second logvar`"
            )
        with np.errstate(over="ignore"):  # what overflows is told below
            rounded = np.concatenate([mean, second]).astype(np.float16)
        if not np.isfinite(rounded).all():
            raise UserError(
                f"{path} holds moments that are not finite or beyond fp16; encode the image again"
            )
        return rounded

    def pictures(self, rows: Sequence[int], image_shape: tuple[int, int, int]) -> np.ndarray:
        """Pixels uint8 (m,c,H,W) of some rows. Raises UserError if one cannot be read or has another size."""
        images = [self._picture(row, image_shape[0]) for row in rows]
        same_size(
            [np.empty(image_shape, np.uint8), *images],
            ["a decoded latent", *(self.image_names[row] for row in rows)],
            "the images must be the crops that were encoded",
        )
        return np.stack(images) if images else np.empty((0, *image_shape), np.uint8)

    def _picture(self, row: int, channels: int) -> np.ndarray:
        path = self.path / IMAGES / self.image_names[row]
        try:
            return decode_image(path.read_bytes(), channels, None)
        except UNREADABLE as error:
            raise UserError(f"{path} cannot be read ({reason(error)}); copy it again") from error


def _names(folder: Path, suffixes: set[str] | frozenset[str]) -> list[str]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
    return sorted(file.relative_to(folder).as_posix() for file in files)


def _labels(file: Path, ids: Sequence[str]) -> np.ndarray:
    try:
        known = {str(name): int(label) for name, label in json.loads(file.read_bytes())["labels"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file}: expected {{"labels": [[file name, label], ...]}}, found something else ({error!r}); '
            f"make it again with REPA's preprocessing"
        ) from error
    if missing := [name for name in ids if name not in known]:
        raise UserError(f"{file} has no label for {missing[0]} ({len(missing)} missing); add it to the list")
    labels = np.array([known[name] for name in ids], np.int64)
    if labels.min() < 0:
        raise UserError(f"{file}: labels want to be 0..K-1, found {labels.min()}; number them anew")
    return labels


@dataclass(frozen=True)
class Decoder:
    """What is known of the autoencoder behind moments that were made elsewhere."""

    vae: str
    sha256: str
    scale: float
    shift: float
    image_shape: tuple[int, int, int]


def decoder_of(repa: Repa, vae: str) -> Decoder:
    """The autoencoder by name or folder. A published name need not be there: its scale is known.

    Raises UserError for one whose latents have another number of channels.
    """
    found: VAEInfo | None = None
    try:
        found = find_vae(vae)
    except UserError:
        if not is_published(vae):
            raise
    channels = found.latent_channels if found else 4
    if channels != repa.latent_channels:
        raise UserError(
            f"{repa.path} holds moments of {repa.latent_channels} channels, autoencoder {vae} has "
            f"{channels}; give the one that encoded them"
        )
    if found is None:
        return Decoder(vae, "", PUBLISHED_SCALE, 0.0, (3, 8 * repa.shape[1], 8 * repa.shape[2]))
    size = found.factor * repa.shape[1]
    return Decoder(found.name, found.sha256, found.scale, found.shift, (found.channels, size, size))


def convert(
    repa: Repa,
    target: Path,
    decoder: Decoder,
    shards: int | None,
    references: int,
    advance: Callable[[int], None],
) -> tuple[Manifest, bool]:
    """Write the prepared data set of a REPA folder; returns its manifest and whether anything was to do.

    Unlike `prepare`, it leaves nothing out: a damaged file is an error. Raises UserError as
    `store_writer.build` does.
    """
    split = split_of(repa.ids, references)
    draft = Manifest(
        kind="moments",
        shape=repa.shape,
        views=1,
        flip=False,
        image_shape=decoder.image_shape,
        classes=[str(label) for label in range(int(repa.labels.max()) + 1)],
        vae=decoder.vae,
        vae_sha256=decoder.sha256,
        scale=decoder.scale,
        shift=decoder.shift,
        plan=_plan(repa, decoder, shards, references),
        shards=(),
    )

    def make(start: int, stop: int) -> Rows:
        data = np.empty((stop - start, 1, *repa.shape), np.float16)
        for row in range(start, stop):
            data[row - start, 0] = repa.moments(row)
            advance(1)
        kept = [row for row in range(start, stop) if split[row] != TRAIN]
        images = repa.pictures(kept, decoder.image_shape)
        return Rows(
            repa.ids[start:stop], repa.labels[start:stop].tolist(), split[start:stop].tolist(), data, images
        )

    pixels = int((split != TRAIN).sum()) * int(np.prod(decoder.image_shape))
    needed = len(repa.ids) * int(np.prod(repa.shape)) * 2 + pixels
    return build(target, draft, shard_bounds(len(repa.ids), shards), needed, make, advance)


def _plan(repa: Repa, decoder: Decoder, shards: int | None, references: int) -> dict[str, object]:
    return {
        "source": str(repa.path.resolve()),
        "layout": "repa",
        "images": len(repa.ids),
        "listing": repa.fingerprint(),
        "autoencoder": [decoder.vae, decoder.sha256],
        "shards": shards,
        "references": references,
    }
