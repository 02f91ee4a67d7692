"""Sampling jobs: no image depends on devices, batches or interruptions; outputs are complete or absent."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from stbench.core.device import pick_devices
from stbench.core.errors import UserError
from stbench.diffusion.sample import Guidance
from stbench.evaluate.progress import Report
from stbench.evaluate.sample_batch import CPU_ROWS, SampleSpec
from stbench.evaluate.sample_job import (
    Job,
    SampleRequest,
    generate_in_processes,
    resolve_request,
    sample_images,
    shard_size,
)
from stbench.evaluate.sample_model import ModelLocation, load_model
from stbench.evaluate.sample_parts import PartsFolder, read_settings
from tests.sampling import small_model

CPU = torch.device("cpu")
COUNT = 2 * CPU_ROWS + 6
"""Three network calls, the last of them padded."""
REQUEST = SampleRequest(COUNT, 1.8, (0.0, 0.7), sampler="euler-maruyama", steps=2, batch=CPU_ROWS)


@pytest.fixture(scope="module")
def run(trained_run: Path) -> ModelLocation:
    return ModelLocation(trained_run)


@pytest.fixture(scope="module")
def whole(run: ModelLocation, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The images of REQUEST, generated in one go."""
    return sampled(run, tmp_path_factory.mktemp("whole") / "a.npz")


def images(file: Path) -> np.ndarray:
    return np.load(file)["arr_0"]


def sampled(run: ModelLocation, file: Path, devices: str = "cpu", **changes: Any) -> np.ndarray:
    sample_images(run, replace(REQUEST, **changes), [file], pick_devices(devices))
    return images(file)


def test_neither_batch_size_nor_number_of_images_changes_a_pixel(
    run: ModelLocation, whole: np.ndarray, tmp_path: Path
) -> None:
    assert whole.shape == (COUNT, 32, 32, 3) and whole.dtype == np.uint8
    assert len(np.unique(whole.reshape(COUNT, -1), axis=0)) == COUNT
    assert np.array_equal(sampled(run, tmp_path / "b.npz", batch=7), whole)
    assert np.array_equal(sampled(run, tmp_path / "c.npz", batch=1000), whole)
    assert np.array_equal(sampled(run, tmp_path / "d.npz", count=CPU_ROWS + 1), whole[: CPU_ROWS + 1])
    assert not np.array_equal(sampled(run, tmp_path / "e.npz", seed=1), whole)


@pytest.mark.slow
def test_two_processes_generate_the_same_pixels(
    run: ModelLocation, whole: np.ndarray, tmp_path: Path
) -> None:
    assert np.array_equal(sampled(run, tmp_path / "a.npz", "cpu,cpu"), whole)


@pytest.mark.slow
def test_a_worker_process_generates_the_same_pixels(
    run: ModelLocation, whole: np.ndarray, tmp_path: Path
) -> None:
    parts = PartsFolder(tmp_path / "a.npz", {"count": COUNT}, CPU_ROWS)
    parts.open()
    job = Job(run, resolve_request(REQUEST, load_model(run)), parts)
    generate_in_processes(job, [CPU], parts.missing()[1:2])
    assert np.array_equal(images(parts.file(CPU_ROWS)), whole[CPU_ROWS : 2 * CPU_ROWS])
    assert parts.missing() == [(0, CPU_ROWS), (2 * CPU_ROWS, COUNT)]


@pytest.mark.slow
def test_an_error_in_a_process_stops_all_and_is_one_line(run: ModelLocation, tmp_path: Path) -> None:
    parts = PartsFolder(tmp_path / "a.npz", {"count": COUNT}, CPU_ROWS)
    parts.open()
    job = Job(ModelLocation(tmp_path / "gone"), resolve_request(REQUEST, load_model(run)), parts)
    with pytest.raises(UserError, match="gone .*run folder") as caught:
        generate_in_processes(job, [CPU, CPU], parts.missing())
    assert "\n" not in str(caught.value)


