"""Odd, damaged and hostile pictures are decoded, or left out for a reason of one line."""

from __future__ import annotations

import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stbench.core.errors import UserError
from stbench.data.class_map import read_class_map
from stbench.data.crop import UnreadableImage, decode_image
from stbench.data.open import open_data
from stbench.data.prepare import PrepareOptions
from stbench.data.sources import open_source
from stbench.data.spec import DataSpec
from stbench.evaluate.image_sets import open_images
from tests.datafiles import make_images, picture, run_prepare

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SIZE = 16


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int = 8, colour: int = 0, rows: bytes | None = None) -> bytes:
    """A PNG file; without `rows` it promises more pixels than it contains."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"" if rows is None else rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


COLOUR = picture(3, 40, 30)
FRAMES = [picture(k, 40, 30) for k in range(3)]
GOOD: dict[str, Callable[[], bytes]] = {
    "animated gif": lambda: saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]),
    "animated webp": lambda: saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]),
    "animated png": lambda: saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]),
    "pages of tiff": lambda: saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]),
    "cmyk jpeg": lambda: saved(COLOUR.convert("CMYK"), "JPEG"),
    "cmyk tiff": lambda: saved(COLOUR.convert("CMYK"), "TIFF"),
    "ycbcr tiff": lambda: saved(COLOUR.convert("YCbCr"), "TIFF"),
    "grey": lambda: saved(COLOUR.convert("L"), "PNG"),
    "grey with alpha": lambda: saved(COLOUR.convert("LA"), "PNG"),
    "alpha": lambda: saved(COLOUR.convert("RGBA"), "PNG"),
    "palette": lambda: saved(COLOUR.convert("P"), "PNG"),
    "palette with transparency": lambda: saved(COLOUR.convert("P"), "PNG", transparency=b"\0\x80"),
    "two colours": lambda: saved(COLOUR.convert("1"), "PNG"),
    "progressive": lambda: saved(COLOUR, "JPEG", progressive=True),
    "orientation": lambda: saved(COLOUR, "JPEG", exif=Image.Exif()),
    "bmp": lambda: saved(COLOUR, "BMP"),
    "ppm": lambda: saved(COLOUR, "PPM"),
    "one pixel": lambda: saved(picture(0, 1, 1), "PNG"),
    "wide": lambda: saved(picture(0, 4000, 20), "PNG"),
    "text after the end": lambda: saved(COLOUR, "PNG") + b"hello",
    "odd names": lambda: saved(COLOUR, "PNG"),
}
BAD: dict[str, Callable[[], bytes]] = {
    "1 x 40,000,000": lambda: png(1, 40_000_000, rows=bytes(80_000_000)),
    "40,000,000 x 1": lambda: png(40_000_000, 1, rows=bytes(40_000_001)),
    "bomb": lambda: png(60_000, 60_000),
    "huge header": lambda: png(2**31 - 1, 2**31 - 1),
    "no pixels": lambda: png(0, 10),
    "no rows": lambda: png(10, 10),
    "text bomb": lambda: (
        png(4, 4)[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000))) + png(4, 4)[33:]
    ),
    "16 bits": lambda: saved(Image.fromarray(np.full((20, 20), 40_000, np.uint16)), "PNG"),
    "32 bits": lambda: saved(Image.fromarray(np.full((20, 20), 7, np.int32)), "TIFF"),
    "floats": lambda: saved(Image.fromarray(np.ones((20, 20), np.float32)), "TIFF"),
    "empty": lambda: b"",
    "text": lambda: b"not an image\n" * 100,
    "html": lambda: b"<!DOCTYPE html><html><body>404</body></html>",
    "zip": lambda: b"PK\x03\x04" + bytes(100),
    "half a jpeg": lambda: saved(COLOUR, "JPEG")[:400],
    "jpeg header": lambda: saved(COLOUR, "JPEG")[:20],
    "half a png": lambda: saved(COLOUR, "PNG")[:300],
    "half a gif": lambda: saved(COLOUR, "GIF")[:100],
    "half a webp": lambda: saved(COLOUR, "WEBP")[:100],
    "half a bmp": lambda: saved(COLOUR, "BMP")[:100],
    "half a tiff": lambda: saved(COLOUR, "TIFF")[:100],
    "zeros": lambda: bytes(1000),
    "ppm bomb": lambda: b"P6 100000 100000 255\n",
    "ppm of text": lambda: b"P6 a b c\n",
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("channels", [1, 3])
def test_odd_pictures_are_read(kind: str, channels: int) -> None:
    image = decode_image(GOOD[kind](), channels, SIZE)
    assert image.shape == (channels, SIZE, SIZE) and image.dtype == np.uint8


@pytest.mark.parametrize("kind", BAD)
def test_pictures_that_cannot_be_read_have_a_reason_of_one_line(kind: str) -> None:
    with pytest.raises(UnreadableImage) as caught:
        decode_image(BAD[kind](), 3, SIZE)
    reason = str(caught.value)
    assert 0 < len(reason) < 300 and "\n" not in reason and " at 0x" not in reason


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("seed", range(40))
def test_damaged_pictures_are_read_or_left_out(form: str, seed: int) -> None:
    draw, content = random.Random(f"{form}{seed}"), bytearray(saved(COLOUR, form))
    for _ in range(draw.choice([1, 1, 5, 50])):
        content[draw.randrange(len(content))] = draw.randrange(256)
    before = decode_image(saved(COLOUR, form), 3, SIZE)
    try:
        image = decode_image(bytes(content), 3, SIZE)
    except UnreadableImage as error:
        assert "\n" not in str(error)
        return
    assert image.shape == before.shape
    if form == "PNG":  # the only one of these formats with checksums
        assert np.array_equal(image, before)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures in ten classes, and in a class of their own everything odd above."""
    folder = make_images(tmp_path / "images", 20, 24)
    for kind, make in {**GOOD, **BAD}.items():
        if "bomb" not in kind and "40,000,000" not in kind:
            (folder / "class0" / f"{kind.replace(' ', '-')}.png").write_bytes(make())
    return folder


