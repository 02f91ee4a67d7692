"""Store the shards of a sampling job in `<output>.parts/` and join them into an npz or a folder of PNGs.

The settings that made the images are stored with them, both in the parts and in the output.
"""

from __future__ import annotations

import json
import re
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stbench.core.errors import UserError
from stbench.core.files import LOCK, atomic_file, atomic_folder, atomic_write, lock_folder, remove_unfinished
from stbench.core.safe_load import parse_json, read_text
from stbench.evaluate.image_sets import SETTINGS, NpzImages, open_npz, read_npz_text

SETTINGS_SCHEMA = 1
"""Version of the stored settings."""

TOKEN = "job"
"""Name of the token among the settings that are stored with parts."""

OWN = re.compile(r"\d{8,}\.np[yz]|settings\.json|\.lock|\.(\d{8,}\.np[yz]|settings\.json)\.\d+\.tmp")
"""Names of the files in a parts folder; earlier versions wrote npy files. Nothing else is ever deleted."""


def parts_folder(output: Path) -> Path:
    """Return the folder of the shards of an output."""
    return output.with_name(f"{output.name}.parts")


def is_parts(folder: Path) -> bool:
    """Whether a folder contains nothing but the files of a sampling job."""
    return all(OWN.fullmatch(path.name) and not path.is_symlink() for path in folder.iterdir())


def is_samples(output: Path) -> bool:
    """Whether an npz or a folder was made by `stbench sample`. Raises UserError if it is damaged."""
    return read_settings(output) is not None


class PartsFolder:
    """The folder `<output>.parts/`: settings.json and one npz per shard, with arr_0 uint8 (B,H,W,3).

    settings.json and every shard contain the settings and the token of the job, so that a shard which another
    job left, or which a process of another job still writes, is never used.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any], size: int) -> None:
        self.folder = parts_folder(output)
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as stored: tuples become lists
        self.token = ""
        """Random name of the job; empty until `open`."""
        # Every shard but the last has `size` images.
        count = settings["count"]
        self.shards = [(start, min(start + size, count)) for start in range(0, count, size)]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Own the folder for a `with` block and delete unfinished files; UserError if it is in use."""
        with lock_folder(self.folder, "wait for it or choose another --output"):
            remove_unfinished(self.folder)
            yield

    def open(self) -> None:
        """Start or resume a job.

        Raises UserError if the folder was started with other settings, or contains files of something else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in self.folder.iterdir() if not OWN.fullmatch(path.name))
        if others:
            raise UserError(f"{self.folder} contains other files ({others[0]}); choose another --output")
        file = self.folder / SETTINGS
        if file.is_file():
            found = _parse(read_text(file), file)
            self.token = str(found.pop(TOKEN, ""))
            _require_same(found, self.settings, self.folder)
        if not self.token:
            self.token = secrets.token_hex(8)
            atomic_write(file, json.dumps(self._identity(), indent=1) + "\n")

    def _identity(self) -> dict[str, Any]:
        return {**self.settings, TOKEN: self.token}

    def file(self, start: int) -> Path:
        """Return the path of the shard whose first image is `start`."""
        return self.folder / f"{start:08d}.npz"

    def write(self, start: int, images: np.ndarray) -> None:
        """Write a shard atomically. Raises UserError if the folder belongs to another job by now."""
        file = self.folder / SETTINGS
        if not file.is_file() or _parse(read_text(file), file) != self._identity():
            raise UserError(f"{self.folder} was replaced while images were generated; rerun the same command")
        settings = np.array(json.dumps(self._identity()))
        write_npz(self.file(start), images.shape, [images], {"settings": settings})

    def missing(self) -> list[tuple[int, int]]:
        """Return the shards (start, stop) that are missing, damaged or of another job."""
        return [shard for shard in self.shards if self._read(*shard) is None]

    def done(self) -> int:
        """Return the number of images in existing shards."""
        return sum(stop - start for start, stop in self.shards if self.file(start).exists())

    def arrays(self) -> Iterator[np.ndarray]:
        """Yield every shard in order. Raises UserError for one that is missing, damaged or of another job."""
        for start, stop in self.shards:
            array = self._read(start, stop)
            if array is None:
                raise UserError(
                    f"{self.file(start)} is missing, damaged or of another job; rerun the same command"
                )
            yield array

    def _read(self, start: int, stop: int) -> np.ndarray | None:
        """Return a shard after comparing its checksum and settings; None if it must be generated again."""
        file = self.file(start)
        with suppress(UserError, OSError):
            if file.is_file() and read_settings(file) == self._identity():
                (images,) = NpzImages(file).batches(stop - start + 1)
                if len(images) == stop - start:
                    return images.permute(0, 2, 3, 1).numpy()
        return None

    def delete(self) -> None:
        """Delete the files of the job, and the folder unless it contains anything else."""
        for path in list(self.folder.iterdir()):
            if OWN.fullmatch(path.name) and path.name != LOCK and not path.is_dir():
                path.unlink()
        (self.folder / LOCK).unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def join_parts(parts: PartsFolder, output: Path, labels: np.ndarray) -> None:
    """Write all shards as an npz, if `output` ends in .npz, or as a folder of PNG files, atomically.

    The parts must be locked: temporary files that a killed process left next to `output` are deleted.
    """
    remove_unfinished(output.parent, output.name)
    settings = parts.settings

    # Shards are streamed: 50,000 images need not fit into memory.
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
        # The size is unknown when the member is opened, and may exceed 2 GiB.
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
        (draft / SETTINGS).write_text(json.dumps(settings, indent=1))


def read_settings(output: Path) -> dict[str, Any] | None:
    """Read the settings that `stbench sample` stored in an npz or a folder; None if it did not make them."""
    if output.is_dir():
        file = output / SETTINGS
        return _parse(read_text(file), file) if file.is_file() else None
    # An npz from elsewhere, for example from ADM, has no settings.
    with open_npz(output) as archive:
        if "settings.npy" not in archive.namelist():
            return None
    return _parse(read_npz_text(output, "settings"), output)


def is_finished(output: Path, settings: Mapping[str, Any]) -> bool:
    """Return whether `output` exists with these settings. Raises UserError if it exists with others."""
    if not output.exists():
        return False
    found = read_settings(output)
    if found is None:
        raise UserError(f"{output} exists and was not made by `stbench sample`; choose another --output")
    _require_same(found, settings, output)
    return True


def _require_same(found: Mapping[str, Any], expected: Mapping[str, Any], where: Path) -> None:
    expected = json.loads(json.dumps(expected))  # as stored: tuples become lists
    for name in [*expected, *found]:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{where} was made with {name} {found.get(name)}, not {expected.get(name)}; "
                "delete it or choose another --output"
            )


def _parse(text: str, where: Path) -> dict[str, Any]:
    try:
        content = parse_json(text, allow_nan=True)
    except ValueError as error:
        raise UserError(f"{where} contains damaged settings ({error}); delete it and start again") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} contains no settings; delete it and start again")
    return content
