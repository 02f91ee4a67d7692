"""Write a prepared data set shard by shard. A killed command can be rerun and ends with the same bytes.

Every file is written atomically. A shard is finished when its record is written, the set when its manifest
is. Does not know images or autoencoders: the caller makes the rows.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from stbench.core.disk import require_free_space
from stbench.core.errors import UserError
from stbench.core.files import LOCK, atomic_write, hash_file, lock_folder, write_array
from stbench.core.world import ALONE, World
from stbench.data.shards import (
    DTYPES,
    MANIFEST,
    Manifest,
    Shard,
    ShardFile,
    dump_manifest,
    parse_shard,
    read_manifest,
)

PLAN = "plan.json"
"""File with the arguments of the command that started an unfinished set."""

PLAN_KEYS = frozenset({"source", "images", "listing", "autoencoder", "shards", "references"})
"""Keys that every plan has, whichever command wrote it."""

# Names of files that this module writes. Nothing else is ever deleted.
OWN_ARRAY = re.compile(r"\d{5,}-(moments|pixels|labels|split|ids|images)\.npy$")
OWN_RECORD = re.compile(r"shard-\d{5,}\.json$")
OWN_TEMPORARY = re.compile(
    r"\.(\d{5,}-(moments|pixels|labels|split|ids|images)\.npy|shard-\d{5,}\.json|(plan|manifest)\.json)"
    r"\.\d+\.tmp$"
)

ROWS_PER_SHARD = 10_000
"""Default number of images per shard."""


@dataclass(frozen=True)
class ShardRows:
    """Content of one shard."""

    ids: Sequence[str]
    labels: Sequence[int]
    split: Sequence[int]
    data: np.ndarray
    """Moments or pixels (n,V,...)."""
    images: np.ndarray
    """Pixels, uint8 (m,c,H,W), of the rows whose split is not TRAIN, in order."""
    unreadable: Sequence[tuple[str, str]] = ()
    """(id, reason) of images that were left out."""


def shard_bounds(count: int, shards: int | None) -> list[tuple[int, int]]:
    """Return the rows (start, stop) of each shard, of sizes as equal as possible.

    Raises UserError for more shards than images.
    """
    shards = math.ceil(count / ROWS_PER_SHARD) if shards is None else shards
    if not 1 <= shards <= count:
        raise UserError(f"--shards must be in 1..{count} for {count} images, got {shards}; leave it out")
    edges = [count * k // shards for k in range(shards + 1)]
    return list(itertools.pairwise(edges))


def is_prepared(folder: Path) -> bool:
    """Whether a folder contains a prepared data set, finished or not, or nothing.

    Raises UserError, which names a file, if it contains something else.
    """
    _read_plan(folder)
    return True


def write_shards(
    folder: Path,
    draft: Manifest,
    *,
    bounds: Sequence[tuple[int, int]],
    total_bytes: int,
    make: Callable[[int, int], ShardRows],
    advance: Callable[[int], None],
    world: World = ALONE,
) -> tuple[Manifest, bool]:
    """Write the missing shards and the manifest; return the manifest and whether anything was missing.

    The ranks take turns at the shards.

    `draft` is the manifest without shards, `total_bytes` the size of the whole set, `make(start, stop)` makes
    the rows of a shard. `advance(rows)` is called for shards that an earlier command finished. Raises
    UserError for a folder that contains something else, is in use, or is on a disk that is too small.
    """
    with contextlib.ExitStack() as stack:
        # Rank 0 holds the lock until all ranks are done.
        finished = world.from_main(lambda: _open(folder, draft, len(bounds), total_bytes, stack))
        if finished is None:
            advance(bounds[-1][1])
            return world.from_main(lambda: read_manifest(folder)), False
        missing = [number for number, shard in enumerate(finished) if shard is None]
        for (start, stop), shard in zip(bounds, finished, strict=True):
            if shard is not None:
                advance(stop - start)
        mine = missing[world.rank :: world.size]
        written = {n: _write_shard(folder, n, draft.kind, make(*bounds[n])) for n in mine}
        for others in world.gather_objects(written):
            for number, shard in others.items():
                finished[number] = shard
        return world.from_main(
            lambda: _finish(folder, replace(draft, shards=tuple(filter(None, finished))))
        ), True


def _open(
    folder: Path, draft: Manifest, count: int, total_bytes: int, stack: contextlib.ExitStack
) -> list[Shard | None] | None:
    """Lock the folder until `stack` is closed and start, or resume, the set.

    Returns the shards that an earlier command has finished, None for the others; None for a finished set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _read_plan(folder)  # refuses a folder with other files before a lock file is put into it
    stack.enter_context(lock_folder(folder, "wait for it or choose another folder"))
    # A finished set: nothing to do if it was made with the same arguments.
    if (folder / MANIFEST).is_file():
        _require_same_plan(folder, read_manifest(folder).plan, draft.plan)
        _clean_up(folder)
        return None
    # Shards that an earlier command finished are kept.
    _start_or_resume(folder, draft.plan)
    finished = [_finished_shard(folder, number) for number in range(count)]
    written = sum(file.bytes for shard in finished if shard for file in shard.files.values())
    require_free_space(folder, total_bytes - written)
    return finished


