"""Read a prepared data set: sharded .npy files described by one JSON manifest. Writes nothing.

A folder without manifest.json is not a data set. Each row of a shard is one image. A "moments" file contains,
for each image (and for its mirror image, if the set was prepared with --flip), the mean of the posterior and,
in the second half of the channels, its standard deviation, unscaled, as float16.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
from pydantic import TypeAdapter, ValidationError

from stbench.core.errors import UserError
from stbench.core.npy import map_npy

FORMAT = "stbench-latents"
SCHEMA = 1
MANIFEST = "manifest.json"

Kind = Literal["moments", "pixels"]
DTYPES = {"moments": "float16", "pixels": "uint8", "labels": "int64", "split": "uint8", "images": "uint8"}
"""Array of a shard -> dtype. "ids" are byte strings, as long as the longest name."""

REMEDY = "copy it again, or prepare the data again; `stbench data verify` lists all damaged files"


@dataclass(frozen=True)
class ShardFile:
    """Size and hash of an .npy file when it was written."""

    bytes: int
    sha256: str = ""
    """"" in a set that was prepared by a version that recorded no hashes."""


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of the data set, in one file `<name>-<array>.npy` per array."""

    name: str
    """Digits: "00000" for the first shard."""
    count: int
    """Number of rows."""
    images: int
    """Number of rows whose pixels are kept."""
    files: Mapping[str, ShardFile]
    unreadable: Sequence[tuple[str, str]] = ()
    """(id, reason) of the images that were left out."""

    def path(self, folder: Path, array: str) -> Path:
        """Return the file of an array."""
        return folder / f"{self.name}-{array}.npy"


