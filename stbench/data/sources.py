"""Where images come from: a folder with a folder a class, a tar, a Hugging Face dataset on disk.

A source lists names and labels without opening an image, and reads the bytes of one by its number.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, final

from stbench.core.errors import UserError
from stbench.data.crop import SUFFIXES, reason


class Source(ABC):
    """Images in a fixed order: names, labels 0..K-1 and, on demand, the encoded bytes."""

    ids: Sequence[str]
    """Name of each image inside the source; unique."""
    labels: Sequence[int]
    classes: Sequence[str]
    """Names of the classes, by label."""
    ignored: Mapping[str, int]
    """Suffix, or kind (links in a tar) -> files that were not taken for images."""

    stamp: str = ""
    """What identifies the content, where the source keeps such a thing."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded image; safe to call from several threads.

        Raises OSError where the bytes cannot be had, ValueError where there are none by design.
        """

    def content(self, index: int) -> bytes:
        """The encoded image. Raises UserError for a disk or a network that fails."""
        try:
            return self.read(index)
        except OSError as error:
            raise UserError(
                f"expected the bytes of '{self.ids[index]}', found none ({reason(error)}); make the source "
                f"readable again and type the same command: finished shards are kept"
            ) from error

    def digest(self) -> str:
        """Hash of names and labels in order, and of the stamp where there is one."""
        rows = [[name, label] for name, label in zip(self.ids, self.labels, strict=True)]
        known = [self.stamp, rows] if self.stamp else rows
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def open_source(path: Path, classes: Path | None = None) -> Source:
    """The source at `path`; `classes` is a map file (see `read_classes`).

    Raises UserError for a path that is none of the three, holds no image, or whose map lacks a name.
    """
    if not path.exists():
        raise UserError(f"expected images at {path}, found nothing; give a folder, a .tar or a saved dataset")
    mapping = None if classes is None else read_classes(classes)
    if path.is_file():
        return Tar(path, mapping)
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return Saved(path)
    if (path / "dataset_dict.json").is_file():
        splits = _splits(path / "dataset_dict.json")
        raise UserError(
            f"{path} holds several splits ({', '.join(splits)}); give one of them, "
            f"for example {path / (splits[0] if splits else 'train')}"
        )
    return Folder(path, mapping)


def _splits(file: Path) -> list[str]:
    try:
        return [str(name) for name in json.loads(file.read_bytes())["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file}: expected {{"splits": [...]}}, found something else ({reason(error)}); save it again'
        ) from error


def read_classes(file: Path) -> dict[str, int]:
    """A map file: JSON {name: label}, or lines "name label"; a name is an image's, or its first folder's.

    Raises UserError for a file that is missing or holds anything else.
    """
    example = 'expected JSON {"name": label} or lines "name label"'
    try:
        text = file.read_text()
        pairs = json.loads(text).items() if file.suffix == ".json" else _lines(text)
        mapping = {str(name): int(label) for name, label in pairs}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"map file {file} cannot be read ({error}); {example}") from error
    if sorted(set(mapping.values())) != list(range(len(set(mapping.values())))):
        raise UserError(
            f"map file {file}: labels want to be 0..K-1 without a gap, "
            f"found {len(set(mapping.values()))} labels from {min(mapping.values(), default=0)} "
            f"to {max(mapping.values(), default=0)}; number them anew"
        )
    return mapping


def _lines(text: str) -> list[tuple[str, str]]:
    rows = [line.rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
    return [(row[0], row[1]) for row in rows if len(row) == 2 or _no_label(row)]


def _no_label(row: list[str]) -> bool:
    raise ValueError(f"no label after '{row[0]}'")


class _Named(Source):
    """Files by their path in a folder or a tar; the label is the map's, or that of the first folder."""

    def _label(self, names: Sequence[str], mapping: Mapping[str, int] | None, where: Path) -> None:
        suffixes = {name: PurePosixPath(name).suffix.lower() for name in names}
        images = [name for name, suffix in suffixes.items() if suffix in SUFFIXES]
        self.ignored = dict(Counter(s or name for name, s in suffixes.items() if s not in SUFFIXES))
        self.ids = sorted(images)
        if not self.ids:
            raise UserError(
                f"expected images in {where}, found none of {', '.join(sorted(SUFFIXES))}; "
                f"give the folder above the class folders"
            )
        if mapping is None:
            folders = [name.partition("/")[0] if "/" in name else "" for name in self.ids]
            if "" in folders:
                raise UserError(
                    f"{where}: expected one folder a class, found '{self.ids[folders.index('')]}' in none; "
                    f"give a map file with --classes"
                )
            self.classes = sorted(set(folders))
            number = {name: label for label, name in enumerate(self.classes)}
            self.labels = [number[folder] for folder in folders]
            return
        self.labels = [_mapped(name, mapping, where) for name in self.ids]
        self.classes = _class_names(mapping)


def _mapped(name: str, mapping: Mapping[str, int], where: Path) -> int:
    for known in (name, PurePosixPath(name).name, name.partition("/")[0]):
        if known in mapping:
            return mapping[known]
    raise UserError(f"{where}: the map file has no label for '{name}' nor its folder; add a line for it")


