"""The prepared data set on disk: sharded .npy files behind one JSON manifest. Reads, checks, writes nothing.

A folder without manifest.json is no data set. Row r of a shard is one image; a "moments" file holds, for each
image (and its mirror, where the set was prepared with flip), the posterior's mean and, in the second half of
the channels, its standard deviation, both unscaled, as fp16.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, final
from zipfile import BadZipFile

import numpy as np

from stbench.core.errors import UserError
from stbench.core.files import hash_file

FORMAT = "stbench-latents"
SCHEMA = 1
MANIFEST = "manifest.json"

Kind = Literal["moments", "pixels"]
DTYPES = {"moments": "float16", "pixels": "uint8", "labels": "int64", "split": "uint8", "images": "uint8"}
"""Array of a shard -> its type; "ids" are the bytes of names, UTF-8 as a rule, as long as needed."""

TRAIN, HELDOUT, REFERENCE = 0, 1, 2
"""`split`: trained on; never trained on, pixels kept; trained on, pixels kept as evaluation reference."""


@dataclass(frozen=True)
class ShardFile:
    """One .npy file as it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Shard:
    """A run of rows: file `<name>-<array>.npy` for each array."""

    name: str
    count: int
    images: int
    """Rows whose pixels are kept."""
    files: Mapping[str, ShardFile]
    unreadable: Sequence[tuple[str, str]] = ()
    """(id, reason) of the images that were left out."""

    def path(self, folder: Path, array: str) -> Path:
        """Where one of its arrays lies."""
        return folder / f"{self.name}-{array}.npy"


@dataclass(frozen=True)
class Manifest:
    """What a prepared data set holds and what made it."""

    kind: Kind
    shape: tuple[int, ...]
    """Of one stored view: (2C,h,w) for moments, (c,H,W) for pixels."""
    views: int
    """2 if the mirrored image has moments of its own."""
    flip: bool
    """Whether training mirrors images unless it is told not to."""
    image_shape: tuple[int, int, int]
    classes: Sequence[str]
    vae: str
    """Name or path of the autoencoder, "" for pixels."""
    vae_sha256: str
    """"" where the autoencoder was not at hand (import)."""
    scale: float
    shift: float
    plan: Mapping[str, Any]
    """The arguments that made it."""
    shards: Sequence[Shard]
    ignored: Mapping[str, int] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Images."""
        return sum(shard.count for shard in self.shards)

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(id, reason) of every image that was left out."""
        return [pair for shard in self.shards for pair in shard.unreadable]

    def fingerprint(self) -> str:
        """Hash of all that training sees: moments, labels, split, normalisation, autoencoder."""
        shards = [{k: v.sha256 for k, v in s.files.items() if k != "images"} for s in self.shards]
        facts = [self.kind, list(self.shape), self.views, self.vae_sha256, self.scale, self.shift]
        return hashlib.sha256(json.dumps([facts, len(self.classes), shards]).encode()).hexdigest()


def dump_manifest(manifest: Manifest) -> str:
    """The manifest as JSON, with totals for the reader and a hash over everything else."""
    content = {"format": FORMAT, "schema": SCHEMA, "count": manifest.count, **asdict(manifest)}
    content["unreadable"] = manifest.unreadable
    return json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    kept = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared data set.

    Raises UserError where there is none, it was changed by hand, or another version of stbench wrote it.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        if not isinstance(content, dict):
            raise TypeError(f"a JSON {type(content).__name__}, no object")
        found, expected = _digest(content), content["sha256"]
        if (content["format"], content["schema"]) != (FORMAT, SCHEMA):
            raise UserError(
                f"{file}: expected {FORMAT} of schema {SCHEMA}, found {content['format']} "
                f"{content['schema']}; prepare it again with this version"
            )
    except OSError as error:
        raise UserError(
            f"expected a prepared data set in {folder}, found no {MANIFEST} ({error.strerror}); "
            f"make one, or finish it, with `stbench data prepare`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error!r}); prepare the data again") from error
    if found != expected:
        raise UserError(
            f"{file} was changed after it was written: expected sha256 {str(expected)[:12]}, "
            f"found {found[:12]}; prepare the data again"
        )
    return _manifest(content)


def _manifest(content: dict[str, Any]) -> Manifest:
    fields = {name: content[name] for name in Manifest.__dataclass_fields__}
    shards = tuple(shard_of(row) for row in content["shards"])
    return Manifest(
        **{**fields, "shape": tuple(content["shape"]), "image_shape": tuple(content["image_shape"])}
        | {"shards": shards}
    )


