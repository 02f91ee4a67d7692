"""Image sources: directories, tars and saved Hugging Face datasets."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stbench.core.errors import UserError
from stbench.data.crop import decode_image
from stbench.data.sources import _check_labels, open_source
from tests.datafiles import make_images, make_tar, picture


def test_a_directory_and_a_tar_of_it_list_the_same_images(tmp_path: Path) -> None:
    folder = make_images(tmp_path / "images", 25, 8)
    (folder / "class3" / "notes.txt").write_text("not an image")
    (folder / "README").write_text("nor this")
    plain, packed = open_source(folder), open_source(make_tar(folder, tmp_path / "images.tar"))
    assert list(plain.ids) == sorted(plain.ids) == list(packed.ids)
    assert list(plain.labels) == [int(name[5]) for name in plain.ids] == list(packed.labels)
    assert list(plain.classes) == [f"class{k}" for k in range(10)]
    assert plain.ignored == packed.ignored == {".txt": 1, "README": 1}
    assert [plain.read(k) for k in range(25)] == [packed.read(k) for k in range(25)]
    assert plain.digest() == packed.digest()


def test_a_map_file_gives_the_labels(tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({f"class{k}": k // 5 for k in range(10)}))
    source = open_source(make_images(tmp_path / "images", 20, 8), tmp_path / "map.json")
    assert [int(name[5]) // 5 for name in source.ids] == list(source.labels)
    assert list(source.classes) == ["0", "1"]


def test_links_to_directories_are_followed(tmp_path: Path) -> None:
    make_images(tmp_path / "elsewhere", 10, 8)
    (tmp_path / "images").mkdir()
    for folder in (tmp_path / "elsewhere").iterdir():
        (tmp_path / "images" / folder.name).symlink_to(folder)
    assert len(open_source(tmp_path / "images").ids) == 10


def test_a_directory_that_cannot_be_listed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, real = make_images(tmp_path / "images", 12, 8), os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("class1"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match="cannot list the folder .*class1 .Input/output error"):
        open_source(folder)


@pytest.mark.parametrize("how", ["cut between members", "damaged header"])
def test_a_truncated_tar_is_refused(how: str, tmp_path: Path) -> None:
    packed = make_tar(make_images(tmp_path / "images", 12, 8), tmp_path / "images.tar")
    with tarfile.open(packed) as archive:
        place = [m for m in archive if m.isfile()][6].offset
    data = bytearray(packed.read_bytes())
    if how == "damaged header":
        data[place + 100] ^= 0xFF
    packed.write_bytes(data[:place] if how == "cut between members" else data)
    with pytest.raises(UserError, match="is truncated or damaged: expected 512 zero bytes at byte"):
        open_source(packed)


def test_links_in_a_tar_are_counted_as_ignored(tmp_path: Path) -> None:
    packed = make_tar(make_images(tmp_path / "images", 12, 8), tmp_path / "images.tar")
    with tarfile.open(packed, "a") as archive:
        for name, kind in (("class0/a.png", tarfile.LNKTYPE), ("class0/b.png", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "class0/img00000.png"
            archive.addfile(link)
    assert open_source(packed).ignored == {"hard links": 1, "symbolic links": 1}


def test_paths_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found nothing"):
        open_source(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="expected images in .*empty, found none of .bmp"):
        open_source(tmp_path / "empty")
    (tmp_path / "broken.tar").write_bytes(b"\x1f\x8b" + bytes(3000))
    with pytest.raises(UserError, match="expected an uncompressed tar of images"):
        open_source(tmp_path / "broken.tar")


# --- Saved Hugging Face datasets ---


@pytest.mark.skipif(importlib.util.find_spec("datasets") is not None, reason="datasets is installed")
def test_a_saved_dataset_requires_the_package_datasets(tmp_path: Path) -> None:
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="which the package datasets reads; pip install datasets"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("values", "classes", "found"),
    [
        ([0, -1, 1], 2, "0..2-1, found -1 in 1 rows"),
        ([0, None], 2, "None"),
        ([0, 2], 2, "found 2 in"),
        ([1, 2], None, "0..K-1, found no row with label 0"),
        ([0.5], None, "found 0.5"),
    ],
)
def test_labels_of_a_saved_dataset_are_checked(values: list[Any], classes: int | None, found: str) -> None:
    with pytest.raises(UserError, match=f"labels in 'label' must be .*{found}"):
        _check_labels(values, Path("saved"), "label", classes)
    assert _check_labels([1, 0], Path("saved"), "label", None) == [1, 0]


def test_a_damaged_saved_dataset_is_refused_in_one_line(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="reads saved datasets with the package datasets")
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{")
    with pytest.raises(UserError, match="does not load as a saved dataset") as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)


def test_several_splits_and_a_damaged_list_of_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"several splits \(train, test\); give one of them"):
        open_source(tmp_path)
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
