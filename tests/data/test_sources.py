"""Cropping images as ADM does, and listing them from folders, tars and saved datasets."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stbench.core.errors import UserError
from stbench.data.crop import UNREADABLE, centre_crop, decode_image
from stbench.data.sources import _checked, open_source
from tests.datafiles import make_images, make_tar, picture


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def test_a_picture_of_the_right_size_stays_as_it_is() -> None:
    image = picture(3, 48, 48)
    assert np.array_equal(np.asarray(centre_crop(image, 48)), np.asarray(image))


def test_the_middle_of_the_longer_side_is_kept() -> None:
    image = picture(3, 70, 48)
    assert np.array_equal(np.asarray(centre_crop(image, 48)), np.asarray(image)[:, 11:59])


def test_twice_the_size_is_averaged_over_two_by_two_pixels() -> None:
    image = picture(4, 96, 96)
    blocks = np.asarray(image, float).reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(centre_crop(image, 48), float) - blocks).max() <= 1.0  # rounded twice


def test_halved_until_below_twice_the_size_then_bicubic() -> None:
    image = picture(5, 300, 210)  # 300x210 -> 150x105 -> 75x52 would be too small for 48: stays 75x52
    expected = image.resize((150, 105), Image.Resampling.BOX).resize((75, 52), Image.Resampling.BOX)
    expected = expected.resize((round(75 * 48 / 52), 48), Image.Resampling.BICUBIC)
    left = (expected.width - 48) // 2
    assert np.array_equal(np.asarray(centre_crop(image, 48)), np.asarray(expected)[:, left : left + 48])


def test_small_pictures_are_enlarged_and_grey_ones_coloured() -> None:
    content = encoded(picture(1, 20, 30).convert("L"))
    found = decode_image(content, 3, 32)
    assert (found.shape, found.dtype) == ((3, 32, 32), np.uint8)
    assert np.array_equal(found[0], found[2])
    assert decode_image(content, 1, 32).shape == (1, 32, 32)


@pytest.mark.parametrize("content", [b"", b"no image", encoded(picture(1, 64, 64), "JPEG")[:900]])
def test_what_is_no_image_is_told(content: bytes) -> None:
    with pytest.raises(UNREADABLE):
        decode_image(content, 3, 32)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deeper_than_eight_bits_is_refused(dtype: type) -> None:
    deep = Image.fromarray(np.full((8, 8), 300, dtype))
    with pytest.raises(ValueError, match="expected 8 bits a channel, found mode [IF]"):
        decode_image(encoded(deep, "TIFF"), 3, 8)


def test_a_folder_and_a_tar_of_it_list_the_same(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 25)
    (folder / "class3" / "notes.txt").write_text("not an image")
    (folder / "README").write_text("nor this")
    plain, packed = open_source(folder), open_source(make_tar(folder, tmp_path / "images.tar"))
    assert list(plain.ids) == sorted(plain.ids) == list(packed.ids)
    assert list(plain.labels) == [int(name[5]) for name in plain.ids] == list(packed.labels)
    assert list(plain.classes) == [f"class{k}" for k in range(10)]
    assert plain.ignored == packed.ignored == {".txt": 1, "README": 1}
    assert [plain.read(k) for k in range(25)] == [packed.read(k) for k in range(25)]
    assert plain.digest() == packed.digest()


def test_a_folder_that_cannot_be_listed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = make_images(tmp_path / "images", 12), os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("class1"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="list the folder .*class1, found an error .Input/output error"):
        open_source(folder)


@pytest.mark.parametrize("how", ["cut between members", "damaged header"])
def test_a_tar_without_its_end_is_refused(how: str, tmp_path: Path) -> None:
    packed = make_tar(make_images(tmp_path / "images", 12), tmp_path / "images.tar")
    with tarfile.open(packed) as archive:
        place = [m for m in archive if m.isfile()][6].offset
    data = bytearray(packed.read_bytes())
    if how == "damaged header":
        data[place + 100] ^= 0xFF
    packed.write_bytes(data[:place] if how == "cut between members" else data)
    with pytest.raises(UserError, match="is cut off or damaged: expected 512 zero bytes at its end"):
        open_source(packed)


def test_links_in_a_tar_are_counted(tmp_path: Path) -> None:
    packed = make_tar(make_images(tmp_path / "images", 12), tmp_path / "images.tar")
    with tarfile.open(packed, "a") as archive:
        for name, kind in (("class0/a.png", tarfile.LNKTYPE), ("class0/b.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "class0/img00000.png"
            archive.addfile(link)
    assert open_source(packed).ignored == {"hard links": 1, "symbolic links": 1}


@pytest.mark.parametrize("name", ["map.json", "map.txt"])
def test_a_map_file_gives_labels_by_folder_or_by_name(name: str, tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 20)
    mapping = {f"class{k}": k // 5 for k in range(10)} | {"img00000.jpg": 1}
    text = json.dumps(mapping) if name.endswith("json") else "\n".join(f"{k} {v}" for k, v in mapping.items())
    (tmp_path / name).write_text(text)
    source = open_source(folder, tmp_path / name)
    labels = dict(zip(source.ids, source.labels, strict=True))
    assert (labels["class0/img00000.jpg"], labels["class0/img00010.jpg"], labels["class9/img00009.png"]) == (
        1,
        0,
        1,
    )
    assert list(source.classes) == ["0", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"class0": 0}', "no label for 'class1/"),
        ("{", "cannot be read"),
        ('{"class0": 0, "class1": 2}', "0..K-1 without a gap"),
    ],
)
def test_a_bad_map_file_is_told_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    make_images(tmp_path / "images", 20)
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_source(tmp_path / "images", tmp_path / "map.json")
    assert "\n" not in str(caught.value)


def test_sources_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        open_source(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected images"):
        open_source(tmp_path / "empty")
    picture(1, 8, 8).save(tmp_path / "empty" / "loose.png")
    with pytest.raises(UserError, match=r"'loose.png' in none; give a map file with --classes"):
        open_source(tmp_path / "empty")
    (tmp_path / "broken.tar").write_bytes(b"\x1f\x8b" + bytes(3000))
    with pytest.raises(UserError, match="uncompressed tar"):
        open_source(tmp_path / "broken.tar")


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_saved_dataset_without_the_package_is_told_in_one_line(tmp_path: Path) -> None:
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="wants the package datasets; pip install datasets"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("values", "classes", "found"),
    [
        ([0, -1, 1], 2, "0..2-1, found -1 in 1 rows"),
        ([0, None], 2, "None"),
        ([0, 2], 2, "found 2 in"),
        ([1, 2], None, "0..K-1, found no row of 0"),
        ([0.5], None, "found 0.5"),
    ],
)
def test_labels_of_a_saved_dataset_are_checked(values: list[Any], classes: int | None, found: str) -> None:
    with pytest.raises(UserError, match=f"labels in 'label' want to be .*{found}"):
        _checked(values, Path("saved"), "label", classes)
    assert _checked([1, 0], Path("saved"), "label", None) == [1, 0]


def test_a_damaged_saved_dataset_is_told_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="reads saved datasets with the package datasets")
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="does not load as a saved dataset") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_splits_are_told(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text("[]")
    with pytest.raises(UserError, match="expected ..splits"):
        open_source(tmp_path)


def test_a_saved_dataset_lists_its_rows(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="reads saved datasets with the package datasets")
    images = [picture(k, 16, 16) for k in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = datasets.Dataset.from_dict({"image": images, "label": [0, 1, 1, 0]}, features=features)
    rows.save_to_disk(str(tmp_path / "saved"))
    source = open_source(tmp_path / "saved")
    assert (list(source.labels), list(source.classes), len(source.ids)) == ([0, 1, 1, 0], ["a", "b"], 4)
    assert np.array_equal(decode_image(source.read(2), 3, 16), np.asarray(images[2]).transpose(2, 0, 1))
    others = datasets.Dataset.from_dict({"image": images[::-1], "label": [0, 1, 1, 0]}, features=features)
    others.save_to_disk(str(tmp_path / "others"))
    assert open_source(tmp_path / "saved").digest() == source.digest()
    assert open_source(tmp_path / "others").digest() != source.digest()
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(UserError, match=r"several splits \(train\)"):
        open_source(tmp_path / "splits")
