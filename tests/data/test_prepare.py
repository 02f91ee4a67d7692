"""`stbench data prepare` and `verify`: what is written and refused, what a kill or a full disk leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stbench.cli import data as data_commands
from stbench.core.errors import UserError
from stbench.core.files import lock_folder
from stbench.data import shard_writer
from stbench.data.crop import decode_image
from stbench.data.prepare import PrepareOptions, _plan, make_encoder, open_task, prepare
from stbench.data.shard_writer import shard_bounds, split_of
from stbench.data.shards import HELDOUT, MANIFEST, REFERENCE, TRAIN, Manifest, Shards, read_manifest, verify
from stbench.data.sources import Folder
from stbench.models.autoencoder import find_vae
from tests.datafiles import make_images, make_tar, make_vae

COUNT, SIZE = 60, 32


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("images"), COUNT, SIZE, mixed=True)


@pytest.fixture()
def job(images: Path, vae: Path, tmp_path: Path) -> PrepareOptions:
    return PrepareOptions(
        images, tmp_path / "set", str(vae), SIZE, flip=True, shards=3, batch=8, references=10
    )


def run(job: PrepareOptions) -> tuple[Manifest, bool]:
    return prepare(job, open_task(job), lambda count: None)


def column(folder: Path, array: str) -> np.ndarray:
    return np.concatenate([np.load(file) for file in sorted(folder.glob(f"*-{array}.npy"))])


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_set_holds_the_moments_of_the_crops_and_of_their_mirror_images(job: PrepareOptions) -> None:
    manifest, worked = run(job)
    assert worked
    assert (manifest.count, manifest.kind, manifest.shape, manifest.views) == (COUNT, "moments", (8, 4, 4), 2)
    ids, moments = column(job.target, "ids"), column(job.target, "moments")
    assert (moments.shape, moments.dtype) == ((COUNT, 2, 8, 4, 4), np.float16)
    network = find_vae(job.vae).load()
    for row in (0, 17, COUNT - 1):
        crop = decode_image((job.source / ids[row].decode()).read_bytes(), 3, SIZE)
        x = torch.from_numpy(np.stack([crop, crop[:, :, ::-1]])).float() / 127.5 - 1.0
        mean, std = network.encode(x)
        assert np.allclose(moments[row], torch.cat([mean, std], 1).numpy(), rtol=2e-3, atol=2e-4)
    assert column(job.target, "labels").tolist() == [int(name.decode()[5]) for name in ids]


def test_held_out_and_reference_images_are_kept_as_pixels(job: PrepareOptions) -> None:
    run(job)
    split, ids = column(job.target, "split"), column(job.target, "ids")
    assert [int((split == k).sum()) for k in (TRAIN, HELDOUT, REFERENCE)] == [47, 3, 10]
    kept = [decode_image((job.source / n.decode()).read_bytes(), 3, SIZE) for n in ids[split != TRAIN]]
    assert np.array_equal(column(job.target, "images"), np.stack(kept))


def test_the_split_depends_on_names_alone_and_states_its_size() -> None:
    names = [f"a/{k}.png" for k in range(300)]
    split = dict(zip(names, split_of(names, 50), strict=True))
    assert sum(v == HELDOUT for v in split.values()) == 15
    assert dict(zip(names[::-1], split_of(names[::-1], 50), strict=True)) == split
    more = dict(zip(names, split_of(names, 100), strict=True))
    assert {n for n in names if split[n] == HELDOUT} == {n for n in names if more[n] == HELDOUT}
    assert int((split_of([str(k) for k in range(40_000)], 0) == HELDOUT).sum()) == 1000
    with pytest.raises(UserError, match="at least 2 images"):
        split_of(["one"], 5)


def test_a_tar_gives_the_same_arrays(job: PrepareOptions, tmp_path: Path) -> None:
    run(job)
    packed = replace(job, source=make_tar(job.source, tmp_path / "images.tar"), target=tmp_path / "packed")
    run(packed)
    one, two = content(job.target), content(packed.target)
    assert {k: v for k, v in one.items() if k != MANIFEST} == {k: v for k, v in two.items() if k != MANIFEST}
    assert read_manifest(job.target).fingerprint() == read_manifest(packed.target).fingerprint()


def test_pixels_are_stored_without_an_autoencoder(job: PrepareOptions) -> None:
    manifest, _ = run(replace(job, vae="none"))
    assert (manifest.kind, manifest.shape, manifest.vae, manifest.scale) == (
        "pixels",
        (3, SIZE, SIZE),
        "",
        1.0,
    )
    name = column(job.target, "ids")[5].decode()
    crop = decode_image((job.source / name).read_bytes(), 3, SIZE)
    assert np.array_equal(column(job.target, "pixels")[5, 0], crop)


def test_bf16_moments_are_near_the_others(job: PrepareOptions, tmp_path: Path) -> None:
    run(job)
    run(replace(job, precision="bf16", target=tmp_path / "bf16"))
    exact, near = (column(folder, "moments").astype(float) for folder in (job.target, tmp_path / "bf16"))
    assert 0 < np.abs(exact - near).mean() < 0.02 * np.abs(exact).mean()


def test_unreadable_images_are_named_and_left_out(
    job: PrepareOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_images(tmp_path / "some", 30, SIZE)
    good = (source / "class0" / "img00000.jpg").read_bytes()
    (source / "class0" / "img00000.jpg").write_bytes(good[: len(good) // 2])
    (source / "class1" / "img00001.png").write_bytes(b"no image")
    data_commands.prepare(replace(job, source=source))
    manifest = read_manifest(job.target)
    assert manifest.count == 28 == len(column(job.target, "moments"))
    names = [name for name, _ in manifest.unreadable]
    assert names == ["class0/img00000.jpg", "class1/img00001.png"]
    assert not set(names) & {name.decode() for name in column(job.target, "ids")}
    told = capsys.readouterr().err
    assert all(f"left out: {name}: " in told for name in names)
    assert verify(job.target)[1] == []


def test_a_source_that_vanishes_midway_makes_no_set_and_the_same_command_goes_on(
    job: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed, real = open_task(job), Folder.read

    def read(source: Folder, index: int) -> bytes:
        if index >= 30:
            raise OSError(errno.EIO, "Input/output error")
        return real(source, index)

    monkeypatch.setattr(Folder, "read", read)
    with pytest.raises(UserError, match=r"found none .*Input/output error.*the same command") as caught:
        prepare(job, listed, lambda count: None)
    assert "\n" not in str(caught.value)
    assert [file.name for file in job.target.glob("shard-*.json")] == ["shard-00000.json"]
    monkeypatch.setattr(Folder, "read", real)
    manifest, _ = run(job)
    assert (manifest.count, manifest.unreadable) == (COUNT, [])


def test_a_source_without_a_readable_image_makes_no_set(job: PrepareOptions, tmp_path: Path) -> None:
    source = make_images(tmp_path / "some", 4, SIZE)
    for file in source.rglob("*.*g"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image could be read; the first: .*img0000"):
        run(replace(job, source=source))
    assert not (job.target / MANIFEST).exists()


def test_a_finished_set_is_left_alone_and_other_arguments_are_refused(job: PrepareOptions) -> None:
    run(job)
    before = content(job.target)
    assert run(job) == (read_manifest(job.target), False)
    assert content(job.target) == before
    with pytest.raises(UserError, match="was begun with flip True, found False; use the same arguments"):
        run(replace(job, flip=False))
    with pytest.raises(UserError, match="was begun with source"):
        run(replace(job, source=make_images(job.target.parent / "others", 12, SIZE)))


def test_a_folder_with_other_files_is_refused(job: PrepareOptions) -> None:
    job.target.mkdir()
    (job.target / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(thesis.txt\)"):
        run(job)
    assert content(job.target).keys() <= {"thesis.txt", ".lock"}


def test_a_set_begun_on_another_device_is_refused(job: PrepareOptions) -> None:
    listed, plan = open_task(job), shard_writer.PLAN
    job.target.mkdir()
    begun = {**_plan(job, listed), "device": "cuda"}
    (job.target / plan).write_text(json.dumps(begun))
    (job.target / "shard-00000.json").write_text("{}")
    with pytest.raises(UserError, match="was begun with device 'cuda', found 'cpu'; use the same"):
        prepare(job, listed, lambda count: None)


@pytest.mark.parametrize("plan", [None, '{"goal": "graduate"}', "[1]", "not JSON"])
def test_a_folder_that_is_refused_keeps_every_file(job: PrepareOptions, plan: str | None) -> None:
    job.target.mkdir()
    for name in (".notes.tmp", "00000-labels.npy", "2024-results.npy"):
        (job.target / name).write_text("mine")
    if plan is not None:
        (job.target / "plan.json").write_text(plan)
    before = content(job.target)
    with pytest.raises(UserError, match="holds other files"):
        run(job)
    assert content(job.target) == before


def test_other_files_beside_a_set_of_ours_are_never_deleted(job: PrepareOptions) -> None:
    command = [sys.executable, "-c", KILLED, str(job.source), str(job.target), job.vae, "5"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    mine = {".notes.tmp": b"a", "2024-results.npy": b"b", "shard-notes.json": b"c"}
    for name, data in mine.items():
        (job.target / name).write_bytes(data)
    run(replace(job, shards=2))
    run(replace(job, shards=2))
    assert mine.items() <= content(job.target).items()
    assert verify(job.target)[1] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 30}, "--size wants a multiple of 8 for this autoencoder, got 30; for example --size 32"),
        ({"shards": 61}, r"--shards wants 1..60 for 60 images, got 61"),
        ({"precision": "fp8"}, "--precision wants fp32 or bf16"),
        ({"vae": "sd-vae-ft-ema"}, "hf download stabilityai/sd-vae-ft-ema --local-dir sd-vae-ft-ema"),
        (
            {"vae": "/nowhere"},
            "expected an autoencoder .* in /nowhere, found none; for example: `hf download",
        ),
    ],
)
def test_wrong_arguments_are_told_before_anything_is_written(
    job: PrepareOptions,
    changes: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=message) as caught:
        run(replace(job, **changes))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (job.target / MANIFEST).exists()


def test_an_autoencoder_that_is_damaged_or_another_class_is_told(vae: Path, tmp_path: Path) -> None:
    config = json.loads((vae / "config.json").read_text())
    weights = (vae / "diffusion_pytorch_model.safetensors").read_bytes()
    for name, change in (("cut", {}), ("other", {"_class_name": "VQModel"})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | change))
        (tmp_path / name / "diffusion_pytorch_model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(UserError, match="does not load"):
        make_encoder(str(tmp_path / "cut"), SIZE, False, "fp32", torch.device("cpu"))(
            np.zeros((1, 3, SIZE, SIZE), np.uint8)
        )
    with pytest.raises(UserError, match="expected diffusers' AutoencoderKL"):
        find_vae(str(tmp_path / "other"))


def test_a_folder_goes_before_the_published_name(
    tmp_path: Path, vae: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd-vae-ft-ema").symlink_to(vae)
    find_vae.cache_clear()
    found = find_vae("sd-vae-ft-ema")
    find_vae.cache_clear()
    assert (found.name, found.folder) == (str(vae), vae)


def damage(folder: Path, how: str) -> str:
    """Spoil one file of a set; returns what must be told."""
    file = folder / "00001-moments.npy"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return "00001-moments.npy is truncated or changed"
    if how == "flipped byte":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        return "00001-moments.npy: expected sha256"
    if how == "missing":
        file.unlink()
        return "00001-moments.npy is missing"
    text = (folder / MANIFEST).read_text()
    if how == "manifest":
        (folder / MANIFEST).write_text(text.replace('"scale": 0.18215', '"scale": 0.13025'))
        return "manifest.json was changed after it was written"
    if how == "schema":
        (folder / MANIFEST).write_text(text.replace('"schema": 1', '"schema": 99'))
        return "expected stbench-latents of schema 1, found stbench-latents 99"
    (folder / MANIFEST).write_text(text[:200])
    return "manifest.json is damaged"


def test_names_that_are_no_text_and_a_manifest_that_is_no_object(job: PrepareOptions, tmp_path: Path) -> None:
    source = make_images(tmp_path / "some", 12, SIZE)
    os.rename(source / "class0" / "img00000.jpg", os.fsencode(source / "class0") + b"/caf\xe9.jpg")
    (source / "class1" / "img00001.png").write_bytes(b"no image")
    data_commands.prepare(replace(job, source=source, vae="none"))
    assert b"class0/caf\xe9.jpg" in column(job.target, "ids").tolist()
    (job.target / MANIFEST).write_text("[1, 2]")
    with pytest.raises(UserError, match="is damaged .*no object"):
        read_manifest(job.target)


@pytest.mark.parametrize(
    "how", ["truncated", "flipped byte", "missing", "manifest", "schema", "cut manifest"]
)
def test_verify_finds_what_is_wrong_and_names_it(
    job: PrepareOptions, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(job)
    data_commands.verify(job.target)
    assert f"{COUNT} images, 15 files, all as written" in capsys.readouterr().out
    expected = damage(job.target, how)
    with pytest.raises(UserError) as caught:
        data_commands.verify(job.target)
    assert expected in f"{capsys.readouterr().err}{caught.value}"
    assert "\n" not in str(caught.value)


def test_verify_names_every_file_that_is_wrong(
    job: PrepareOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    run(job)
    first, second = sorted(job.target.glob("*-moments.npy"))[:2]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(UserError, match="2 files are not as written; copy them again"):
        data_commands.verify(job.target)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and first.name in told[0] and second.name in told[1]


def test_two_sets_with_the_same_unreadable_file_are_the_same(
    job: PrepareOptions, images: Path, tmp_path: Path
) -> None:
    source = make_images(tmp_path / "some", 12, SIZE)
    (source / "class1" / "img00001.png").write_bytes(b"no image")
    targets = tmp_path / "a", tmp_path / "b"
    for target in targets:
        run(replace(job, source=source, target=target))
    assert content(targets[0]) == content(targets[1])
    assert list(read_manifest(targets[0]).unreadable) == [
        ("class1/img00001.png", "no image that Pillow knows")
    ]


def test_another_class_map_is_told_in_words(job: PrepareOptions, images: Path, tmp_path: Path) -> None:
    run(job)
    (tmp_path / "map.json").write_text(json.dumps({f"class{k}": (k + 1) % 10 for k in range(10)}))
    with pytest.raises(UserError, match="was begun with other images, or other classes of them"):
        run(replace(job, classes=tmp_path / "map.json"))


def test_a_limit_on_the_size_of_a_file_is_a_full_disk(job: PrepareOptions) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    listed = open_task(job)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*\.npy: File too large; free some space"):
            prepare(job, listed, lambda count: None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert run(job)[0].count == COUNT


def test_a_wrong_hash_in_the_manifest_is_found(job: PrepareOptions) -> None:
    run(job)
    manifest = read_manifest(job.target)
    files = manifest.shards[0].files
    wrong = {**files, "labels": replace(files["labels"], sha256="0" * 64)}
    shards = (replace(manifest.shards[0], files=wrong), *manifest.shards[1:])
    (job.target / MANIFEST).write_text(shard_writer.dump_manifest(replace(manifest, shards=shards)))
    (problem,) = verify(job.target)[1]
    assert "00000-labels.npy: expected sha256 000000000000" in problem


def test_before_a_shard_is_finished_other_arguments_may_be_tried(job: PrepareOptions, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(job.source), str(job.target), job.vae, "5"]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert list(job.target.glob("*.npy")) and not list(job.target.glob("shard-*.json"))
    whole = replace(job, batch=4, shards=1)
    run(whole)
    assert verify(job.target)[1] == []
    run(replace(whole, target=tmp_path / "fresh"))
    assert content(job.target) == content(tmp_path / "fresh")


@pytest.mark.parametrize("nth", [1, 4, 9])
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    job: PrepareOptions, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [0], os.fsync

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device; free some space"):
        run(job)
    assert not (job.target / MANIFEST).exists()
    assert [file for file in job.target.iterdir() if file.name.endswith(".tmp")] == []
    monkeypatch.setattr(os, "fsync", real)
    run(job)
    assert verify(job.target)[1] == []


def test_a_disk_without_room_for_the_whole_set_is_told_first(
    job: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"not enough disk space in .*: about 0.1 MiB needed, 0.0 MiB free"):
        run(job)


KILLED = """
import os, signal, sys
from pathlib import Path
from stbench.data.prepare import PrepareOptions, open_task, prepare
real, calls = os.fsync, [0]
def fsync(handle):
    calls[0] += 1
    if calls[0] == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(handle)
