"""References that samples are measured against: ADM's npz files, our statistics files, or images.

A statistics file uses ADM's names for ADM's arrays, stores the features for precision, recall and KID as
`features`, and describes the images and networks it was made from in a JSON string, `about`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from pydantic import TypeAdapter
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.files import atomic_file, hash_file
from stbench.evaluate.feature_networks import FeatureNetwork
from stbench.evaluate.image_sets import (
    NPZ_ERRORS,
    ImageSet,
    NpzImages,
    damaged_npz,
    open_images,
    open_npz,
    open_npz_array,
    read_npz_text,
)
from stbench.evaluate.progress import Report, ignore
from stbench.evaluate.statistics import REFERENCE_FEATURES, ImageStatistics, Moments, measure_images

ARRAY_NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dino": ("mu_dino", "sigma_dino")}
"""Feature space -> names of its mean and covariance in a file; the first two pairs are ADM's."""
STATISTICS_SCHEMA = 1
"""Version of the statistics files."""


@dataclass(frozen=True)
class About:
    """The description in a statistics file."""

    digest: str
    """Hash of the images."""
    count: int
    size: tuple[int, int]
    """(H,W)."""
    networks: Mapping[str, str]
    """Feature space -> name and hash of the weights."""
    images: str = ""
    """Path of the images."""
    schema: int = STATISTICS_SCHEMA
    arrays: Sequence[str] | None = None
    """Names of the other arrays; None in files of earlier versions."""


def array_names(space: str) -> tuple[str, str]:
    """Return the names of the mean and the covariance of a feature space in a file."""
    suffix = space.replace("/", ".").replace(" ", "_")  # names of files in an archive
    return ARRAY_NAMES.get(space, (f"mu_{suffix}", f"sigma_{suffix}"))