def test_an_interrupted_job_resumes_with_the_same_pixels(
    run: ModelLocation, whole: np.ndarray, tmp_path: Path
) -> None:
    file, done = tmp_path / "b.npz", []

    @contextmanager
    def interrupt_after_two_shards(label: str, total: int | None) -> Iterator[Report]:
        def report(images: int) -> None:
            done.append(images)
            if len(done) == 2:
                raise KeyboardInterrupt

        yield report

    # Interrupted, and with one damaged shard: the second and the third are generated when it resumes.
    with pytest.raises(KeyboardInterrupt):
        sample_images(run, REQUEST, [file], [CPU], progress=interrupt_after_two_shards)
    parts = tmp_path / "b.npz.parts"
    assert not file.exists() and len(list(parts.glob("*.npz"))) == 2
    (parts / f"{CPU_ROWS:08d}.npz").write_bytes(b"cut off")
    done[:] = [0, 0]
    sample_images(run, REQUEST, [file], [CPU], progress=interrupt_after_two_shards)
    assert done == [0, 0, 2 * CPU_ROWS, COUNT]
    assert np.array_equal(images(file), whole)
    assert sorted(path.name for path in tmp_path.glob("b.npz*")) == ["b.npz"]


def test_leftovers_of_a_killed_process_are_deleted(run: ModelLocation, tmp_path: Path) -> None:
    folder = tmp_path / "drawn"
    (folder / ".png.7.tmp").mkdir(parents=True)
    (folder / ".png.7.tmp" / "000000.png").touch()
    (folder / ".a.npz.7.tmp").touch()
    (folder / ".b.npz.7.tmp").touch()
    sample_images(run, replace(REQUEST, count=3), [folder / "a.npz", folder / "png"], [CPU])
    assert sorted(p.name for p in folder.iterdir()) == [".b.npz.7.tmp", "a.npz", "png"]


def test_npz_and_folder_contain_the_same_images_and_the_settings(run: ModelLocation, tmp_path: Path) -> None:
    file, folder = tmp_path / "a.npz", tmp_path / "png"
    settings = sample_images(run, REQUEST, [file, folder], [CPU])
    pictures = sorted(folder.glob("*.png"))
    assert [p.name for p in pictures] == [f"{i:06d}.png" for i in range(COUNT)]
    assert np.array_equal(np.stack([np.asarray(Image.open(p)) for p in pictures]), images(file))
    arrays = np.load(file)
    assert arrays.files == ["arr_0", "labels", "settings"]
    assert arrays["labels"].tolist() == [i % 10 for i in range(COUNT)]
    assert read_settings(file) == read_settings(folder) == json.loads(json.dumps(settings))
    assert settings["cfg"] == 1.8 and list(settings["interval"]) == [0.0, 0.7]
    assert settings["rounding"].startswith("clamp, round half to even")


def test_a_finished_output_is_kept_and_other_settings_are_refused(run: ModelLocation, tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    sampled(run, file, count=3)
    before = file.stat().st_mtime_ns
    sampled(run, file, count=3)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"a.npz was made with cfg 1.8, not 2.0; delete it or choose another"):
        sampled(run, file, count=3, scale=2.0)
    np.savez(tmp_path / "other.npz", np.zeros(3))
    with pytest.raises(UserError, match="exists and was not made by `stbench sample`"):
        sampled(run, tmp_path / "other.npz")
    PartsFolder(tmp_path / "b.npz", {"count": 9, "cfg": 1.0}, 3).open()
    with pytest.raises(UserError, match=r"b.npz.parts was made with schema None, not 1"):
        sampled(run, tmp_path / "b.npz")


