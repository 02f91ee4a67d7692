"""Images drawn so far in `<output>.parts/`, and what they are joined into: an npz, or a folder of PNG files.

The settings that made the images lie beside them, in the parts and in what they become.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stbench.core.errors import UserError
from stbench.core.files import atomic_file, atomic_folder, atomic_write, lock_folder, remove_unfinished
from stbench.evaluate.image_sets import open_member, open_npz


class Parts:
    """The folder `<output>.parts/`: settings.json and one npy for each shard, uint8 (B,H,W,3)."""

    def __init__(self, output: Path, settings: Mapping[str, Any], size: int) -> None:
        self.folder = output.with_name(f"{output.name}.parts")
        self.output, self.settings, self.size = output, settings, size
        count = settings["count"]
        self.shards = [(start, min(start + size, count)) for start in range(0, count, size)]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the folder for a `with` block and delete unfinished files; UserError if it is in use."""
        with lock_folder(self.folder, "wait for it or choose another --output"):
            remove_unfinished(self.folder)
            yield

    def open(self) -> None:
        """Begin, or go on with, these settings. Raises UserError if the folder was begun with others."""
        file = self.folder / "settings.json"
        if file.is_file():
            _require_same(_parse(file.read_text(), file), self.settings, self.folder)
        else:
            atomic_write(file, json.dumps(self.settings, indent=1) + "\n")

    def file(self, start: int) -> Path:
        """Where the shard that begins with image `start` lies."""
        return self.folder / f"{start:08d}.npy"

    def missing(self) -> list[tuple[int, int]]:
        """Shards still to draw: not there, or unreadable."""
        return [shard for shard in self.shards if self._read(*shard) is None]

    def drawn(self) -> int:
        """Images in the shards that are there."""
        return sum(stop - start for start, stop in self.shards if self.file(start).exists())

    def arrays(self) -> Iterator[np.ndarray]:
        """Every shard in order."""
        for start, stop in self.shards:
            array = self._read(start, stop)
            if array is None:
                raise UserError(f"{self.file(start)} is gone or damaged; give the same command again")
            yield array

    def _read(self, start: int, stop: int) -> np.ndarray | None:
        with suppress(OSError, ValueError, EOFError):
            array = np.load(self.file(start), mmap_mode="r", allow_pickle=False)
            if array.dtype == np.uint8 and array.ndim == 4 and len(array) == stop - start:
                return array
        return None

    def close(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.folder)


def join(parts: Parts, output: Path, settings: Mapping[str, Any], labels: np.ndarray) -> None:
    """Write an npz (by its suffix) or a folder of PNG files from the parts, whole or not at all.

    What a killed process had begun of it goes; the lock on the parts is held.
    """
    remove_unfinished(output.parent, output.name)
    if output.suffix == ".npz":
        first = next(parts.arrays())
        others = {"labels": labels, "settings": np.array(json.dumps(settings))}
        write_npz(output, (settings["count"], *first.shape[1:]), parts.arrays(), others)
    else:
        write_pictures(output, settings["count"], parts.arrays(), settings)


def write_npz(
    path: Path, shape: tuple[int, ...], batches: Iterable[np.ndarray], others: Mapping[str, np.ndarray]
) -> None:
    """Write an npz as ADM does: arr_0, uint8 of `shape`, from batches along the first axis, and other arrays.

    Uncompressed, like `numpy.savez`. Only one batch is in memory at a time.
    """
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
            for batch in batches:
                member.write(np.ascontiguousarray(batch).tobytes())
        for name, array in others.items():
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def write_pictures(
    folder: Path, count: int, batches: Iterable[np.ndarray], settings: Mapping[str, Any]
) -> None:
    """Write numbered PNG files from uint8 batches (B,H,W,3), and settings.json, atomically."""
    digits = max(6, len(str(count - 1)))
    number = 0
    with atomic_folder(folder) as draft:
        for batch in batches:
            for image in batch:
                Image.fromarray(image).save(draft / f"{number:0{digits}d}.png")
                number += 1
        (draft / "settings.json").write_text(json.dumps(settings, indent=1))


def settings_of(output: Path) -> dict[str, Any] | None:
    """The settings that `stbench sample` left in an npz or a folder of images; None if it made neither."""
    if output.is_dir():
        file = output / "settings.json"
        return _parse(file.read_text(), file) if file.is_file() else None
    with open_npz(output) as archive:
        if "settings.npy" not in archive.namelist():
            return None
    with open_member(output, "settings") as (stream, _, dtype):
        return _parse(str(np.frombuffer(stream.read(), dtype)[0]), output)


def is_made(output: Path, settings: Mapping[str, Any]) -> bool:
    """Whether `output` is there with these settings. Raises UserError if it is there with others."""
    if not output.exists():
        return False
    found = settings_of(output)
    if found is None:
        raise UserError(f"{output} is there and was not made by `stbench sample`; choose another --output")
    _require_same(found, settings, output)
    return True


def _require_same(found: Mapping[str, Any], wanted: Mapping[str, Any], where: Path) -> None:
    wanted = json.loads(json.dumps(wanted))
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"{where} was made with {name} {found.get(name)}, not {wanted.get(name)}; "
                "delete it or choose another --output"
            )


def _parse(text: str, where: Path) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{where} holds damaged settings ({error}); delete it and begin again") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} holds no settings; delete it and begin again")
    return content