Measure = Callable[[ImageSet], ImageStatistics]
"""Measures a set of images with the caller's networks, batch size and device."""


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images, and pool features of some of them."""

    name: str
    digest: str
    """Hash of the file, or of the images."""
    count: int | None
    """Number of images behind the statistics; None if the file does not say."""
    size: tuple[int, int] | None
    """(H,W) of the images; None if the file does not say."""
    moments: Mapping[str, Moments]
    """By feature space."""
    features: Tensor | None
    """Pool features (M,2048); None if the file has none."""
    other_counts: Mapping[str, int]
    """Feature space -> number of images behind its moments, where that differs from `count`."""


def load_reference(
    path: Path,
    networks: Sequence[FeatureNetwork],
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
    report: Report = ignore,
) -> Reference:
    """Read the reference at `path`, or measure it if `path` contains images.

    Raises UserError for a file that is missing, damaged or incomplete, that has arrays of other shapes, or
    that was made with other weights.
    """

    def measure(images: ImageSet) -> ImageStatistics:
        return measure_images(
            images, networks, keep=REFERENCE_FEATURES, batch=batch, device=device, report=report
        )

    # The arrays of an npz decide what it is; folders and data sets contain images.
    _require_exists(path)
    arrays = _array_names(path) if path.is_file() else set()
    if "about" in arrays:
        return _read_statistics(path, networks)
    if arrays & {"mu", "sigma"}:
        return _read_adm(path, arrays, networks, measure)
    return reference_from(measure(open_images(path)))


def reference_size(path: Path) -> tuple[int, int] | None:
    """Return (H,W) of the images behind a reference without measuring them; None if the file does not say."""
    _require_exists(path)
    arrays = _array_names(path) if path.is_file() else set()
    if "about" in arrays:
        return _read_about(path).size
    return None if arrays and "arr_0" not in arrays else open_images(path).size


def reference_from(measured: ImageStatistics) -> Reference:
    """Turn a measured set of images into a reference."""
    return Reference(
        name=measured.name,
        digest=measured.digest,
        count=measured.count,
        size=measured.size,
        moments=measured.moments,
        features=_features_or_none(measured),
        other_counts={},
    )


def is_statistics(path: Path) -> bool:
    """Whether an npz is a statistics file of stbench. Raises UserError if it is not an npz."""
    return "about" in _array_names(path)


def write_statistics(
    images: ImageSet,
    networks: Sequence[FeatureNetwork],
    output: Path,
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
    report: Report = ignore,
) -> ImageStatistics:
    """Measure images and write their statistics file atomically."""
    measured = measure_images(
        images, networks, keep=REFERENCE_FEATURES, batch=batch, device=device, report=report
    )
    features = _features_or_none(measured)
    arrays = {} if features is None else {"features": features.numpy()}
    for space, moments in measured.moments.items():
        arrays |= {name: array.numpy() for name, array in zip(array_names(space), moments, strict=True)}
    about = About(
        digest=measured.digest,
        count=measured.count,
        size=measured.size,
        networks={space: network.label for network in networks for space in network.spaces},
        images=measured.name,
        arrays=list(arrays),
    )
    # numpy's own npz: `numpy.load` and ADM's evaluator read it.
    with atomic_file(output) as file:
        np.savez(file, **arrays, about=np.array(json.dumps(asdict(about))))  # type: ignore[arg-type]
    return measured


def _features_or_none(measured: ImageStatistics) -> Tensor | None:
    """Return the kept pool features; None if Inception was not among the networks."""
    return measured.features if len(measured.features) else None


def _read_statistics(path: Path, networks: Sequence[FeatureNetwork]) -> Reference:
    """Read a file written by `write_statistics`. Raises UserError if it was made with other weights."""
    about = _read_about(path)
    moments = {}
    for network in networks:
        for space in network.spaces:
            made_with = about.networks.get(space)
            if made_with != network.label:
                found = f"with {made_with}" if made_with else f"without '{space}' features"
                raise UserError(
                    f"{path} was made {found}, not with {network.label}; "
                    "make it again by `stbench data statistics` with the weights you give now"
                )
            moments[space] = _read_moments(path, space, network)
    features = None
    if "features" in _array_names(path):
        features = _read_array(path, "features", (None, len(moments["pool"][0])))
    return Reference(
        name=str(path),
        digest=about.digest,
        count=about.count,
        size=about.size,
        moments=moments,
        features=features,
        other_counts={},
    )


def _require_exists(path: Path) -> None:
    if not path.exists():
        raise UserError(
            f"reference {path} not found; expected an ADM npz, a file of `stbench data statistics`, "
            "a prepared data set, or a folder of images"
        )


def _read_about(path: Path) -> About:
    text = read_npz_text(path, "about")
    try:
        about = TypeAdapter(About).validate_json(text)
    except ValueError as error:
        raise damaged_npz(path, f"its description is incomplete: {error}") from error
    if about.arrays is not None and {*about.arrays, "about"} != _array_names(path):
        raise damaged_npz(path, f"expected the arrays {', '.join(about.arrays)} and about")
    return about


def _read_adm(
    path: Path, arrays: set[str], networks: Sequence[FeatureNetwork], measure: Measure
) -> Reference:
    """Read an ADM npz: moments of all training images, and in arr_0 some of the images themselves.

    Feature spaces that the file lacks are measured on arr_0.
    """
    moments: dict[str, Moments] = {}
    other_counts: dict[str, int] = {}
    features, size = None, None
    # Moments that the file contains, checked against the dimensions of the networks.
    for network in networks:
        for space in network.spaces:
            if arrays & set(array_names(space)):
                moments[space] = _read_moments(path, space, network)

    # The images in arr_0 give the features, and the moments of the other spaces.
    if "arr_0" in arrays:
        measured = measure(NpzImages(path))
        size, features = measured.size, _features_or_none(measured)
        for space in measured.moments.keys() - moments.keys():
            moments[space], other_counts[space] = measured.moments[space], measured.count
    return Reference(
        name=str(path),
        digest=hash_file(path),
        count=None,
        size=size,
        moments=moments,
        features=features,
        other_counts=other_counts,
    )


def _read_moments(path: Path, space: str, network: FeatureNetwork) -> Moments:
    dimension = network.spaces[space]
    mean_name, covariance_name = array_names(space)
    mean = _read_array(path, mean_name, (dimension,))
    return mean.double(), _read_array(path, covariance_name, (len(mean), len(mean))).double()


def _array_names(path: Path) -> set[str]:
    with open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _read_array(path: Path, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """Read a float array of an npz. Raises UserError if its shape is not `shape`; None matches any length."""
    # Check type and shape from the header, before the data is read.
    with open_npz_array(path, name) as (file, found, dtype):
        fits = len(found) == len(shape) and all(w in (None, f) for f, w in zip(found, shape, strict=True))
        if not fits or dtype not in (np.float32, np.float64):
            expected = "x".join("N" if length is None else str(length) for length in shape)
            raise UserError(
                f"{path}: expected {name} float {expected}, found {dtype} {'x'.join(map(str, found))}; "
                "use a reference made with the Inception of 2015-12-05"
            )
        try:
            content = file.read()
        except NPZ_ERRORS as error:
            raise damaged_npz(path, error) from error

    # A bytearray, because torch warns about read-only memory.
    if len(content) != int(np.prod(found)) * dtype.itemsize:
        raise damaged_npz(path, f"{name} ends early")
    array = torch.from_numpy(np.frombuffer(bytearray(content), dtype).reshape(found))
    if not bool(array.isfinite().all()):
        raise damaged_npz(path, f"{name} contains values that are not finite")
    return array
