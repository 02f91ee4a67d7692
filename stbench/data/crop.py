"""Image files to square uint8 arrays: ADM's centre crop, and the reasons why a file cannot be read.

Knows nothing of labels, autoencoders or where the bytes come from.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from stbench.core.errors import UserError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})
"""Files that are taken for images, by lower-case suffix."""

MODES = {1: "L", 3: "RGB"}
"""Channels -> Pillow's mode."""

UNREADABLE = (
    UnidentifiedImageError,
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
)
"""What Pillow raises for content that is cut off or no image; reading comes before."""


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The central square of an image at `size` x `size` pixels, as ADM crops ImageNet.

    Halved by box filter while the shorter side is at least twice `size`, brought to `size` on the shorter
    side by bicubic resampling, cut in the middle (openai/guided-diffusion, image_datasets.py).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode_image(content: bytes, channels: int, size: int | None) -> np.ndarray:
    """An encoded image as uint8 (c,size,size), centre-cropped; uncropped (c,H,W) for no size.

    Raises one of UNREADABLE for content that is damaged or no image.
    """
    with Image.open(io.BytesIO(content)) as opened:
        if opened.mode.startswith(("I", "F")):  # Pillow's conversion would clip them to white
            raise ValueError(f"expected 8 bits a channel, found mode {opened.mode}")
        image = opened.convert(MODES[channels])
    if size is not None:
        image = centre_crop(image, size)
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels).transpose(2, 0, 1).copy()


def reason(error: BaseException) -> str:
    """Why a file could not be read, in one line, the same every time."""
    if isinstance(error, UnidentifiedImageError):  # Pillow's own words hold an address in memory
        return "no image that Pillow knows"
    return " ".join(str(error).split()) or type(error).__name__


def same_size(images: Sequence[np.ndarray], names: Sequence[str], remedy: str) -> None:
    """Raise a UserError that names two images (c,H,W) of different size; `remedy` says what to type."""
    for image, name in zip(images, names, strict=True):
        if image.shape != images[0].shape:
            found = [f"{n} is {a.shape[2]}x{a.shape[1]}" for n, a in ((names[0], images[0]), (name, image))]
            raise UserError(f"expected images of one size, found {', '.join(found)}; {remedy}")