def test_two_commands_cannot_write_to_one_output(run: ModelLocation, tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    with (
        PartsFolder(file, {"count": 1}, 1).lock(),
        pytest.raises(UserError, match="a.npz.parts is in use by process"),
    ):
        sampled(run, file)
    (tmp_path / "a.npz.parts" / ".00000000.npz.1.tmp").write_bytes(b"left by a kill")
    assert len(sampled(run, file, count=3)) == 3


def full_after(allowed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill the disk after a number of synced files; file systems may report a full disk as late as fsync."""
    sync, calls = os.fsync, iter(range(10**6))

    def fsync(handle: int) -> None:
        if next(calls) >= allowed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("allowed", [0, 3, 6], ids=["settings", "a shard", "the npz"])
def test_a_full_disk_is_one_line_and_loses_nothing(
    run: ModelLocation, whole: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, allowed: int
) -> None:
    with monkeypatch.context() as patch:
        full_after(allowed, patch)
        with pytest.raises(
            UserError, match=r"cannot write .*b.npz.*: No space left on device .*free some space"
        ):
            sampled(run, tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    for shard in (tmp_path / "b.npz.parts").glob("*.npz"):
        assert len(images(shard)) in (CPU_ROWS, COUNT - 2 * CPU_ROWS)
    assert np.array_equal(sampled(run, tmp_path / "b.npz"), whole)


def test_open_values_come_from_the_model() -> None:
    spec = resolve_request(SampleRequest(5), small_model())
    assert spec == SampleSpec(5, Guidance(1.0, 0.2, 0.7), "euler", 10, "random", 0, 64)
    assert shard_size(spec, CPU) == 64 and shard_size(replace(spec, batch=5), CPU) == CPU_ROWS
    assert shard_size(replace(spec, batch=5), torch.device("cuda")) == 5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sampler", "ddpm", "cannot invert objective"),
        ("labels", "even", "'balanced' or 'random'"),
        ("channels", 9, "--channels must be between 1 and 4, found 9; use --channels 4 for all"),
        ("precision", "fp16", "unknown precision 'fp16'"),
        ("interval", (0.7, 0.2), "0 <= low <= high"),
    ],
)
def test_a_request_that_the_model_cannot_fulfil_is_refused(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_request(replace(SampleRequest(5), **{name: value}), small_model())  # type: ignore[arg-type]


def test_parts_of_another_job_are_not_used(run: ModelLocation, whole: np.ndarray, tmp_path: Path) -> None:
    """As a process of a killed command would write them, or a person copy them, with valid checksums."""
    other = PartsFolder(tmp_path / "a.npz", {"count": COUNT, "cfg": 1.0}, CPU_ROWS)
    other.open()
    for start, stop in other.shards:
        other.write(start, np.zeros((stop - start, *whole.shape[1:]), np.uint8))
    assert not other.missing()
    (other.folder / "settings.json").unlink()
    (other.folder / "00000000.npy").write_bytes(b"from an earlier version")
    assert np.array_equal(sampled(run, tmp_path / "a.npz"), whole)
    assert not other.folder.exists()


def test_a_late_process_cannot_write_into_the_next_job(tmp_path: Path) -> None:
    first, second = (PartsFolder(tmp_path / "a.npz", {"count": 4, "cfg": cfg}, 2) for cfg in (1.0, 2.0))
    first.open()
    shutil.rmtree(first.folder)
    second.open()
    with pytest.raises(UserError, match="a.npz.parts was replaced while images were generated"):
        first.write(0, np.zeros((2, 4, 4, 3), np.uint8))
    assert second.missing() == second.shards


def test_files_of_somebody_else_are_kept(run: ModelLocation, tmp_path: Path) -> None:
    (tmp_path / "a.npz.parts").mkdir()
    (tmp_path / "a.npz.parts" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"a.npz.parts contains other files .notes.txt.; choose another"):
        sampled(run, tmp_path / "a.npz")
    assert (tmp_path / "a.npz.parts" / "notes.txt").read_text() == "mine"


PARENT = """
import sys, torch
from pathlib import Path
from stbench.evaluate.sample_job import SampleRequest, sample_images
from stbench.evaluate.sample_model import ModelLocation

if __name__ == "__main__":
    request = SampleRequest(20_000, steps=2, batch=32)
    sample_images(ModelLocation(Path(sys.argv[1])), request, [Path(sys.argv[2])], [torch.device("cpu")] * 2)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_command(run: ModelLocation, whole: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    file = tmp_path / "a.npz"
    command = [sys.executable, str(tmp_path / "parent.py"), str(run.path), str(file)]
    parent = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / "a.npz.parts"
    try:
        wait_until(lambda: len(list(parts.glob("*.npz"))) >= 2, 300)
        workers = children(parent.pid)
        assert len(workers) >= 2
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), 20)
    shutil.rmtree(parts)
    assert np.array_equal(sampled(run, file), whole)


def children(pid: int) -> list[int]:
    """Process ids of the children of a process."""
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)
