"""REPA's folder layout (sihyun-yu/REPA, preprocessing): read as it is, and converted to a prepared data set.

images/**/*.png are the cropped images. vae-sd/**/*.npy are moments (2C,h,w): the mean of the posterior, then
its standard deviation. vae-sd/dataset.json is {"labels": [[file name, label], ...]}. The image of a moment
file is the one with the same position among the sorted file names.
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
from stbench.core.files import absolute_path
from stbench.data.crop import SUFFIXES, UNREADABLE, decode_image, reason, require_same_size
from stbench.data.shard_writer import ShardRows, shard_bounds, write_shards
from stbench.data.shards import Manifest
from stbench.data.split import TRAIN, assign_split
from stbench.models.autoencoder import PUBLISHED_SCALE, VAEInfo, find_vae, is_published

FEATURES, IMAGES, LABELS = "vae-sd", "images", "dataset.json"

DEFAULT_VAE = "sd-vae-ft-mse"
"""The autoencoder of REPA's preprocessing."""

SAMPLED = 256
"""Number of moment files that are hashed for the fingerprint of a folder that is read as it is."""

SecondHalf = Literal["std", "logvar"]
"""What follows the mean in a moment file."""


def is_repa(path: Path) -> bool:
    """Whether a folder has REPA's layout."""
    return (path / FEATURES / LABELS).is_file()


@final
class RepaFolder:
    """The file names and labels of a folder in REPA's layout, and its moments and images by row."""

    def __init__(self, path: Path, second: SecondHalf = "std") -> None:
        """List the folder. Raises UserError if files or labels are missing."""
        self.path, self._features, self._second = path, path / FEATURES, second
        self.ids = _relative_names(self._features, {".npy"})
        if not self.ids:
            raise UserError(
                f"expected .npy files under {self._features}, found none; see REPA's preprocessing"
            )
        self.labels = _read_labels(self._features / LABELS, self.ids)
        self.shape = self._load(0).shape

    @property
    def latent_channels(self) -> int:
        """C."""
        return self.shape[0] // 2

    @cached_property
    def image_names(self) -> list[str]:
        """Sorted names under images/, one per moment file."""
        found = _relative_names(self.path / IMAGES, SUFFIXES)
        if len(found) != len(self.ids):
            raise UserError(
                f"expected {len(self.ids)} images under {self.path / IMAGES}, one per moment file, "
                f"found {len(found)}; the evaluation requires them: copy the whole folder"
            )
        return found

    def fingerprint(self) -> str:
        """Return a hash of names, labels and at most 256 evenly spaced moment files.

        Reading all files of ImageNet would take too long at the start of a run. `stbench data import` hashes
        every file.
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
                raise ValueError("an archive instead of an array")
        except (OSError, ValueError, EOFError, BadZipFile) as error:
            raise UserError(
                f"{path} is truncated or not an .npy file ({reason(error)}); copy it again"
            ) from error
        if moments.ndim != 3 or moments.shape[0] % 2 or moments.shape[1] != moments.shape[2]:
            raise UserError(
                f"{path}: expected moments (2C,h,h), found {moments.shape}; see REPA's preprocessing"
            )
        return moments

    def moments(self, index: int) -> np.ndarray:
        """Return mean and standard deviation (2C,h,w) of an image, float16, as in a prepared data set.

        Raises UserError for a file that is damaged or has another shape, and for negative standard
        deviations.
        """
        found, path = self._load(index), self._features / self.ids[index]
        if found.shape != self.shape:
            raise UserError(
                f"expected moments of one shape, found {self.shape} in {self.ids[0]} and {found.shape} in "
                f"{self.ids[index]}; use one folder per image size"
            )
        # To mean and standard deviation; the clamp is that of diffusers' DiagonalGaussianDistribution.
        mean, second = np.split(found.astype(np.float32), 2)
        if self._second == "logvar":
            second = np.exp(0.5 * second.clip(-30.0, 20.0))
        elif second.min() < 0:
            raise UserError(
                f"{path}: a standard deviation is negative, so these are log-variances; "
                f"convert the folder with `stbench data import --second logvar`"
            )
        with np.errstate(over="ignore"):  # an overflow is reported below
            rounded = np.concatenate([mean, second]).astype(np.float16)
        if not np.isfinite(rounded).all():
            raise UserError(
                f"{path} contains moments that are not finite or overflow float16; encode the image again"
            )
        return rounded

    def pixels(self, rows: Sequence[int], image_shape: tuple[int, int, int]) -> np.ndarray:
        """Return pixels, uint8 (m,c,H,W), of some rows.

        Raises UserError for an image that is unreadable or has another size.
        """
        images = [self._read_image(row, image_shape[0]) for row in rows]
        require_same_size(
            [np.empty(image_shape, np.uint8), *images],
            ["a decoded latent", *(self.image_names[row] for row in rows)],
            "the images must be the crops that were encoded",
        )
        return np.stack(images) if images else np.empty((0, *image_shape), np.uint8)

    def _read_image(self, row: int, channels: int) -> np.ndarray:
        path = self.path / IMAGES / self.image_names[row]
        try:
            return decode_image(path.read_bytes(), channels, None)
        except UNREADABLE as error:
            raise UserError(f"cannot read {path} ({reason(error)}); copy it again") from error


def _relative_names(folder: Path, suffixes: set[str] | frozenset[str]) -> list[str]:
    """Return the sorted paths, relative to the folder, of all files with one of the suffixes."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in suffixes)
    return sorted(file.relative_to(folder).as_posix() for file in files)


def _read_labels(file: Path, ids: Sequence[str]) -> np.ndarray:
    """Return the labels (N,) int64 of the moment files."""
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
        raise UserError(f"{file}: labels must be 0..K-1, found {labels.min()}; renumber them")
    return labels


# --- The autoencoder that encoded the moments ---


@dataclass(frozen=True)
class DecoderInfo:
    """What is known about the autoencoder of moments that another program encoded."""

    vae: str
    sha256: str
    """"" if the files of a published autoencoder are not available."""
    scale: float
    shift: float
    image_shape: tuple[int, int, int]


def find_decoder(folder: RepaFolder, vae: str) -> DecoderInfo:
    """Return the autoencoder by published name or folder.

    The files of a published autoencoder may be missing, because its normalisation is known. Raises UserError
    for an autoencoder whose latents have another number of channels.
    """
    found: VAEInfo | None = None
    try:
        found = find_vae(vae)
    except UserError:
        if not is_published(vae):
            raise
    # Moments do not say which autoencoder encoded them; the number of channels is all there is to check.
    channels = found.latent_channels if found else 4
    if channels != folder.latent_channels:
        raise UserError(
            f"{folder.path} contains moments of {folder.latent_channels} channels, autoencoder {vae} has "
            f"{channels}; give the one that encoded them"
        )
    if found is None:  # the published autoencoders have 3 channels, factor 8 and this scale
        return DecoderInfo(vae, "", PUBLISHED_SCALE, 0.0, (3, 8 * folder.shape[1], 8 * folder.shape[2]))
    size = found.factor * folder.shape[1]
    return DecoderInfo(found.name, found.sha256, found.scale, found.shift, (found.channels, size, size))


# --- Conversion ---


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
