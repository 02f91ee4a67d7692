"""What samples are measured against: ADM's reference npz, our own statistics file, or images.

A statistics file has ADM's names for ADM's arrays, the rows for precision, recall and KID (`features`), and a
JSON (`about`) of the images and networks that it was made from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.files import atomic_file, hash_file
from stbench.evaluate.feature_networks import Network
from stbench.evaluate.image_sets import (
    DAMAGED,
    ImageSet,
    NpzImages,
    damaged,
    open_images,
    open_member,
    open_npz,
)
from stbench.evaluate.statistics import ROWS, Fit, Survey, survey

NAMES = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s"), "dino": ("mu_dino", "sigma_dino")}
"""Feature space -> names of its mean and covariance in a file; the first two are ADM's."""


@dataclass(frozen=True)
class Reference:
    """Statistics of the real images, and rows of some of them."""

    name: str
    digest: str
    """Hash of the file, or of the images."""
    count: int | None
    """Images behind the statistics; None if the file does not say."""
    size: tuple[int, int] | None
    """(H,W) of the images; None if the file does not say."""
    fits: Mapping[str, Fit]
    rows: Tensor | None
    """Pool features (M,2048)."""
    fitted_on: Mapping[str, int]
    """Feature space -> images behind its statistics, where that is not `count`."""


def load_reference(
    path: Path,
    networks: Sequence[Network],
    *,
    batch: int = 64,
    device: torch.device | str = "cpu",
    report: Callable[[int], None] = lambda done: None,
) -> Reference:
    """Read or measure the reference at `path`. Raises UserError for a file that is damaged, incomplete, of
    other shapes, or made with other weights.
    """
    held = _arrays(path) if path.is_file() else set()
    if "about" in held:
        return _own(path, networks)
    measure = {"batch": batch, "device": device, "report": report}
    if held & {"mu", "sigma"}:
        return _adm(path, held, networks, measure)
    return of_survey(survey(open_images(path), networks, keep=ROWS, **measure))  # type: ignore[arg-type]


def size_of(path: Path) -> tuple[int, int] | None:
    """(H,W) of the images behind a reference, without measuring any; None if the file does not say."""
    held = _arrays(path) if path.is_file() else set()
    if "about" in held:
        height, width = _about(path)["size"]
        return int(height), int(width)
    return None if held and "arr_0" not in held else open_images(path).size


def of_survey(found: Survey) -> Reference:
    """A measured set of images as a reference."""
    rows = found.rows if len(found.rows) else None
    return Reference(found.name, found.digest, found.count, found.size, found.fits, rows, {})


def write_statistics(images: ImageSet, networks: Sequence[Network], output: Path, **measure: Any) -> Survey:
    """Measure images and write their statistics, whole or not at all."""
    found = survey(images, networks, keep=ROWS, **measure)
    arrays = {"features": found.rows.numpy()} if len(found.rows) else {}
    for space, fit in found.fits.items():
        arrays |= {name: array.numpy() for name, array in zip(NAMES[space], fit, strict=True)}
    about = {
        "schema": 1,
        "images": found.name,
        "digest": found.digest,
        "count": found.count,
        "size": list(found.size),
        "networks": {space: network.label for network in networks for space in network.spaces},
    }
    with atomic_file(output) as file:
        np.savez(file, **arrays, about=np.array(json.dumps(about)))  # type: ignore[arg-type]
    return found


def _own(path: Path, networks: Sequence[Network]) -> Reference:
    about = _about(path)
    fits = {}
    for network in networks:
        for space in network.spaces:
            made_with = about["networks"].get(space)
            if made_with != network.label:
                made = f"with {made_with}" if made_with else f"without '{space}' features"
                raise UserError(
                    f"{path} was made {made}, not with {network.label}; "
                    "make it again by `stbench data statistics` with the weights you give now"
                )
            fits[space] = _fit(path, space, network)
    rows = _array(path, "features", (None, len(fits["pool"][0]))) if "features" in _arrays(path) else None
    size = tuple(about["size"])
    return Reference(str(path), about["digest"], about["count"], size, fits, rows, {})  # type: ignore[arg-type]


def _about(path: Path) -> dict[str, Any]:
    with open_member(path, "about") as (file, _, dtype):
        text = str(np.frombuffer(file.read(), dtype)[0])
    try:
        about = json.loads(text)
        held = about.keys() >= {"digest", "count", "size", "networks"}
    except (AttributeError, ValueError) as error:
        raise damaged(path, error) from error
    if not held:
        raise damaged(path, "its description is incomplete")
    return about


def _adm(path: Path, held: set[str], networks: Sequence[Network], measure: Mapping[str, Any]) -> Reference:
    """Inception's statistics are those in the file (all training images); what it lacks comes from arr_0."""
    fits: dict[str, Fit] = {}
    fitted_on: dict[str, int] = {}
    rows, size = None, None
    for network in networks:
        fits |= {space: _fit(path, space, network) for space in network.spaces if held & set(NAMES[space])}
    if "arr_0" in held:
        found = survey(NpzImages(path), networks, keep=ROWS, **measure)
        size, rows = found.size, found.rows if len(found.rows) else None
        for space in found.fits.keys() - fits.keys():
            fits[space], fitted_on[space] = found.fits[space], found.count
    return Reference(str(path), hash_file(path), None, size, fits, rows, fitted_on)


def _fit(path: Path, space: str, network: Network) -> Fit:
    dimension = network.spaces[space]
    mean_name, covariance_name = NAMES[space]
    mean = _array(path, mean_name, (dimension,))
    return mean.double(), _array(path, covariance_name, (len(mean), len(mean))).double()


def _arrays(path: Path) -> set[str]:
    with open_npz(path) as archive:
        return {name.removesuffix(".npy") for name in archive.namelist()}


def _array(path: Path, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """A float array of an npz whose shape fits; None in `shape` is any length."""
    with open_member(path, name) as (file, found, dtype):
        fits = len(found) == len(shape) and all(w in (None, f) for f, w in zip(found, shape, strict=True))
        if not fits or dtype not in (np.float32, np.float64):
            wanted = "x".join("N" if length is None else str(length) for length in shape)
            raise UserError(
                f"{path}: expected {name} float {wanted}, found {dtype} {'x'.join(map(str, found))}; "
                "is it a reference for Inception of 2015-12-05?"
            )
        try:
            content = file.read()
        except DAMAGED as error:
            raise damaged(path, error) from error
    if len(content) != int(np.prod(found)) * dtype.itemsize:
        raise damaged(path, f"{name} ends early")
    array = torch.from_numpy(np.frombuffer(bytearray(content), dtype).reshape(found))
    if not bool(array.isfinite().all()):
        raise damaged(path, f"{name} holds values that are not finite")
    return array