def _finish(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, which makes the folder a data set, and return it."""
    if manifest.count < 2:
        raise UserError(f"{folder}: no image could be read; the first: {manifest.unreadable[0]}")
    atomic_write(folder / MANIFEST, dump_manifest(manifest))
    _clean_up(folder)
    return manifest


# --- The plan: the arguments that a rerun must share with the first command ---


def _read_plan(folder: Path) -> Mapping[str, Any] | None:
    """Return the plan of the set in a folder, finished or not; None for an empty folder.

    Raises UserError for a folder with files of something else.
    """
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).plan
    if (plan := _unfinished_plan(folder)) is not None:
        return plan
    names = (path.name for path in folder.iterdir())
    others = sorted(name for name in names if name != LOCK and not OWN_TEMPORARY.match(name))
    if others:
        raise UserError(f"{folder} contains other files ({others[0]}); give a new or an empty folder")
    return None


def _unfinished_plan(folder: Path) -> Mapping[str, Any] | None:
    """Return the content of plan.json; None if it is missing or not written by this module."""
    try:
        plan = json.loads((folder / PLAN).read_bytes())
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and plan.keys() >= PLAN_KEYS else None


def _start_or_resume(folder: Path, plan: Mapping[str, Any]) -> None:
    """Write the plan, unless shards of it are finished. Raises UserError if they were made with another."""
    known = _read_plan(folder)
    _remove(folder, OWN_TEMPORARY)
    if known is not None and any(OWN_RECORD.match(path.name) for path in folder.iterdir()):
        _require_same_plan(folder, known, plan)
        return
    if known is not None:  # no shard was finished, so nothing is lost if the arguments differ
        _remove(folder, OWN_ARRAY)
    atomic_write(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def _require_same_plan(folder: Path, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raise a UserError that names the first argument in which two plans differ."""
    plain = json.loads(json.dumps(given))
    for name in {**known, **plain}:
        if known.get(name) == plain.get(name):
            continue
        if name == "listing":  # a hash, which would tell nobody anything
            raise UserError(
                f"{folder} was started with other images or other classes; use the same arguments, "
                f"or another folder"
            )
        raise UserError(
            f"{folder} was started with {name} {known.get(name)!r}, found {plain.get(name)!r}; "
            f"use the same arguments, or another folder"
        )


def _remove(folder: Path, *patterns: re.Pattern[str]) -> None:
    for path in list(folder.iterdir()):
        if any(pattern.match(path.name) for pattern in patterns) and path.is_file():
            path.unlink(missing_ok=True)


def _clean_up(folder: Path) -> None:
    """Delete the files that only an unfinished set needs."""
    _remove(folder, OWN_TEMPORARY, OWN_RECORD)
    if _unfinished_plan(folder) is not None:
        (folder / PLAN).unlink()
    (folder / LOCK).unlink(missing_ok=True)


# --- Shards ---


def _record(folder: Path, number: int) -> Path:
    """Return the file that says that a shard is finished."""
    return folder / f"shard-{number:05d}.json"


def _finished_shard(folder: Path, number: int) -> Shard | None:
    """Return the record of a shard that an earlier command finished, if all of its files are intact."""
    try:
        shard = parse_shard(json.loads(_record(folder, number).read_bytes()))
        for array, written in shard.files.items():
            path = shard.path(folder, array)
            if path.stat().st_size != written.bytes or hash_file(path) != written.sha256:
                return None
    except (OSError, ValueError, RecursionError):  # missing or damaged: the shard is written again
        return None
    return shard if shard.name == f"{number:05d}" else None


def _write_shard(folder: Path, number: int, kind: str, rows: ShardRows) -> Shard:
    """Write the arrays of a shard, then its record."""
    ids = np.array([os.fsencode(name) for name in rows.ids] or [b""])[: len(rows.ids)]
    arrays = {
        kind: rows.data,
        "labels": np.asarray(rows.labels, np.int64),
        "split": np.asarray(rows.split, np.uint8),
        "ids": ids,
        "images": rows.images,
    }
    files: dict[str, ShardFile] = {}
    shard = Shard(f"{number:05d}", len(rows.ids), len(rows.images), files, tuple(rows.unreadable))
    for name, array in arrays.items():
        assert array.dtype.name == DTYPES.get(name, array.dtype.name), f"{name} is {array.dtype}"
        path = shard.path(folder, name)
        digest = write_array(path, array)
        files[name] = ShardFile(path.stat().st_size, digest)
    atomic_write(_record(folder, number), json.dumps(asdict(shard)) + "\n")
    return shard