def test_one_odd_picture_does_not_end_prepare(folder: Path, tmp_path: Path) -> None:
    (folder / "class0" / "narrow.png").write_bytes(BAD["1 x 40,000,000"]())
    manifest, _ = run_prepare(PrepareOptions(folder, tmp_path / "set", "none", SIZE))
    names = {name for name, _ in manifest.unreadable}
    assert "class0/narrow.png" in names and "class0/16-bits.png" in names
    assert manifest.count == 20 + len(GOOD)
    assert open_data(DataSpec(path=str(tmp_path / "set"))).classes == 10


@pytest.mark.parametrize("kind", ["loop", "self", "broken", "pipe", "folder", "parent", "mutual"])
def test_links_pipes_and_folders_are_left_out(tmp_path: Path, kind: str) -> None:
    folder = make_images(tmp_path / "images", 20, SIZE)
    odd = folder / "class1" / "odd.png"
    if kind == "loop":
        odd.symlink_to(folder)
    elif kind == "parent":
        odd.symlink_to(Path("..") / ".." / "images" / "class1")
    elif kind == "self":
        odd.symlink_to("odd.png")
    elif kind == "mutual":
        odd.symlink_to("other.png")
        (folder / "class1" / "other.png").symlink_to("odd.png")
    elif kind == "broken":
        odd.symlink_to("nothing.png")
    elif kind == "pipe":
        os.mkfifo(odd)
    else:
        odd.mkdir()
    source = open_source(folder)
    assert len(source.ids) == 20 and len(open_images(folder)) == 20
    assert sum(source.ignored.values()) == {"folder": 0, "mutual": 2}.get(kind, 1)
    assert run_prepare(PrepareOptions(folder, tmp_path / "set", "none", SIZE))[0].count == 20


def test_links_to_files_and_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    elsewhere = make_images(tmp_path / "elsewhere", 20, SIZE)
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a", "b"):
        (folder / name).symlink_to(elsewhere / "class1")
    assert len(open_source(folder).ids) == 4


MAPS = [
    ("map.json", ""),
    ("map.json", "[]"),
    ("map.json", "null"),
    ("map.json", '{"a": null}'),
    ("map.json", '{"a": [0]}'),
    ("map.json", '{"a": {"b": 0}}'),
    ("map.json", '{"a": 0.5}'),
    ("map.json", '{"a": true}'),
    ("map.json", '{"a": -1}'),
    ("map.json", '{"a": 1e999}'),
    ("map.json", '{"a": NaN}'),
    ("map.json", '{"a": ' + "9" * 5000 + "}"),
    ("map.json", '{"a": 0, "a": 1}'),
    ("map.json", '{"a": 1}'),
    ("map.json", '{"a": ' * 100_000),
    ("map.json", "[" * 100_000),
    ("map.json", '{"\\ud800": 0}'),
    ("map.txt", ""),
    ("map.txt", "\n \n"),
    ("map.txt", "class0"),
    ("map.txt", "class0 zero"),
    ("map.txt", "class0 1.0"),
    ("map.txt", "class0 -1"),
    ("map.txt", "class0 0\nclass0 1"),
    ("map.txt", "class0 " + "9" * 5000),
    ("map.txt", "class0 ²"),
    ("map.txt", "class0 5"),
    ("map.txt", b"\xff\xfe\x00c"),
]


@pytest.mark.parametrize(("name", "content"), MAPS)
def test_malformed_class_maps_are_one_line(tmp_path: Path, name: str, content: str | bytes) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=name) as caught:
        read_class_map(tmp_path / name)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "loop"])
def test_class_maps_that_are_not_files(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "map.json"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    elif kind == "loop":
        file.symlink_to(file)
    with pytest.raises(UserError, match=r"map\.json"):
        read_class_map(file)
