"""Images/s from shards and from a folder of single .npy files, with a cold and a warm page cache.

10,000 rows of 16 KiB (8x32x32 float16), in batches of 256 in the order of a permutation. "Cold" drops both
from the page cache first (posix_fadvise). The test is skipped if that has no effect.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from stbench.core.files import write_array
from stbench.data.shards import ShardedRows

pytestmark = pytest.mark.benchmark
ROWS, BATCH, SHAPE = 10_000, 256, (8, 32, 32)
COLD, WARM = 8.0, 20.0
"""Minimum speed-up of shards over single files."""

Load = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in 00000.npy (one shard) and in single/*.npy."""
    folder = tmp_path_factory.mktemp("loading")
    rows = np.random.default_rng(0).normal(size=(ROWS, 1, *SHAPE)).astype(np.float16)
    write_array(folder / "00000.npy", rows)
    (folder / "single").mkdir()
    for number, row in enumerate(rows[:, 0]):
        np.save(folder / "single" / f"{number:05d}.npy", row)
    os.sync()  # only clean pages can be dropped
    return folder


def shards(folder: Path, count: int = 1) -> Load:
    """Read batches from a mapped shard, or from `count` parts of it."""
    mapped = ShardedRows(np.array_split(np.load(folder / "00000.npy", mmap_mode="r"), count))
    return lambda rows: mapped.read(rows, np.zeros_like(rows))


def singles(folder: Path) -> Load:
    """Read batches from single files."""
    return lambda rows: np.stack([np.load(folder / "single" / f"{row:05d}.npy") for row in rows])


def epoch(load: Load, batches: Sequence[np.ndarray]) -> float:
    """Return images/s over some batches."""
    started = time.perf_counter()
    for rows in batches:
        load(rows)
    return sum(map(len, batches)) / (time.perf_counter() - started)


def drop(folder: Path) -> None:
    """Drop every file from the page cache; skip the test if that is not possible."""
    for file in folder.rglob("*.npy"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    if cached(folder / "00000.npy") or cached(folder / "single" / "00000.npy"):
        pytest.skip("the page cache cannot be dropped on this machine")


def cached(file: Path) -> bool:
    """Whether the first page is in the page cache; True if that is unknown."""
    handle = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(handle, [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        os.close(handle)


def batches(seed: int) -> list[np.ndarray]:
    """Return a permutation in batches."""
    order = np.random.default_rng(seed).permutation(ROWS)
    return [order[k : k + BATCH] for k in range(0, ROWS, BATCH)]


def report(benchmark: BenchmarkFixture, name: str, fast: float, slow: float, least: float) -> None:
    benchmark.group = f"{ROWS} latents of 16 KiB in batches of {BATCH}"
    found = {"shards images/s": round(fast), "single files images/s": round(slow), "times": fast / slow}
    benchmark.extra_info.update(found)
    print(f"{name}: {found}")
    assert fast / slow >= least


def test_both_give_the_same_rows(folder: Path) -> None:
    rows = batches(3)[0]
    assert np.array_equal(shards(folder)(rows), singles(folder)(rows))


@pytest.mark.parametrize(("count", "least"), [(1, WARM), (100, WARM / 4)])
def test_warm(benchmark: BenchmarkFixture, folder: Path, count: int, least: float) -> None:
    one, many = shards(folder, count), singles(folder)
    epoch(one, batches(0)), epoch(many, batches(0))
    slow = max(epoch(many, batches(seed)) for seed in range(3))
    rates: list[float] = []
    benchmark.pedantic(lambda: rates.append(epoch(one, batches(len(rates)))), rounds=9)
    report(benchmark, f"warm, {count} shards", max(rates), slow, least)


def test_cold(benchmark: BenchmarkFixture, folder: Path) -> None:
    slow, rates = 0.0, []
    for seed in range(3):
        drop(folder)
        slow = max(slow, epoch(singles(folder), batches(seed)))

    def fresh() -> None:
        rates.append(epoch(shards(folder), batches(len(rates))))

    benchmark.pedantic(fresh, setup=lambda: drop(folder), rounds=3)
    report(benchmark, "cold", max(rates), slow, COLD)
