"""Writing a prepared data set, shard by shard, so that a killed command goes on and ends with the same bytes.

Every file appears whole or not at all; a shard counts once its record is written, the set once its manifest
is. Knows nothing of images or autoencoders: whoever calls it makes the rows.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stbench.core.errors import UserError
from stbench.core.files import LOCK, atomic_write, lock_folder, require_free_space, write_array
from stbench.data.shards import (
    DTYPES,
    HELDOUT,
    MANIFEST,
    REFERENCE,
    TRAIN,
    Manifest,
    Shard,
    ShardFile,
    dump_manifest,
    read_manifest,
    shard_of,
)

PLAN = "plan.json"


PLAN_KEYS = frozenset({"source", "images", "listing", "autoencoder", "shards", "references"})
"""What every plan of ours holds, whatever command began it."""


OWN_ARRAY = re.compile(r"\d{5,}-(moments|pixels|labels|split|ids|images)\.npy$")


OWN_RECORD = re.compile(r"shard-\d{5,}\.json$")


OWN_TMP = re.compile(
    r"\.(\d{5,}-(moments|pixels|labels|split|ids|images)\.npy|shard-\d{5,}\.json|(plan|manifest)\.json)"
    r"\.\d+\.tmp$"
)
"""Names of our files: nothing else is ever deleted."""


ROWS_PER_SHARD = 10_000
"""Images a shard, unless a number of shards is asked for."""


HELDOUT_MOST, HELDOUT_SHARE = 1000, 0.05
"""Held out is this share of the images, at most that many, at least one."""


REFERENCES = 10_000
"""Training images whose pixels are kept for evaluation, unless told otherwise."""


@dataclass(frozen=True)
class Rows:
    """What one shard will hold."""

    ids: Sequence[str]
    labels: Sequence[int]
    split: Sequence[int]
    data: np.ndarray
    """(n,V,...)."""
    images: np.ndarray
    """uint8 (m,c,H,W): pixels of the rows whose split is not TRAIN, in order."""
    unreadable: Sequence[tuple[str, str]] = ()


def split_of(ids: Sequence[str], references: int) -> np.ndarray:
    """TRAIN, HELDOUT or REFERENCE (N,) for every id, by the order of a hash of the ids.

    Held out are the first min(1000, 5 %) (at least one), references the next `references`; neither the order
    of the files nor their labels matter. Raises UserError for fewer than two images.
    """
    if len(ids) < 2:
        raise UserError(f"expected at least 2 images, one to train on and one held out, found {len(ids)}")
    keys = [hashlib.sha256(b"stbench-split/" + os.fsencode(name)).digest() for name in ids]
    order = sorted(range(len(ids)), key=keys.__getitem__)
    heldout = max(1, min(HELDOUT_MOST, round(HELDOUT_SHARE * len(ids))))
    split = np.full(len(ids), TRAIN, np.uint8)
    split[order[:heldout]] = HELDOUT
    split[order[heldout : heldout + references]] = REFERENCE
    return split


def shard_bounds(count: int, shards: int | None) -> list[tuple[int, int]]:
    """Rows (start, stop) of each shard: as even as can be. Raises UserError for more shards than images."""
    shards = math.ceil(count / ROWS_PER_SHARD) if shards is None else shards
    if not 1 <= shards <= count:
        raise UserError(f"--shards wants 1..{count} for {count} images, got {shards}; leave it out")
    edges = [count * k // shards for k in range(shards + 1)]
    return list(itertools.pairwise(edges))


def build(
    folder: Path,
    draft: Manifest,
    bounds: Sequence[tuple[int, int]],
    needed: int,
    make: Callable[[int, int], Rows],
    done: Callable[[int], None],
) -> tuple[Manifest, bool]:
    """Write the shards that are missing, then the manifest; returns it, and whether anything was to do.

    `draft` is the manifest without shards; `needed` are the bytes of the whole set; `make(start, stop)` gives
    the rows of a shard; `done(rows)` is told of rows that an earlier call had finished. Raises UserError
    for a folder that holds something else, is in use, or has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _known_plan(folder)
    with lock_folder(folder, "wait for it or choose another folder"):
        if (folder / MANIFEST).is_file():
            found = read_manifest(folder)
            _same_plan(folder, found.plan, draft.plan)
            _clean(folder)
            done(bounds[-1][1])
            return found, False
        _begin(folder, draft.plan)
        shards = [_finished(folder, number) for number in range(len(bounds))]
        require_free_space(folder, needed - sum(f.bytes for s in shards if s for f in s.files.values()))
        for number, (start, stop) in enumerate(bounds):
            found_shard = shards[number]
            if found_shard is None:
                shards[number] = _write_shard(folder, number, draft.kind, make(start, stop))
            else:
                done(stop - start)
        manifest = Manifest(**{**vars(draft), "shards": tuple(shard for shard in shards if shard)})
        if manifest.count < 2:
            raise UserError(f"{folder}: no image could be read; the first: {manifest.unreadable[0]}")
        atomic_write(folder / MANIFEST, dump_manifest(manifest))
        _clean(folder)
    return manifest, True


