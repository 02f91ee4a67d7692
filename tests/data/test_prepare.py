"""`stbench data prepare`: what a prepared data set contains, and which arguments are refused."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from stbench.cli import data as data_commands
from stbench.core.errors import UserError
from stbench.data.crop import decode_image
from stbench.data.encode import make_row_encoder
from stbench.data.prepare import PrepareOptions, open_task, prepare
from stbench.data.shards import MANIFEST, read_manifest
from stbench.data.sources import ImageFolder
from stbench.data.split import HELDOUT, REFERENCE, TRAIN
from stbench.data.verify import verify
from stbench.models.autoencoder import Autoencoder, find_vae
from tests.data.conftest import COUNT, SIZE
from tests.datafiles import column, content, make_images, make_tar, run_prepare


def crop(options: PrepareOptions, name: bytes) -> np.ndarray:
    return decode_image((options.source / name.decode()).read_bytes(), 3, SIZE)


# --- Content ---


def test_moments_are_those_of_the_crops_and_of_their_mirror_images(finished: PrepareOptions) -> None:
    manifest = read_manifest(finished.target)
    assert (manifest.count, manifest.kind, manifest.shape, manifest.views) == (COUNT, "moments", (8, 4, 4), 2)
    ids, moments = column(finished.target, "ids"), column(finished.target, "moments")
    assert (moments.shape, moments.dtype) == ((COUNT, 2, 8, 4, 4), np.float16)
    network = find_vae(finished.vae).load()
    for row in (0, 17, COUNT - 1):
        image = crop(finished, ids[row])
        x = torch.from_numpy(np.stack([image, image[:, :, ::-1]])).float() / 127.5 - 1.0
        mean, std = network.encode(x)
        assert np.allclose(moments[row], torch.cat([mean, std], 1).numpy(), rtol=2e-3, atol=2e-4)
    assert column(finished.target, "labels").tolist() == [int(name.decode()[5]) for name in ids]


def test_pixels_of_held_out_and_reference_images_are_kept(finished: PrepareOptions) -> None:
    split, ids = column(finished.target, "split"), column(finished.target, "ids")
    assert [int((split == k).sum()) for k in (TRAIN, HELDOUT, REFERENCE)] == [47, 3, 10]
    kept = [crop(finished, name) for name in ids[split != TRAIN]]
    assert np.array_equal(column(finished.target, "images"), np.stack(kept))


def test_a_tar_gives_the_same_arrays(finished: PrepareOptions, tmp_path: Path) -> None:
    tar = make_tar(finished.source, tmp_path / "images.tar")
    run_prepare(replace(finished, source=tar, target=tmp_path / "packed"))
    one, two = content(finished.target), content(tmp_path / "packed")
    assert {k: v for k, v in one.items() if k != MANIFEST} == {k: v for k, v in two.items() if k != MANIFEST}
    fingerprints = {read_manifest(path).fingerprint() for path in (finished.target, tmp_path / "packed")}
    assert len(fingerprints) == 1


def test_pixels_are_stored_without_an_autoencoder(options: PrepareOptions) -> None:
    manifest, _ = run_prepare(replace(options, vae="none"))
    assert (manifest.kind, manifest.shape) == ("pixels", (3, SIZE, SIZE))
    assert (manifest.vae, manifest.scale) == ("", 1.0)
    expected = crop(options, column(options.target, "ids")[5])
    assert np.array_equal(column(options.target, "pixels")[5, 0], expected)


def test_bf16_moments_are_close_to_fp32_moments(finished: PrepareOptions, options: PrepareOptions) -> None:
    run_prepare(replace(options, precision="bf16"))
    exact, near = (column(one.target, "moments").astype(float) for one in (finished, options))
    assert 0 < np.abs(exact - near).mean() < 0.02 * np.abs(exact).mean()


def test_encoding_runs_in_fp32_and_restores_the_switches(vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, seen, moments = torch.backends.cudnn, [], Autoencoder.moments

    def watched(self: Autoencoder, images: torch.Tensor) -> torch.Tensor:
        seen.append((cudnn.enabled, cudnn.allow_tf32))
        return moments(self, images)

    monkeypatch.setattr(Autoencoder, "moments", watched)
    before = cudnn.enabled, cudnn.allow_tf32
    encoder = make_row_encoder(str(vae), SIZE, flip=False, precision="fp32", device=torch.device("cpu"))
    encoder(np.zeros((1, 3, SIZE, SIZE), np.uint8))
    assert seen == [(True, False)] and before == (cudnn.enabled, cudnn.allow_tf32)


# --- Images that cannot be read ---


def test_unreadable_images_are_listed_and_left_out(
    options: PrepareOptions, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_images(tmp_path / "some", 30, SIZE)
    good = (source / "class0" / "img00000.jpg").read_bytes()
    (source / "class0" / "img00000.jpg").write_bytes(good[: len(good) // 2])
    (source / "class1" / "img00001.png").write_bytes(b"no image")
    data_commands.prepare_images(replace(options, source=source, vae="none"))
    manifest = read_manifest(options.target)
    assert manifest.count == 28 == len(column(options.target, "pixels"))
    names = [name for name, _ in manifest.unreadable]
    assert names == ["class0/img00000.jpg", "class1/img00001.png"]
    assert not set(names) & {name.decode() for name in column(options.target, "ids")}
    printed = capsys.readouterr().err
    assert all(f"left out: {name}: " in printed for name in names)
    assert verify(options.target)[1] == []


def test_the_reason_for_an_unreadable_image_is_the_same_every_time(
    options: PrepareOptions, tmp_path: Path
) -> None:
    source = make_images(tmp_path / "some", 12, SIZE)
    (source / "class1" / "img00001.png").write_bytes(b"no image")
    targets = tmp_path / "a", tmp_path / "b"
    for target in targets:
        run_prepare(replace(options, source=source, target=target, vae="none"))
    assert content(targets[0]) == content(targets[1])
    expected = ("class1/img00001.png", "not an image that Pillow can read")
    assert read_manifest(targets[0]).unreadable == [expected]


def test_file_names_that_are_not_unicode_are_kept(options: PrepareOptions, tmp_path: Path) -> None:
    source = make_images(tmp_path / "some", 12, SIZE)
    os.rename(source / "class0" / "img00000.jpg", os.fsencode(source / "class0") + b"/caf\xe9.jpg")
    run_prepare(replace(options, source=source, vae="none"))
    assert b"class0/caf\xe9.jpg" in column(options.target, "ids").tolist()


def test_a_source_that_fails_midway_can_be_resumed(
    options: PrepareOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, vae="none")
    task, real = open_task(options), ImageFolder.read

    def read(source: ImageFolder, index: int) -> bytes:
        if index >= 30:
            raise OSError(errno.EIO, "Input/output error")
        return real(source, index)

    monkeypatch.setattr(ImageFolder, "read", read)
    with pytest.raises(UserError, match=r"cannot read .*Input/output error.*the same command") as caught:
        prepare(options, task, lambda count: None)
    assert "\n" not in str(caught.value)
    assert [file.name for file in options.target.glob("shard-*.json")] == ["shard-00000.json"]
    monkeypatch.setattr(ImageFolder, "read", real)
    manifest, _ = run_prepare(options)
    assert (manifest.count, manifest.unreadable) == (COUNT, [])


def test_a_source_without_a_readable_image_makes_no_data_set(options: PrepareOptions, tmp_path: Path) -> None:
    source = make_images(tmp_path / "some", 4, SIZE)
    for file in source.rglob("*.*g"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="no image could be read; the first: .*img0000"):
        run_prepare(replace(options, source=source))
    assert not (options.target / MANIFEST).exists()


# --- Arguments ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 30}, "--size must be a multiple of 8 for this autoencoder, got 30; for example --size 32"),
        ({"shards": 61}, r"--shards must be in 1..60 for 60 images, got 61"),
        ({"batch": 0}, "--batch must be at least 1, got 0"),
        ({"precision": "fp8"}, "--precision must be fp32 or bf16"),
        ({"vae": "sd-vae-ft-ema"}, "hf download stabilityai/sd-vae-ft-ema --local-dir sd-vae-ft-ema"),
        (
            {"vae": "/nowhere"},
            "expected an autoencoder .* in /nowhere, found none; .*`hf download",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_written(
    options: PrepareOptions,
    changes: dict[str, object],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=message) as caught:
        run_prepare(replace(options, **changes))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (options.target / MANIFEST).exists()


def test_a_finished_set_is_not_written_again(copied: PrepareOptions) -> None:
    before = content(copied.target)
    assert run_prepare(copied) == (read_manifest(copied.target), False)
    assert content(copied.target) == before


def test_other_arguments_for_a_finished_set_are_refused(copied: PrepareOptions, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="was started with flip True, found False; use the same arguments"):
        run_prepare(replace(copied, flip=False))
    with pytest.raises(UserError, match="was started with source"):
        run_prepare(replace(copied, source=make_images(tmp_path / "others", 12, SIZE)))
    (tmp_path / "map.json").write_text(json.dumps({f"class{k}": (k + 1) % 10 for k in range(10)}))
    with pytest.raises(UserError, match="was started with other images or other classes"):
        run_prepare(replace(copied, classes=tmp_path / "map.json"))
