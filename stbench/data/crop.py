"""Decode image files to square uint8 arrays with ADM's centre crop.

Does not know labels, autoencoders or where the bytes come from.
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
"""Lower-case suffixes of the files that are read as images."""

MODES = {1: "L", 3: "RGB"}
"""Number of channels -> Pillow mode."""

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
"""What Pillow raises for bytes that are truncated or not an image."""


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the central square of an image at `size` x `size` pixels, cropped as ADM crops ImageNet.

    The image is halved with a box filter while its shorter side is at least twice `size`, resized with
    bicubic interpolation until the shorter side is `size`, and cropped in the centre
    (openai/guided-diffusion, image_datasets.py).
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    target = (round(image.width * scale), round(image.height * scale))
    image = image.resize(target, Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode_image(content: bytes, channels: int, size: int | None) -> np.ndarray:
    """Decode an image file to uint8 (c,size,size), centre-cropped; to (c,H,W) if `size` is None.

    Raises one of UNREADABLE for bytes that are damaged or not an image.
    """
    with Image.open(io.BytesIO(content)) as opened:
        if opened.mode.startswith(("I", "F")):  # Pillow would clip them to white
            raise ValueError(f"expected 8 bits per channel, found mode {opened.mode}")
        image = opened.convert(MODES[channels])
    if size is not None:
        image = centre_crop(image, size)
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels).transpose(2, 0, 1).copy()


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