def _known_plan(folder: Path) -> Mapping[str, Any] | None:
    """The plan of the set that was begun in a folder, None in an empty one; touches nothing.

    Raises UserError for a folder that is not ours: not empty, and without manifest or a plan of our keys.
    """
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).plan
    if (plan := _own_plan(folder)) is not None:
        return plan
    others = [path.name for path in folder.iterdir() if path.name != LOCK and not OWN_TMP.match(path.name)]
    if others:
        raise UserError(f"{folder} holds other files ({sorted(others)[0]}); give a new or an empty folder")
    return None


def _own_plan(folder: Path) -> Mapping[str, Any] | None:
    try:
        plan = json.loads((folder / PLAN).read_bytes())
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and plan.keys() >= PLAN_KEYS else None


def _remove(folder: Path, *patterns: re.Pattern[str]) -> None:
    for path in list(folder.iterdir()):
        if any(pattern.match(path.name) for pattern in patterns) and path.is_file():
            path.unlink(missing_ok=True)


def _begin(folder: Path, plan: Mapping[str, Any]) -> None:
    known = _known_plan(folder)
    _remove(folder, OWN_TMP)
    if known is not None and any(OWN_RECORD.match(path.name) for path in folder.iterdir()):
        _same_plan(folder, known, plan)
        return
    if known is not None:  # begun, but no shard was finished: nothing is lost by other arguments
        _remove(folder, OWN_ARRAY)
    atomic_write(folder / PLAN, json.dumps(plan, indent=1) + "\n")


def _same_plan(folder: Path, known: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(asked))
    for name in {**known, **plain}:
        if known.get(name) != plain.get(name) and name == "listing":
            raise UserError(
                f"{folder} was begun with other images, or other classes of them; use the same arguments, "
                f"or another folder"
            )
        if known.get(name) != plain.get(name):
            raise UserError(
                f"{folder} was begun with {name} {known.get(name)!r}, found {plain.get(name)!r}; "
                f"use the same arguments, or another folder"
            )


def _clean(folder: Path) -> None:
    """Take away what only an unfinished set needs."""
    _remove(folder, OWN_TMP, OWN_RECORD)
    if _own_plan(folder) is not None:
        (folder / PLAN).unlink()
    (folder / LOCK).unlink(missing_ok=True)


def _finished(folder: Path, number: int) -> Shard | None:
    """The record of a shard that an earlier call finished, if all of its files are still there."""
    file = folder / f"shard-{number:05d}.json"
    if not file.is_file():
        return None
    shard = shard_of(json.loads(file.read_text()))
    sizes = {array: shard.path(folder, array) for array in shard.files}
    whole = all(p.is_file() and p.stat().st_size == shard.files[a].bytes for a, p in sizes.items())
    return shard if whole else None


def _write_shard(folder: Path, number: int, kind: str, rows: Rows) -> Shard:
    ids = np.array([os.fsencode(name) for name in rows.ids] or [b""])[: len(rows.ids)]
    arrays = {
        kind: rows.data,
        "labels": np.asarray(rows.labels, np.int64),
        "split": np.asarray(rows.split, np.uint8),
        "ids": ids,
        "images": rows.images,
    }
    shard = Shard(f"{number:05d}", len(rows.ids), len(rows.images), {}, tuple(rows.unreadable))
    files = {}
    for name, array in arrays.items():
        assert array.dtype.name == DTYPES.get(name, array.dtype.name), f"{name} is {array.dtype}"
        path = shard.path(folder, name)
        digest = write_array(path, array)
        files[name] = ShardFile(path.stat().st_size, digest)
    shard = Shard(shard.name, shard.count, shard.images, files, shard.unreadable)
    atomic_write(folder / f"shard-{number:05d}.json", json.dumps(asdict(shard)) + "\n")
    return shard
