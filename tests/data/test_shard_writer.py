"""Writing shards: kills, full disks and reruns end with the same bytes; foreign files are safe."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.core.errors import UserError
from stbench.core.files import lock_folder
from stbench.data.prepare import PrepareOptions, _plan, open_task, prepare
from stbench.data.shard_writer import PLAN, shard_bounds
from stbench.data.shards import MANIFEST, read_manifest
from stbench.data.verify import verify
from tests.data.conftest import COUNT
from tests.datafiles import content, run_prepare

FIRST_SHARD, SECOND_SHARD = 5, 15
"""Number of an fsync while the first shard is written, and while the second one is."""


@pytest.fixture
def pixels(options: PrepareOptions) -> PrepareOptions:
    """Options of a set of pixels, which is prepared without an autoencoder."""
    return replace(options, vae="none")


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], None]:
    """Make the n-th fsync raise an error."""

    def install(nth: int, error: BaseException) -> None:
        calls, real = iter(range(1, 10**6)), os.fsync

        def fsync(handle: int) -> None:
            if next(calls) == nth:
                raise error
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)

    return install


@pytest.fixture
def interrupted(pixels: PrepareOptions, fail_at: Callable[[int, BaseException], None]) -> PrepareOptions:
    """Options of a command that was stopped while it wrote the first shard."""
    fail_at(FIRST_SHARD, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        run_prepare(pixels)
    assert list(pixels.target.glob("*.npy")) and not list(pixels.target.glob("shard-*.json"))
    return pixels


def test_shards_have_equal_sizes_and_cover_all_images() -> None:
    assert shard_bounds(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert len(shard_bounds(1_281_167, None)) == 129


# --- Stopped commands ---

KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from stbench.data.prepare import PrepareOptions, open_task, prepare
real, calls = os.fsync, [0]
def fsync(handle):
    calls[0] += 1
    if calls[0] == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
images, target = map(Path, sys.argv[1:3])
options = PrepareOptions(images, target, "none", 32, flip=True, shards=3, batch=8, references=10)
prepare(options, open_task(options), lambda count: None)
"""


def test_a_killed_command_can_be_rerun_and_ends_with_the_same_bytes(
    pixels: PrepareOptions, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(pixels.source), str(pixels.target), str(SECOND_SHARD)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert list(pixels.target.glob(".*.tmp")) and list(pixels.target.glob("shard-*.json"))
    with pytest.raises(UserError, match=r"found no manifest.json .*make or finish one with `stbench data"):
        read_manifest(pixels.target)
    run_prepare(pixels)
    whole = replace(pixels, target=tmp_path / "whole")
    run_prepare(whole)
    assert content(pixels.target) == content(whole.target)


@pytest.mark.parametrize("nth", [1, FIRST_SHARD, SECOND_SHARD])
def test_a_full_disk_is_reported_in_one_line_and_the_command_can_be_rerun(
    pixels: PrepareOptions,
    nth: int,
    fail_at: Callable[[int, BaseException], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_at(nth, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device .*free some space"):
        run_prepare(pixels)
    assert not (pixels.target / MANIFEST).exists()
    assert not list(pixels.target.glob(".*.tmp"))
    run_prepare(pixels)
    assert verify(pixels.target)[1] == []


def test_a_file_size_limit_is_reported_like_a_full_disk(pixels: PrepareOptions) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    task = open_task(pixels)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*\.npy: File too large .*free some space"):
            prepare(pixels, task, lambda count: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run_prepare(pixels)[0].count == COUNT


def test_a_disk_that_is_too_small_is_refused_before_anything_is_encoded(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match=r"not enough disk space in .*: about 0.1 MiB needed, 0.0 MiB free"):
        run_prepare(options)


def test_two_commands_cannot_write_one_set(pixels: PrepareOptions) -> None:
    pixels.target.mkdir()
    with (
        lock_folder(pixels.target, ""),
        pytest.raises(UserError, match=f"is in use by process {os.getpid()}; wait for it"),
    ):
        run_prepare(pixels)


# --- Plans ---


def test_other_arguments_are_accepted_before_the_first_shard_is_finished(
    interrupted: PrepareOptions, tmp_path: Path
) -> None:
    other = replace(interrupted, batch=4, shards=1)
    run_prepare(other)
    assert verify(other.target)[1] == []
    fresh = replace(other, target=tmp_path / "fresh")
    run_prepare(fresh)
    assert content(other.target) == content(fresh.target)


def test_a_set_started_on_another_device_is_refused(options: PrepareOptions) -> None:
    task = open_task(options)
    options.target.mkdir()
    (options.target / PLAN).write_text(json.dumps({**_plan(options, task), "device": "cuda"}))
    (options.target / "shard-00000.json").write_text("{}")
    with pytest.raises(UserError, match="was started with device 'cuda', found 'cpu'; use the same"):
        prepare(options, task, lambda count: None)


# --- Foreign files ---


@pytest.mark.parametrize("plan", [None, '{"goal": "graduate"}', "[1]", "not JSON"])
def test_a_folder_with_other_files_is_refused_and_keeps_them(
    pixels: PrepareOptions, plan: str | None
) -> None:
    pixels.target.mkdir()
    for name in (".notes.tmp", "00000-labels.npy", "2024-results.npy"):
        (pixels.target / name).write_text("mine")
    if plan is not None:
        (pixels.target / PLAN).write_text(plan)
    before = content(pixels.target)
    with pytest.raises(UserError, match=r"contains other files \(\.notes\.tmp\)"):
        run_prepare(pixels)
    assert content(pixels.target) == before


def test_other_files_in_an_unfinished_set_are_never_deleted(interrupted: PrepareOptions) -> None:
    mine = {".notes.tmp": b"a", "2024-results.npy": b"b", "shard-notes.json": b"c"}
    for name, data in mine.items():
        (interrupted.target / name).write_bytes(data)
    (interrupted.target / ".00000-labels.npy.12.tmp").write_bytes(b"left by a killed command")
    for _ in range(2):
        run_prepare(replace(interrupted, shards=2))
    assert mine.items() <= content(interrupted.target).items()
    assert not (interrupted.target / ".00000-labels.npy.12.tmp").exists()
    assert verify(interrupted.target)[1] == []
