"""Sampling jobs: no image depends on devices, batches or interruptions; outputs are complete or absent."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
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
    assert np.array_equal(np.load(parts.file(CPU_ROWS)), whole[CPU_ROWS : 2 * CPU_ROWS])
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
    assert not file.exists() and len(list(parts.glob("*.npy"))) == 2
    (parts / f"{CPU_ROWS:08d}.npy").write_bytes(b"cut off")
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
    (tmp_path / "a.npz.parts" / ".00000000.npy.1.tmp").write_bytes(b"left by a kill")
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
            UserError, match=r"cannot write .*b.npz.*: No space left on device; free some space"
        ):
            sampled(run, tmp_path / "b.npz")
    assert not (tmp_path / "b.npz").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    for shard in (tmp_path / "b.npz.parts").glob("*.npy"):
        assert len(np.load(shard)) in (CPU_ROWS, COUNT - 2 * CPU_ROWS)
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