os.fsync = fsync
images, target, vae = sys.argv[1:4]
job = PrepareOptions(Path(images), Path(target), vae, 32, flip=True, shards=3, batch=8, references=10)
prepare(job, open_task(job), lambda count: None)
"""


@pytest.mark.parametrize("nth", [15])
def test_killed_in_the_middle_it_goes_on_to_the_same_bytes(
    job: PrepareOptions, nth: int, tmp_path: Path
) -> None:
    whole = replace(job, target=tmp_path / "whole")
    run(whole)
    command = [sys.executable, "-c", KILLED, str(job.source), str(job.target), job.vae, str(nth)]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
    assert not (job.target / MANIFEST).exists()
    with pytest.raises(UserError, match=r"found no manifest.json .*finish it, with `stbench data prepare`"):
        read_manifest(job.target)
    run(job)
    assert content(job.target) == content(whole.target)


def test_two_commands_do_not_write_one_set(job: PrepareOptions) -> None:
    job.target.mkdir()
    with (
        lock_folder(job.target, ""),
        pytest.raises(UserError, match=f"is in use by process {os.getpid()}; wait for it"),
    ):
        run(job)


def test_shards_are_even_and_cover_everything() -> None:
    assert shard_bounds(10, 3) == [(0, 3), (3, 6), (6, 10)]
    assert len(shard_bounds(1_281_167, None)) == 129


def test_rows_of_any_shards_are_read_in_the_order_asked_for() -> None:
    arrays = [np.arange(a * 10, a * 10 + 2 * n).reshape(n, 2, 1) for a, n in ((0, 3), (9, 0), (1, 4))]
    shards = Shards(arrays)
    whole = np.concatenate(arrays)
    rows, view = np.array([6, 0, 2, 3, 6]), np.array([1, 0, 1, 0, 0])
    assert np.array_equal(shards.read(rows, view), whole[rows, view])
    assert shards.read(rows[:0], view[:0]).shape == (0, 1)
    assert np.array_equal(shards.read(rows[1:2], view[1:2]), whole[:1, 0])
