"""Sources of images: an ImageFolder-style directory, a tar, or a saved Hugging Face dataset.

A source lists names and labels without opening an image, and reads the bytes of an image by its number.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, final

from stbench.core.errors import UserError
from stbench.core.safe_load import parse_json, read_text
from stbench.data.class_map import label_images, read_class_map
from stbench.data.crop import SUFFIXES, reason
from stbench.data.listing import list_files
from stbench.data.repa_layout import require_not_repa


class ImageSource(ABC):
    """Images in a fixed order: names, labels 0..K-1 and the encoded bytes."""

    ids: Sequence[str]
    """Name of each image within the source; unique."""
    labels: Sequence[int]
    classes: Sequence[str]
    """Class names by label."""
    ignored: Mapping[str, int]
    """Suffix, or kind (links in a tar), -> number of files that are not read as images."""
    stamp: str = ""
    """Identity of the content, if the source records one."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """Return the encoded image. Thread-safe.

        Raises OSError if the bytes cannot be read, ValueError if the row has no image.
        """

    def content(self, index: int) -> bytes:
        """Return the encoded image. Raises UserError if the disk or the network fails."""
        try:
            return self.read(index)
        except OSError as error:
            raise UserError(
                f"cannot read '{self.ids[index]}' ({reason(error)}); make the source readable again and "
                f"rerun the same command: finished shards are kept"
            ) from error

    def digest(self) -> str:
        """Return a hash of names and labels in order, and of the stamp if there is one."""
        rows = [[name, label] for name, label in zip(self.ids, self.labels, strict=True)]
        known = [self.stamp, rows] if self.stamp else rows
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def open_source(path: Path, classes: Path | None = None) -> ImageSource:
    """Open the source at `path`. `classes` is a map file, see `read_class_map`.

    Raises UserError for a path that is not a source or has no image, and for an image without a label.
    """
    if not path.exists():
        raise UserError(f"expected images at {path}, found nothing; give a folder, a .tar or a saved dataset")
    require_not_repa(path)
    class_map = None if classes is None else read_class_map(classes)
    if path.is_file():
        return ImageTar(path, class_map)
    if not path.is_dir():
        raise UserError(f"expected a folder, a .tar or a saved dataset, found something else at {path}")
    # Files that Hugging Face's `save_to_disk` writes for a dataset, and for a dictionary of splits.
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        if classes is not None:
            raise UserError(f"{path} is a saved dataset, which contains its labels; leave --classes out")
        return SavedDataset(path)
    if (path / "dataset_dict.json").is_file():
        splits = _splits(path / "dataset_dict.json")
        raise UserError(
            f"{path} contains several splits ({', '.join(splits)}); give one of them, "
            f"for example {path / (splits[0] if splits else 'train')}"
        )
    return ImageFolder(path, class_map)


def _splits(file: Path) -> list[str]:
    """Return the names of the splits of a saved Hugging Face DatasetDict."""
    try:
        return [str(name) for name in parse_json(read_text(file))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file}: expected {{"splits": [...]}}, found something else ({reason(error)}); save it again'
        ) from error


def _image_names(names: Iterable[str], where: Path) -> tuple[list[str], dict[str, int]]:
    """Return the sorted names of image files, and suffix (or name) -> number of the others."""
    suffixes = {name: PurePosixPath(name).suffix.lower() for name in names}
    ids = sorted(name for name, suffix in suffixes.items() if suffix in SUFFIXES)
    if not ids:
        raise UserError(
            f"expected images in {where}, found none of {', '.join(sorted(SUFFIXES))}; "
            f"give the folder that contains the class folders"
        )
    return ids, dict(Counter(suffix or name for name, suffix in suffixes.items() if suffix not in SUFFIXES))


@final
class ImageFolder(ImageSource):
    """Image files under a directory. Links are followed, except to a parent folder."""

    def __init__(self, path: Path, class_map: Mapping[str, int] | None = None) -> None:
        self._path = path
        names, left_out = list_files(path)
        self.ids, others = _image_names(names, path)
        self.ignored = {**others, **left_out}
        self.labels, self.classes = label_images(self.ids, class_map, path)

    def read(self, index: int) -> bytes:
        """See `ImageSource.read`."""
        return (self._path / self.ids[index]).read_bytes()


@final
class ImageTar(ImageSource):
    """Image files in an uncompressed tar, read in place."""

    def __init__(self, path: Path, class_map: Mapping[str, int] | None = None) -> None:
        self._path = path
        try:
            with tarfile.open(path, "r:") as archive:
                members = list(archive)
                end = archive.offset
        except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as error:
            raise UserError(
                f"expected an uncompressed tar of images, found {path} ({error}); unpack or decompress it"
            ) from error
        # Names, labels, and the position of each image in the archive.
        places = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in members if _is_plain(m)}
        self.ids, ignored = _image_names(places, path)
        self.labels, self.classes = label_images(self.ids, class_map, path)
        links = Counter(_kind(m) for m in members if not _is_plain(m) and not m.isdir())
        self.ignored = {**ignored, **links}
        self._places = [places[name] for name in self.ids]
        length = path.stat().st_size
        for name, (offset, size) in zip(self.ids, self._places, strict=True):
            if size < 0 or offset + size > length:
                raise UserError(
                    f"{path} is truncated or damaged: '{name}' ends after it; copy or pack it again"
                )
        # tarfile stops without an error at a damaged header or at the end of a truncated file.
        self._file = os.open(path, os.O_RDONLY)
        if os.pread(self._file, tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"{path} is truncated or damaged: expected {tarfile.BLOCKSIZE} zero bytes at byte {end}, "
                f"after {len(members)} members, found something else; copy or pack it again"
            )

    def read(self, index: int) -> bytes:
        """See `ImageSource.read`."""
        offset, size = self._places[index]
        content = os.pread(self._file, size, offset)
        if len(content) != size:
            raise OSError(f"the tar is truncated: expected {size} bytes, found {len(content)}")
        return content


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether the archive contains the bytes of the file in one piece."""
    return member.isreg() and not member.issparse()


