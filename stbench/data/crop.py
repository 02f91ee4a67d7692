"""Decode image files to square uint8 arrays with ADM's centre crop.

Does not know labels, autoencoders or where the bytes come from.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from stbench.core.errors import UserError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Lower-case suffixes of the files that are read as images."""

MODES = {1: "L", 3: "RGB"}
"""Number of channels -> Pillow mode."""

MAX_PIXELS = 178_956_970
"""Largest image in pixels, before and after resizing: Pillow's limit for a decompression bomb."""


class UnreadableImage(ValueError):
    """An image that is left out: damaged, too large, of more than 8 bits, or not an image."""


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of an image at `size` x `size` pixels, cropped as ADM crops ImageNet.

    The image is halved with a box filter while its shorter side is at least twice `size`, resized with
    bicubic interpolation until the shorter side is `size`, and cropped in the centre
    (openai/guided-diffusion, image_datasets.py).
    """
    _require_small(image, size)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _require_small(image: Image.Image, size: int) -> None:
    """Raise ValueError for an image so narrow that it takes gigabytes when its shorter side is `size`."""
    width, height = image.size
    shorter, longer = min(image.size), max(image.size)
    if shorter < size and round(longer * size / max(shorter, 1)) * size > MAX_PIXELS:
        raise ValueError(f"{width}x{height} is too narrow to be resized to {size} pixels")


def decode_image(content: bytes, channels: int, size: int | None) -> np.ndarray:
    """Decode an image file to uint8 (c,size,size), centre-cropped; to (c,H,W) if `size` is None.

    The first frame of an animation is taken, and transparency is dropped, as ADM does. Raises UnreadableImage
    for bytes that are damaged or not an image, for more than 8 bits per channel, and for images that are too
    large.
    """
    try:
        _require_checksums(content)
        with Image.open(io.BytesIO(content)) as opened:
            if opened.mode.startswith(("I", "F")):  # Pillow would clip them to white
                raise ValueError(f"expected 8 bits per channel, found mode {opened.mode}")
            image = opened.convert(MODES[channels])
        if size is not None:
            image = centre_crop(image, size)
        array = np.asarray(image, np.uint8).reshape(image.height, image.width, channels)
        return array.transpose(2, 0, 1).copy()
    except Exception as error:  # the decoders of Pillow's many formats raise anything
        raise UnreadableImage(reason(error)) from error


def _require_checksums(content: bytes) -> None:
    """Raise an exception for a PNG with a wrong checksum, which Pillow ignores when it decodes pixels."""
    if content.startswith(b"\x89PNG"):
        with Image.open(io.BytesIO(content)) as opened:
            opened.verify()


def reason(error: BaseException) -> str:
    """Return why a file could not be read, in one line that is the same every time."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's message contains a memory address
        return "not an image that Pillow can read"
    return " ".join(str(error).split()) or type(error).__name__


def require_same_size(images: Sequence[np.ndarray], names: Sequence[str], remedy: str) -> None:
    """Raise a UserError unless all images (c,H,W) have the same size. The message ends with `remedy`."""
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            found = [f"{n} is {a.shape[2]}x{a.shape[1]}" for n, a in ((names[0], images[0]), (name, image))]
            raise UserError(f"expected images of one size, found {', '.join(found)}; {remedy}")