def _class_names(mapping: Mapping[str, int]) -> list[str]:
    """By label: its only name, or its number where several names share it."""
    found: dict[int, list[str]] = {}
    for name, label in mapping.items():
        found.setdefault(label, []).append(name)
    return [found[k][0] if len(found[k]) == 1 else str(k) for k in range(len(found))]


def _unlisted(error: OSError) -> None:
    raise UserError(
        f"expected to list the folder {error.filename}, found an error ({error.strerror}); "
        f"make it readable, or give another folder"
    ) from error


@final
class Folder(_Named):
    """Image files under a folder; links to folders are followed."""

    def __init__(self, path: Path, mapping: Mapping[str, int] | None = None) -> None:
        self._path = path
        names = [
            os.path.relpath(os.path.join(root, file), path).replace(os.sep, "/")
            for root, _, files in os.walk(path, onerror=_unlisted, followlinks=True)
            for file in files
        ]
        self._label(names, mapping, path)

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        return (self._path / self.ids[index]).read_bytes()


@final
class Tar(_Named):
    """Image files in an uncompressed tar, read in place."""

    def __init__(self, path: Path, mapping: Mapping[str, int] | None = None) -> None:
        self._path = path
        try:
            with tarfile.open(path, "r:") as archive:
                listed = list(archive)
                end = archive.offset
        except (tarfile.TarError, OSError, EOFError) as error:
            raise UserError(
                f"expected an uncompressed tar of images, found {path} ({error}); unpack or decompress it"
            ) from error
        members = {m.name.removeprefix("./"): (m.offset_data, m.size) for m in listed if _plain(m)}
        self._label(list(members), mapping, path)
        links = Counter(_kind(m) for m in listed if not _plain(m) and not m.isdir())
        self.ignored = {**self.ignored, **links}
        self._places = [members[name] for name in self.ids]
        self._file = os.open(path, os.O_RDONLY)
        if os.pread(self._file, tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            raise UserError(
                f"{path} is cut off or damaged: expected {tarfile.BLOCKSIZE} zero bytes at its end, byte "
                f"{end} after {len(listed)} members, found something else; copy or pack it again"
            )

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        offset, size = self._places[index]
        content = os.pread(self._file, size, offset)
        if len(content) != size:
            raise OSError(f"the tar is cut off: {size} bytes expected, {len(content)} found")
        return content


def _plain(member: tarfile.TarInfo) -> bool:
    """Whether its bytes lie in the archive as they are."""
    return member.isreg() and not member.issparse()


def _kind(member: tarfile.TarInfo) -> str:
    if member.islnk() or member.issym():
        return "hard links" if member.islnk() else "symbolic links"
    return "special files"


def _checked(values: Sequence[Any], path: Path, column: str, classes: int | None) -> list[int]:
    """The labels of a column. Raises UserError unless they are 0..K-1; without names each must occur."""
    wrong = [v for v in values if not isinstance(v, int) or v < 0 or (classes is not None and v >= classes)]
    gaps = [] if classes is not None or wrong else sorted(set(range(max(values, default=-1) + 1)) - {*values})
    if wrong or gaps:
        found = f"{wrong[0]!r} in {len(wrong)} rows" if wrong else f"no row of {gaps[0]}"
        raise UserError(
            f"{path}: labels in '{column}' want to be 0..{'K' if classes is None else classes}-1, "
            f"found {found}; number them anew"
        )
    return list(values)


@final
class Saved(Source):
    """A Hugging Face dataset that `save_to_disk` wrote: the first Image column and the first ClassLabel one.

    A plain column of whole numbers named "label" also does. Raises UserError without the package datasets.
    """

    def __init__(self, path: Path) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{path} is a Hugging Face dataset: reading it wants the package datasets; "
                f"pip install datasets"
            ) from error
        try:
            rows: Any = datasets.load_from_disk(str(path))
        except Exception as error:  # a damaged dataset may raise anything
            raise UserError(
                f"{path} does not load as a saved dataset ({reason(error)}); save or copy it again"
            ) from error
        kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
        image = next((name for name, kind in kinds.items() if kind == "Image"), None)
        label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), None)
        label = label or ("label" if "label" in kinds else None)
        if image is None or label is None:
            raise UserError(f"{path}: expected an Image and a ClassLabel column, found {kinds}; cast them")
        self.stamp = str(rows._fingerprint)
        self._image, self._rows = image, rows.cast_column(image, datasets.Image(decode=False))
        named = getattr(rows.features[label], "names", None)
        self.labels = _checked(rows[label][:], path, label, len(named) if named else None)
        self.classes = list(named or map(str, range(max(self.labels, default=-1) + 1)))
        self.ids = [f"row {number}" for number in range(len(self.labels))]
        self.ignored = {}

    def read(self, index: int) -> bytes:
        """See `Source.read`."""
        value = self._rows[index][self._image] or {}
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        if value.get("path") is None:
            raise ValueError("the row holds no image")
        return Path(value["path"]).read_bytes()
