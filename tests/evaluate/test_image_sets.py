"""Image sets from ADM files, folders and prepared data sets, and one-line errors for damaged ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stbench.core.errors import UserError
from stbench.data.dataset import get_dataset
from stbench.data.prepare import PrepareOptions, open_task, prepare
from stbench.data.spec import DataSpec
from stbench.evaluate.image_sets import ImageSet, open_images
from tests.datafiles import make_images, write_images


def pixels(count: int = 7, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, (count, height, width, 3)).astype(np.uint8)


def read(images: ImageSet, batch: int = 3) -> np.ndarray:
    return torch.cat(list(images.batches(batch))).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("compressed", [False, True])
def test_an_adm_file_is_read_in_order(tmp_path: Path, compressed: bool) -> None:
    """ADM writes positional arrays with numpy.savez: arr_0 images, arr_1 labels."""
    images = pixels()
    write = np.savez_compressed if compressed else np.savez
    write(tmp_path / "a.npz", images, np.arange(7))
    found = open_images(tmp_path / "a.npz")
    assert (len(found), found.size) == (7, (6, 8))
    assert np.array_equal(read(found), images) and np.array_equal(read(found, 100), images)
    assert [len(part) for part in found.batches(3)] == [3, 3, 1]


def test_a_folder_is_read_sorted_by_path_and_converted_to_rgb(tmp_path: Path) -> None:
    images = pixels()
    place = write_images(tmp_path / "x" / "class0", images)
    Image.fromarray(images[0, :, :, 0]).save(tmp_path / "x" / "grey.PNG")
    (tmp_path / "x" / "notes.txt").write_text("no image")
    found = open_images(tmp_path / "x")
    assert len(found) == 8 and np.array_equal(read(found)[:7], images)
    assert np.array_equal(read(found)[7], np.repeat(images[0, :, :, :1], 3, 2))
    assert np.array_equal(read(open_images(place)), images)


def test_other_files_in_a_folder_are_counted(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(1)[0])
    for name in ("a.png", "b.tif", "c.GIF"):
        image.save(tmp_path / name)
    for name in ("notes.txt", "more.txt", "README", "settings.json"):
        (tmp_path / name).touch()
    found = open_images(tmp_path)
    assert (len(found), dict(found.ignored)) == (3, {".txt": 2, "README": 1})


def test_a_folder_of_mixed_sizes_is_only_cropped_on_request(tmp_path: Path) -> None:
    place = write_images(tmp_path, pixels(2, 20, 30))
    Image.fromarray(pixels(1, 33, 21)[0]).save(place / "z.png")
    with pytest.raises(UserError, match=r"images of one size, found 0000.png of 30x20 and .*z.png of 21x33"):
        read(open_images(place))
    assert read(open_images(place, 16)).shape == (3, 16, 16, 3)


WRONG = {
    "float": ({"arr_0": pixels().astype(np.float32)}, "found arr_0 float32 (7, 6, 8, 3)"),
    "channels first": ({"arr_0": pixels().transpose(0, 3, 1, 2)}, "found arr_0 uint8 (7, 3, 6, 8)"),
    "one image": ({"arr_0": pixels()[0]}, "found arr_0 uint8 (6, 8, 3)"),
    "grey": ({"arr_0": pixels()[..., :1]}, "found arr_0 uint8 (7, 6, 8, 1)"),
    "none": ({"arr_0": pixels()[:0]}, "found arr_0 uint8 (0, 6, 8, 3)"),
    "Fortran order": ({"arr_0": np.asfortranarray(pixels())}, "found Fortran order"),
    "no arr_0": ({"images": pixels()}, "found images; save it with arr_0=images"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_npz_of_another_kind_is_one_line(tmp_path: Path, name: str) -> None:
    arrays, message = WRONG[name]
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError) as caught:
        open_images(tmp_path / "a.npz")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_damage_inside_compressed_arrays_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez_compressed(file, pixels(200))
    whole = file.read_bytes()
    for start in range(200, len(whole) - 300, 97):  # zlib finds some of it, the checksum the rest
        inverted = bytes(byte ^ 255 for byte in whole[start : start + 40])
        file.write_bytes(whole[:start] + inverted + whole[start + 40 :])
        with pytest.raises(UserError, match="is truncated, damaged or not an npz file"):
            read(open_images(file))


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_a_damaged_npz_is_one_line(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, pixels(200))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"cut": content[:-60], "flipped": content, "text": b"hello"}[damage])
    with pytest.raises(UserError, match=r"a.npz is truncated, damaged or not an npz file .*; make it again"):
        read(open_images(file))


def test_missing_and_empty_paths_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.npz not found; expected an npz"):
        open_images(tmp_path / "gone.npz")
    with pytest.raises(UserError, match="contains no images; expected files that end in .bmp, .gif, .jpeg"):
        open_images(tmp_path)
    np.savez(tmp_path / "a.npz", pixels())
    with pytest.raises(UserError, match="--size crops a folder of images, found .*; drop --size"):
        open_images(tmp_path / "a.npz", 16)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_an_unreadable_image_is_named(tmp_path: Path, suffix: str) -> None:
    place = write_images(tmp_path, pixels(5, 40, 40), suffix)
    broken = place / f"0003{suffix}"
    broken.write_bytes(broken.read_bytes()[:-300])
    with pytest.raises(UserError, match=rf"cannot read image .*0003{suffix} .*; delete or replace it"):
        read(open_images(place))
    broken.write_text("no image")
    with pytest.raises(UserError, match=rf"cannot read image .*0003{suffix}"):
        read(open_images(place))


def test_an_oversized_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_images(tmp_path / "big", pixels(1))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UserError, match="cannot read image .*big.* exceeds limit"):
        open_images(place)


def test_sixteen_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match="expected 8 bits per channel, found mode I"):
        open_images(tmp_path)


def test_a_prepared_data_set_provides_its_reference_images(tmp_path: Path) -> None:
    make_images(tmp_path / "images", 60, 32)
    job = PrepareOptions(tmp_path / "images", tmp_path / "set", "none", 32, shards=2, batch=8, references=20)
    prepare(job, open_task(job), lambda count: None)
    found = open_images(tmp_path / "set")
    kept = get_dataset("custom", DataSpec(path=str(tmp_path / "set"))).train_images()
    assert len(found) == 20 and found.size == (32, 32)
    assert np.array_equal(read(found), kept.permute(0, 2, 3, 1).numpy())


def test_a_prepared_data_set_without_reference_images_is_one_line(tmp_path: Path) -> None:
    make_images(tmp_path / "images", 30, 32)
    job = PrepareOptions(tmp_path / "images", tmp_path / "set", "none", 32, shards=1, batch=8, references=0)
    prepare(job, open_task(job), lambda count: None)
    with pytest.raises(UserError, match="has no reference images; prepare it again with --references"):
        open_images(tmp_path / "set")