def shard_of(row: Mapping[str, Any]) -> Shard:
    """A shard's record from JSON."""
    files = {name: ShardFile(**values) for name, values in row["files"].items()}
    return Shard(row["name"], row["count"], row["images"], files, tuple(map(tuple, row["unreadable"])))  # type: ignore[arg-type]


def expected_shape(manifest: Manifest, shard: Shard, array: str) -> tuple[int, ...]:
    """Shape of an array of a shard."""
    if array == manifest.kind:
        return (shard.count, manifest.views, *manifest.shape)
    return (shard.images, *manifest.image_shape) if array == "images" else (shard.count,)


def open_array(manifest: Manifest, folder: Path, shard: Shard, array: str) -> np.ndarray:
    """An array of a shard, memory-mapped.

    Raises UserError if the file is missing, has lost bytes, or holds another type or shape.
    """
    path, wanted = shard.path(folder, array), expected_shape(manifest, shard, array)
    remedy = "copy it again, or prepare the data anew; `stbench data verify` tells which files are whole"
    if not path.is_file():
        raise UserError(f"{path} is missing; {remedy}")
    size = path.stat().st_size
    if size != shard.files[array].bytes:
        raise UserError(
            f"{path} is truncated or changed: expected {shard.files[array].bytes} bytes, found {size}; "
            f"{remedy}"
        )
    try:
        # Nothing can be mapped in a file without rows.
        found = np.load(path, mmap_mode="r" if wanted[0] else None, allow_pickle=False)
        if not isinstance(found, np.ndarray):
            raise ValueError("an archive, no array")
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); {remedy}") from error
    dtype = DTYPES.get(array, found.dtype.name)
    if found.shape != wanted or found.dtype.name != dtype or (array == "ids" and found.dtype.kind != "S"):
        raise UserError(
            f"{path}: expected {dtype} {wanted}, found {found.dtype.name} {found.shape}; {remedy}"
        )
    return found


def verify(folder: Path) -> tuple[Manifest, list[str]]:
    """Read every byte of a prepared data set; returns its manifest and a line for each file that is wrong.

    Checks sizes, types, shapes, checksums, labels, and that the counts agree. Raises UserError where there is
    no manifest to check against.
    """
    manifest, problems = read_manifest(folder), []
    for shard in manifest.shards:
        for array, recorded in shard.files.items():
            try:
                values = open_array(manifest, folder, shard, array)
            except UserError as error:
                problems.append(str(error).partition(";")[0])
                continue
            path = shard.path(folder, array)
            found = hash_file(path)
            if found != recorded.sha256:
                problems.append(f"{path}: expected sha256 {recorded.sha256[:12]}, found {found[:12]}")
            elif array == "labels" and shard.count and not _within(values, len(manifest.classes)):
                problems.append(f"{path}: labels outside 0..{len(manifest.classes) - 1}")
            elif array == "split" and int((values > 0).sum()) != shard.images:
                problems.append(f"{path}: expected {shard.images} rows with pixels, found another number")
    return manifest, problems


def _within(labels: np.ndarray, classes: int) -> bool:
    return int(labels.min()) >= 0 and int(labels.max()) < classes


@final
class Shards:
    """The big arrays of a prepared data set, memory-mapped: rows of any number of shards in one call."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        """`arrays`: (n,V,...) each, of equal type and shape but for n."""
        views = arrays[0].shape[1]
        # As plain arrays: indexing the subclass memmap row by row costs twice as much.
        self._views, self._arrays = views, [np.asarray(a).reshape(-1, *a.shape[2:]) for a in arrays]
        self._ends = np.cumsum([len(array) for array in arrays])
        self._shape, self._dtype = arrays[0].shape[2:], arrays[0].dtype

    @property
    def nbytes(self) -> int:
        """Of all shards."""
        return sum(array.nbytes for array in self._arrays)

    def read(self, rows: np.ndarray, view: np.ndarray) -> np.ndarray:
        """View `view` (B,) 0 or 1 of rows (B,): a new array (B,...)."""
        places = np.searchsorted(self._ends, rows, side="right")
        starts = self._ends - np.diff(self._ends, prepend=0)
        local = (rows - starts[places]) * self._views + view
        out = np.empty((len(rows), *self._shape), self._dtype)
        first = int(places[0]) if len(places) else 0
        if (places == first).all():
            return np.take(self._arrays[first], local, axis=0, out=out, mode="clip") if len(rows) else out
        # With many shards a batch has one or two rows of each: copying row by row costs least.
        for number, (place, row) in enumerate(zip(places.tolist(), local.tolist(), strict=True)):
            out[number] = self._arrays[place][row]
        return out