@dataclass(frozen=True)
class Manifest:
    """Content and origin of a prepared data set."""

    kind: Kind
    shape: tuple[int, ...]
    """Shape of one stored view: (2C,h,w) for moments, (c,H,W) for pixels."""
    views: int
    """2 if the moments of mirror images are stored too, else 1."""
    flip: bool
    """Whether training mirrors images at random by default."""
    image_shape: tuple[int, int, int]
    classes: Sequence[str]
    """Class names by label."""
    vae: str
    """Name or path of the autoencoder, "" for pixels."""
    vae_sha256: str
    """Hash of the autoencoder, "" if it was not available to `stbench data import`."""
    scale: float
    shift: float
    plan: Mapping[str, Any]
    """The arguments of the command that made it."""
    shards: Sequence[Shard]
    ignored: Mapping[str, int] = field(default_factory=dict)
    """See `ImageSource.ignored`."""

    @property
    def count(self) -> int:
        """Number of images."""
        return sum(shard.count for shard in self.shards)

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(id, reason) of every image that was left out."""
        return [pair for shard in self.shards for pair in shard.unreadable]

    def fingerprint(self) -> str:
        """Return a hash of all that training uses: moments, labels, split, normalisation, autoencoder."""
        shards = [{k: v.sha256 for k, v in s.files.items() if k != "images"} for s in self.shards]
        facts = [self.kind, list(self.shape), self.views, self.vae_sha256, self.scale, self.shift]
        return hashlib.sha256(json.dumps([facts, len(self.classes), shards]).encode()).hexdigest()


# --- The manifest ---


def dump_manifest(manifest: Manifest) -> str:
    """Return the manifest as JSON, with totals for human readers and a hash of everything else."""
    content = {"format": FORMAT, "schema": SCHEMA, "count": manifest.count, **asdict(manifest)}
    content["unreadable"] = manifest.unreadable
    return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    hashed = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared data set.

    Raises UserError if it is missing, was edited, or was written by an incompatible version of stbench.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise TypeError(f"a JSON {type(content).__name__} instead of an object")
        found, expected = _digest(content), content["sha256"]
        version = (content["format"], content["schema"])
    except OSError as error:
        raise UserError(
            f"expected a prepared data set in {folder}, found no {MANIFEST} ({error.strerror}); "
            f"make or finish one with `stbench data prepare`"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{file} is damaged ({error!r}); prepare the data again") from error
    if version != (FORMAT, SCHEMA):
        raise UserError(
            f"{file}: expected {FORMAT} with schema {SCHEMA}, found {version[0]} with schema {version[1]}; "
            f"prepare the data again with this version"
        )
    # The hash replaces a check of every field: content that passes it is what `dump_manifest` wrote.
    if found != expected:
        raise UserError(
            f"{file} was changed after it was written: expected sha256 {str(expected)[:12]}, "
            f"found {found[:12]}; prepare the data again"
        )
    try:
        manifest = TypeAdapter(Manifest).validate_python(content)
        _require_sensible(manifest)
    except ValueError as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{file} is not a manifest of stbench ({where}: {first['msg']}); prepare the data again"
        ) from error
    return manifest


def _require_sensible(manifest: Manifest) -> None:
    """Raise ValueError for names and numbers that `write_shards` never writes."""
    arrays = {manifest.kind, "labels", "split", "ids", "images"}
    for shard in manifest.shards:
        if not re.fullmatch(r"\d{5,}", shard.name) or shard.files.keys() != arrays:
            raise ValueError(f"unexpected shard '{shard.name}' with {', '.join(sorted(shard.files))}")
        if shard.count < 0 or not 0 <= shard.images <= shard.count:
            raise ValueError(f"unexpected number of rows in shard '{shard.name}'")
    if not manifest.shards or manifest.count < 1 or not manifest.classes:
        raise ValueError("no images or no classes")
    if manifest.views not in (1, 2) or len(manifest.shape) != 3 or min(manifest.shape) < 1:
        raise ValueError("unexpected shape of a row")


def parse_shard(row: Mapping[str, Any]) -> Shard:
    """Return the shard that `dataclasses.asdict` and JSON made `row` from.

    Raises ValueError if it is damaged.
    """
    return TypeAdapter(Shard).validate_python(row)


# --- The arrays ---


def expected_shape(manifest: Manifest, shard: Shard, array: str) -> tuple[int, ...]:
    """Return the shape of an array of a shard."""
    if array == manifest.kind:
        return (shard.count, manifest.views, *manifest.shape)
    return (shard.images, *manifest.image_shape) if array == "images" else (shard.count,)


def open_array(manifest: Manifest, folder: Path, shard: Shard, array: str) -> np.ndarray:
    """Open an array of a shard, memory-mapped.

    Raises UserError if the file is missing or truncated, or has another dtype or shape than expected.
    """
    path, shape = shard.path(folder, array), expected_shape(manifest, shard, array)
    require_size(path, shard.files[array].bytes)
    try:
        found = map_npy(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {REMEDY}") from error
    dtype = DTYPES.get(array, found.dtype.name)
    if found.shape != shape or found.dtype.name != dtype or (array == "ids" and found.dtype.kind != "S"):
        raise UserError(f"{path}: expected {dtype} {shape}, found {found.dtype.name} {found.shape}; {REMEDY}")
    return found


def require_size(path: Path, expected: int) -> None:
    """Raise a UserError if a file is missing or has another size in bytes."""
    if not path.is_file():
        raise UserError(f"{path} is missing; {REMEDY}")
    if (size := path.stat().st_size) != expected:
        raise UserError(f"{path} is truncated or changed: expected {expected} bytes, found {size}; {REMEDY}")


@final
class ShardedRows:
    """The same array of all shards, memory-mapped; reads rows of any shards in one call."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        """Read from `arrays` (n,V,...), which have the same dtype and shape except for n."""
        # Plain arrays: indexing the subclass memmap row by row costs twice as much.
        self._arrays = [np.asarray(array).reshape(-1, *array.shape[2:]) for array in arrays]
        self._views = arrays[0].shape[1]
        self._ends = np.cumsum([len(array) for array in arrays])
        self._shape, self._dtype = arrays[0].shape[2:], arrays[0].dtype

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes."""
        return sum(array.nbytes for array in self._arrays)

    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        """Return view `view` (B,), 0 or 1, of rows (B,): a new array (B,...)."""
        # Global row -> shard and row of its flattened (n*V,...) array.
        shards = np.searchsorted(self._ends, rows, side="right")
        starts = self._ends - np.diff(self._ends, prepend=0)
        local = (rows - starts[shards]) * self._views + view
        out = np.empty((len(rows), *self._shape), self._dtype)
        if not len(rows):
            return out
        if (shards == shards[0]).all():
            return np.take(self._arrays[shards[0]], local, axis=0, out=out, mode="clip")
        # With many shards, a batch has one or two rows of each: copying row by row is fastest.
        for number, (shard, row) in enumerate(zip(shards.tolist(), local.tolist(), strict=True)):
            out[number] = self._arrays[shard][row]
        return out
