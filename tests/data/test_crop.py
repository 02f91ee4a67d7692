"""Cropping as ADM does, and decoding of image files."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from stbench.data.crop import UnreadableImage, centre_crop, decode_image
from tests.datafiles import picture


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format)
    return buffer.getvalue()


def test_an_image_of_the_right_size_is_unchanged() -> None:
    image = picture(3, 48, 48)
    assert np.array_equal(np.asarray(centre_crop(image, 48)), np.asarray(image))


def test_the_longer_side_is_cropped_in_the_centre() -> None:
    image = picture(3, 70, 48)
    assert np.array_equal(np.asarray(centre_crop(image, 48)), np.asarray(image)[:, 11:59])


def test_an_image_of_twice_the_size_is_averaged_over_two_by_two_pixels() -> None:
    image = picture(4, 96, 96)
    blocks = np.asarray(image, float).reshape(48, 2, 48, 2, 3).mean((1, 3))
    assert np.abs(np.asarray(centre_crop(image, 48), float) - blocks).max() <= 1.0  # rounded twice


def test_larger_images_are_halved_then_resized_with_bicubic_interpolation() -> None:
    image = picture(5, 300, 210)  # 300x210 -> 150x105 -> 75x52; 37x26 would be smaller than 48
    expected = image.resize((150, 105), Image.Resampling.BOX).resize((75, 52), Image.Resampling.BOX)
    expected = expected.resize((round(75 * 48 / 52), 48), Image.Resampling.BICUBIC)
    left = (expected.width - 48) // 2
    assert np.array_equal(np.asarray(centre_crop(image, 48)), np.asarray(expected)[:, left : left + 48])


def test_small_images_are_enlarged_and_grey_ones_converted() -> None:
    content = encoded(picture(1, 20, 30).convert("L"))
    found = decode_image(content, 3, 32)
    assert (found.shape, found.dtype) == ((3, 32, 32), np.uint8)
    assert np.array_equal(found[0], found[2])
    assert decode_image(content, 1, 32).shape == (1, 32, 32)
    assert decode_image(content, 3, None).shape == (3, 30, 20)


@pytest.mark.parametrize("content", [b"", b"no image", encoded(picture(1, 64, 64), "JPEG")[:900]])
def test_damaged_files_raise_one_of_the_listed_errors(content: bytes) -> None:
    with pytest.raises(UnreadableImage):
        decode_image(content, 3, 32)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_more_than_eight_bits_are_refused(dtype: type) -> None:
    deep = Image.fromarray(np.full((8, 8), 300, dtype))
    with pytest.raises(ValueError, match="expected 8 bits per channel, found mode [IF]"):
        decode_image(encoded(deep, "TIFF"), 3, 8)
