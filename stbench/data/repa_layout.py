"""REPA's folder layout (sihyun-yu/REPA, preprocessing), read as it is.

images/**/*.png are the cropped images. vae-sd/**/*.npy are moments (2C,h,w): the mean of the posterior, then
its standard deviation. vae-sd/dataset.json is {"labels": [[file name, label], ...]}. The image of a moment
file is the one with the same position among the sorted file names.
"""

from __future__ import annotations

import hashlib
import json
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, final

import numpy as np

from stbench.core.errors import UserError
from stbench.core.files import absolute_path
from stbench.core.npy import read_npy
from stbench.core.safe_load import parse_json, read_text
from stbench.core.text import print_line
from stbench.core.verified import verify_unchanged
from stbench.data.crop import SUFFIXES, UnreadableImage, decode_image, reason, require_same_size
from stbench.data.listing import list_files
from stbench.models.autoencoder import PUBLISHED_SCALE, VAEInfo, find_vae, is_published

FEATURES, IMAGES, LABELS = "vae-sd", "images", "dataset.json"

DEFAULT_VAE = "sd-vae-ft-mse"
"""The autoencoder of REPA's preprocessing."""

VERIFIED = 50_000
"""A folder with more files is not verified: reading ImageNet's takes too long at the start of a run."""

MAX_CLASSES = 1_000_000
"""Labels from this number on are not labels: the class embedding would not fit into memory."""

SAMPLED = 256
"""Number of moment files that are hashed for the fingerprint of a folder that is read as it is."""

SecondHalf = Literal["std", "logvar"]
"""What follows the mean in a moment file."""


def is_repa(path: Path) -> bool:
    """Whether a folder has REPA's layout."""
    return (path / FEATURES / LABELS).is_file()


def require_not_repa(path: Path) -> None:
    """Raise a UserError for a folder in REPA's layout, or a part of one, that is about to be read as images.

    Its subfolders would be taken for classes.
    """
    place = absolute_path(path)
    if place.name in (IMAGES, FEATURES) and is_repa(place.parent):
        raise UserError(
            f"{path} is a part of a folder in REPA's layout; give the whole folder, {place.parent}"
        )
    if is_repa(path):
        raise UserError(f"{path} is a folder in REPA's layout; convert it with `stbench data import`")
    if any((path / FEATURES).rglob("*.npy")):
        raise UserError(
            f"{path} has REPA's layout, but {FEATURES}/{LABELS} with the labels is missing; copy it too"
        )


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
        problem = _unpaired(self.ids, found)
        if len(found) != len(self.ids) or problem:
            raise UserError(
                f"expected {len(self.ids)} images under {self.path / IMAGES}, one per moment file, "
                f"found {len(found)}{problem}; the evaluation requires them: copy the whole folder"
            )
        return found

    def require_unchanged(self) -> None:
        """Compare all files with those of the first use on this machine: nothing records their hashes.

        Raises UserError if one of them has changed. A folder with more than `VERIFIED` files is not read.
        """
        images = list_files(self.path / IMAGES).names if (self.path / IMAGES).is_dir() else []
        names = [f"{FEATURES}/{name}" for name in (LABELS, *self.ids)]
        names += [f"{IMAGES}/{name}" for name in images]
        if len(names) > VERIFIED:
            print_line(
                f"{self.path} contains {len(names)} files without recorded hashes, too many to verify; "
                f"`stbench data import` records a hash of every file",
                error=True,
            )
            return
        verify_unchanged(self.path, names, "copy it again")

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
            moments = read_npy(path)
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path} is truncated or not an .npy file ({reason(error)}); copy it again"
            ) from error
        shape = moments.shape
        if moments.dtype.kind != "f" or len(shape) != 3 or shape[0] % 2 or shape[1] != shape[2] or 0 in shape:
            raise UserError(
                f"{path}: expected moments (2C,h,h), found {moments.dtype} {shape}; see REPA's preprocessing"
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
        except UnreadableImage as error:
            raise UserError(f"cannot read {path} ({reason(error)}); copy it again") from error


def _relative_names(folder: Path, suffixes: set[str] | frozenset[str]) -> list[str]:
    """Return the sorted paths, relative to the folder, of all files with one of the suffixes."""
    if not folder.is_dir():
        return []
    return [name for name in list_files(folder).names if PurePosixPath(name).suffix.lower() in suffixes]


def _unpaired(moments: Sequence[str], images: Sequence[str]) -> str:
    """Name the first moment file without image and image without moment file, by folder and number.

    Returns "" if there is none, or if the names are not numbered as REPA's are.
    """

    def numbered(names: Sequence[str]) -> dict[tuple[str, int], str]:
        found = {}
        for name in names:
            if match := re.search(r"(\d{1,18})$", PurePosixPath(name).stem):
                found[name.rpartition("/")[0], int(match[1])] = name
        return found

    left, right = numbered(moments), numbered(images)
    if (len(left), len(right)) != (len(moments), len(images)):
        return ""
    lonely = [f"no image for {left[key]}" for key in sorted(left.keys() - right.keys())[:1]]
    lonely += [f"no moments for {right[key]}" for key in sorted(right.keys() - left.keys())[:1]]
    return "".join(f"; {text}" for text in lonely)


def _read_labels(file: Path, ids: Sequence[str]) -> np.ndarray:
    """Return the labels (N,) int64 of the moment files."""
    try:
        pairs = parse_json(read_text(file))["labels"]
        known = {name: operator.index(label) for name, label in pairs if isinstance(name, str)}
        if len(known) < len(pairs):
            raise ValueError(f"{len(pairs)} rows with {len(known)} names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file}: expected {{"labels": [[file name, label], ...]}}, found something else ({error!r}); '
            f"make it again with REPA's preprocessing"
        ) from error
    if absent := sorted(known.keys() - set(ids)):
        raise UserError(
            f"{file.parent / absent[0]} is missing ({len(absent)} of {len(known)} moment files in {LABELS}); "
            f"copy the whole folder"
        )
    if missing := [name for name in ids if name not in known]:
        raise UserError(f"{file} has no label for {missing[0]} ({len(missing)} missing); add it to the list")
    numbers = [known[name] for name in ids]
    if min(numbers) < 0 or max(numbers) >= MAX_CLASSES:
        wrong = min(numbers) if min(numbers) < 0 else max(numbers)
        raise UserError(f"{file}: labels must be 0..K-1, found {wrong}; renumber them")
    return np.array(numbers, np.int64)


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