def _kind(member: tarfile.TarInfo) -> str:
    if member.islnk() or member.issym():
        return "hard links" if member.islnk() else "symbolic links"
    return "special files"


@final
class SavedDataset(ImageSource):
    """A Hugging Face dataset written by `save_to_disk`: its first Image and its first ClassLabel column.

    Without a ClassLabel column, an integer column named "label". Raises UserError if the package datasets is
    not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{path} is a Hugging Face dataset, which the package datasets reads; pip install datasets"
            ) from error
        try:
            rows: Any = datasets.load_from_disk(str(path))
        except Exception as error:  # a damaged dataset may raise anything
            raise UserError(
                f"{path} does not load as a saved dataset ({reason(error)}); save or copy it again"
            ) from error
        # The columns with images and labels.
        kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
        image = next((name for name, kind in kinds.items() if kind == "Image"), None)
        label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), None)
        label = label or ("label" if "label" in kinds else None)
        if image is None or label is None:
            raise UserError(f"{path}: expected an Image and a ClassLabel column, found {kinds}; cast them")
        self.stamp = str(rows._fingerprint)
        self._image, self._rows = image, rows.cast_column(image, datasets.Image(decode=False))
        # Labels and class names.
        names = getattr(rows.features[label], "names", None)
        self.labels = _check_labels(rows[label][:], path, label, len(names) if names else None)
        self.classes = list(names or map(str, range(max(self.labels, default=-1) + 1)))
        self.ids = [f"row {number}" for number in range(len(self.labels))]
        self.ignored = {}

    def read(self, index: int) -> bytes:
        """See `ImageSource.read`."""
        value = self._rows[index][self._image] or {}
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        if value.get("path") is None:
            raise ValueError("the row has no image")
        return Path(value["path"]).read_bytes()


def _check_labels(values: Sequence[Any], path: Path, column: str, classes: int | None) -> list[int]:
    """Return the labels of a column. Raises UserError unless they are 0..classes-1.

    If the number of classes is unknown, every label up to the largest must occur.
    """
    wrong = [v for v in values if not isinstance(v, int) or v < 0 or (classes is not None and v >= classes)]
    gaps = [] if classes is not None or wrong else sorted(set(range(max(values, default=-1) + 1)) - {*values})
    if wrong or gaps:
        found = f"{wrong[0]!r} in {len(wrong)} rows" if wrong else f"no row with label {gaps[0]}"
        raise UserError(
            f"{path}: labels in '{column}' must be 0..{'K' if classes is None else classes}-1, "
            f"found {found}; renumber them"
        )
    return list(values)
