"""Labels of image files: from the folder they are in, or from a map file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from stbench.core.errors import UserError
from stbench.core.safe_load import parse_json, read_text
from stbench.data.crop import reason


def read_class_map(file: Path) -> dict[str, int]:
    """Read a map file: JSON {name: label}, or lines "name label".

    A name is that of an image (its path, or only its file name) or of a top-level folder. Raises UserError
    for a file that is missing or malformed, and for labels other than 0..K-1.
    """
    expected = 'expected JSON {"name": label} or lines "name label"'
    try:
        text = read_text(file)
        class_map = _read_json(text) if file.suffix.lower() == ".json" else _read_lines(text)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read map file {file} ({reason(error)}); {expected}") from error
    if not class_map:
        raise UserError(f"map file {file} is empty; {expected}")
    labels = set(class_map.values())
    if labels != set(range(len(labels))):
        raise UserError(
            f"map file {file}: labels must be 0..K-1 without a gap, found {len(labels)} labels from "
            f"{min(labels)} to {max(labels)}; renumber them"
        )
    return class_map


def _read_json(text: str) -> dict[str, int]:
    """Read {name: label}. Raises ValueError for anything else, and for a name that occurs twice."""
    content = parse_json(text)
    if not isinstance(content, dict):
        raise ValueError(f"found a {type(content).__name__}")
    return {name: _label(name, label) for name, label in content.items()}


def _read_lines(text: str) -> dict[str, int]:
    """Read lines "name label"; a name may contain spaces. Raises ValueError as `_read_json` does."""
    pairs = []
    for line in filter(str.strip, text.splitlines()):
        fields = line.rsplit(maxsplit=1)
        if len(fields) != 2:
            raise ValueError(f"no label after '{fields[0][:80]}'")
        pairs.append((fields[0], _label(*fields)))
    labels: dict[str, int] = {}
    for name, label in pairs:
        if labels.setdefault(name, label) != label:
            raise ValueError(f"'{name[:80]}' has two labels")
    return labels


def _label(name: str, value: Any) -> int:
    """Return a label. Raises ValueError unless it is a non-negative integer of at most nine digits."""
    text = str(value) if type(value) in (int, str) else ""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError(f"the label of '{name[:80]}' must be a non-negative integer, found {value!r:.40}")
    return int(text)


def label_images(
    ids: Sequence[str], class_map: Mapping[str, int] | None, where: Path
) -> tuple[list[int], list[str]]:
    """Return the label of each image and the class names by label.

    `ids` are paths within `where`. Without a map, the top-level folders in sorted order are the classes.
    Raises UserError for an image without a label.
    """
    if class_map is not None:  # classes without an image still count
        return [_mapped(name, class_map, where) for name in ids], _class_names(class_map)
    for name in ids:
        if "/" not in name:
            raise UserError(
                f"{where}: expected one folder per class, found '{name}' outside of any; "
                f"give a map file with --classes"
            )
    folders = [name.partition("/")[0] for name in ids]
    classes = sorted(set(folders))
    number = {name: label for label, name in enumerate(classes)}
    return [number[folder] for folder in folders], classes


def _mapped(name: str, class_map: Mapping[str, int], where: Path) -> int:
    # From specific to general: path, file name, top-level folder.
    for key in (name, PurePosixPath(name).name, name.partition("/")[0]):
        if key in class_map:
            return class_map[key]
    raise UserError(f"{where}: the map file has no label for '{name}' or its folder; add a line for it")


def _class_names(class_map: Mapping[str, int]) -> list[str]:
    """Return the class names by label: the only name with a label, or the number if several share it."""
    names: dict[int, list[str]] = {}
    for name, label in class_map.items():
        names.setdefault(label, []).append(name)
    return [names[k][0] if len(names[k]) == 1 else str(k) for k in range(len(names))]
