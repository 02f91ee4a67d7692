"""REPA's layout: reading, converting, and refusing folders that are damaged or inconsistent."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from stbench.cli import data as data_commands
from stbench.core.errors import UserError
from stbench.data.open import open_data
from stbench.data.repa_layout import RepaFolder, find_decoder, is_repa
from stbench.data.shards import read_manifest
from stbench.data.sources import open_source
from stbench.data.spec import DataSpec
from stbench.data.split import TRAIN
from stbench.data.verify import verify
from tests.datafiles import column, make_images, make_repa, picture

COUNT = 45


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    return make_repa(tmp_path / "repa", COUNT)


def test_rows_are_in_the_order_of_the_sorted_names(folder: Path) -> None:
    repa = RepaFolder(folder)
    assert repa.ids == sorted(repa.ids)
    assert repa.labels.tolist() == [k % 10 for k in range(COUNT)]
    stored = np.load(folder / "vae-sd" / repa.ids[7])
    assert np.array_equal(repa.moments(7), stored.astype(np.float16))


def test_import_writes_the_same_moments_labels_and_pixels(folder: Path, vae: Path, tmp_path: Path) -> None:
    data_commands.import_repa(folder, tmp_path / "set", str(vae), second="std", shards=4, references=20)
    manifest, repa = read_manifest(tmp_path / "set"), RepaFolder(folder)
    assert verify(tmp_path / "set")[1] == []
    assert (manifest.count, manifest.views, manifest.flip, len(manifest.shards)) == (COUNT, 1, False, 4)
    assert (manifest.scale, len(manifest.classes), manifest.vae) == (0.18215, 10, str(vae))
    assert np.array_equal(column(tmp_path / "set", "moments")[:, 0], [repa.moments(k) for k in range(COUNT)])
    assert column(tmp_path / "set", "labels").tolist() == repa.labels.tolist()
    split = column(tmp_path / "set", "split")
    expected = [np.asarray(picture(k, 64, 64)).transpose(2, 0, 1) for k in np.flatnonzero(split != TRAIN)]
    assert np.array_equal(column(tmp_path / "set", "images"), expected)


def test_a_published_autoencoder_may_be_missing(folder: Path, tmp_path: Path) -> None:
    decoder = find_decoder(RepaFolder(folder), "sd-vae-ft-mse")
    assert (decoder.scale, decoder.shift, decoder.image_shape) == (0.18215, 0.0, (3, 64, 64))


def test_log_variances_are_detected_and_converted(folder: Path, vae: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "logvar")
    for file in (tmp_path / "logvar" / "vae-sd").rglob("*.npy"):
        mean, std = np.split(np.load(file), 2)
        np.save(file, np.concatenate([mean, 2 * np.log(std)]))
    with pytest.raises(UserError, match="these are log-variances; convert .* --second logvar"):
        RepaFolder(tmp_path / "logvar").moments(0)
    data_commands.import_repa(
        tmp_path / "logvar", tmp_path / "set", str(vae), second="logvar", shards=1, references=5
    )
    expected = np.stack([RepaFolder(folder).moments(k) for k in range(COUNT)])
    found = column(tmp_path / "set", "moments")[:, 0]
    assert np.allclose(found.astype(float), expected.astype(float), rtol=2e-3, atol=1e-6)


def spoil(folder: Path, how: str) -> None:
    """Damage a folder in REPA's layout in one way."""
    first = folder / "vae-sd/00000/img-mean-std-00000000.npy"
    second = folder / "vae-sd/00000/img-mean-std-00000001.npy"
    labels = folder / "vae-sd/dataset.json"
    if how == "mixed sizes":
        np.save(second, np.ones((8, 16, 16), np.float32))
    elif how == "cut off":
        second.write_bytes(second.read_bytes()[:300])
    elif how == "no moments":
        np.save(first, np.ones((3, 64, 64), np.float32))
    elif how == "infinite":
        np.save(second, np.full((8, 8, 8), 1e6, np.float32))
    elif how == "no label":
        rows = json.loads(labels.read_text())["labels"]
        labels.write_text(json.dumps({"labels": rows[:-1]}))
    elif how == "no list":
        labels.write_text('{"labels": 3}')
    elif how == "other image":
        for file in (folder / "images").rglob("*.png"):
            picture(1, 32, 32).save(file)
    elif how == "unreadable image":
        for file in (folder / "images").rglob("*.png"):
            file.write_bytes(b"no image")
    else:
        (folder / "images/00000/img00000003.png").unlink()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("mixed sizes", r"expected moments of one shape, found \(8, 8, 8\) in .* and \(8, 16, 16\) in"),
        ("cut off", r"img-mean-std-00000001.npy is truncated or not an .npy file"),
        ("no moments", r"expected moments \(2C,h,h\), found float32 \(3, 64, 64\)"),
        ("infinite", "not finite or overflow float16"),
        ("no label", r"has no label for 00000/img-mean-std-00000000.npy \(1 missing\)"),
        ("no list", 'expected {"labels"'),
        ("other image", r"expected images of one size, found a decoded latent is 64x64, .* is 32x32"),
        ("unreadable image", "cannot read .*; copy it again"),
        ("missing image", "expected 45 images under .*, one per moment file, found 44"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(
    folder: Path, vae: Path, how: str, message: str, tmp_path: Path
) -> None:
    spoil(folder, how)
    with pytest.raises(UserError, match=message) as caught:
        data_commands.import_repa(folder, tmp_path / "set", str(vae), second="std", shards=2, references=10)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_other_folders_are_not_imported(tmp_path: Path, vae: Path) -> None:
    images = make_images(tmp_path / "images", 10)
    assert not is_repa(images)
    with pytest.raises(UserError, match="expected REPA's layout .*encode images with `stbench data"):
        data_commands.import_repa(
            images, tmp_path / "set", str(vae), second="std", shards=None, references=10
        )


@pytest.mark.parametrize("cut", [False, True])
def test_an_archive_named_npy_is_refused(folder: Path, cut: bool) -> None:
    repa = RepaFolder(folder)
    path = folder / "vae-sd" / repa.ids[3]
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    path.write_bytes(path.with_suffix(".npz").read_bytes()[: 50 if cut else None])
    with pytest.raises(UserError, match="is truncated or not an .npy file") as caught:
        repa.moments(3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("vae-sd/00001/img-mean-std-00000023.npy", r"00001/img-mean-std-00000023.npy is missing \(1 of 45"),
        ("images/00001/img00000023.png", "found 44; no image for 00001/img-mean-std-00000023.npy"),
        ("vae-sd/dataset.json", r"vae-sd/dataset.json with the labels is missing; copy it too"),
    ],
)
def test_a_missing_file_is_named(folder: Path, vae: Path, missing: str, message: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(UserError, match=message):
        found = open_data(DataSpec(path=str(folder), vae=str(vae)))
        found.pixels(np.arange(3))


def test_a_missing_image_is_not_replaced_by_that_of_another_moment_file(folder: Path, vae: Path) -> None:
    """The numbers agree, but every image between the two gaps would belong to its neighbour."""
    (folder / "images/00000/img00000003.png").rename(folder / "images/00000/img00000099.png")
    with pytest.raises(UserError, match=r"no image for 00000/img-mean-std-00000003.npy; no moments for"):
        open_data(DataSpec(path=str(folder), vae=str(vae))).pixels(np.arange(3))


@pytest.mark.parametrize("part", ["images", "vae-sd", "."])
def test_a_part_of_the_folder_is_not_read_as_images(folder: Path, part: str) -> None:
    with pytest.raises(UserError, match=r"REPA's layout; (give the whole folder, .*repa$|convert it with)"):
        open_source(folder / part)


def test_a_file_that_changed_after_its_first_use_is_named(folder: Path, vae: Path) -> None:
    data = DataSpec(path=str(folder), vae=str(vae))
    open_data(data)
    file = folder / "vae-sd/00001/img-mean-std-00000023.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="img-mean-std-00000023.npy has changed since its first use"):
        open_data(data)
