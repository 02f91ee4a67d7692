"""List the files of a folder for reading: regular files only, and no folder twice on one path.

A folder of images may contain links in a circle, links to nothing, pipes and devices. None of them may make a
command hang or fail.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from stbench.core.errors import UserError

LOOPS, BROKEN, SPECIAL = "links to a parent folder", "broken links", "special files"
"""Kinds of entries that are not read."""

FOLDER, FILE = "folder", "file"
"""Kinds of entries that are."""


class Listing(NamedTuple):
    """The files under a folder."""

    names: list[str]
    """Sorted paths relative to the folder, separated by slashes."""
    left_out: dict[str, int]
    """Kind of entry -> number of those that are not read."""


def list_files(folder: Path) -> Listing:
    """List the regular files under a folder. Links to files and to folders are followed.

    Raises UserError for a folder that cannot be listed: its files must not be missing without a word.
    """
    names: list[str] = []
    left_out: Counter[str] = Counter()
    # Depth first, with the identities of all folders on the way, by which a circle of links is noticed.
    pending = [("", frozenset[tuple[int, int]]())]
    while pending:
        prefix, above = pending.pop()
        place = os.path.join(folder, prefix.rstrip("/"))
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in above:
                left_out[LOOPS] += 1
                continue
            here = above | {(status.st_dev, status.st_ino)}
            with os.scandir(place) as entries:
                for entry in entries:
                    name, kind = f"{prefix}{entry.name}", _kind(entry)
                    if kind == FOLDER:
                        pending.append((f"{name}/", here))
                    elif kind == FILE:
                        names.append(name)
                    else:
                        left_out[kind] += 1
        except OSError as error:
            raise UserError(
                f"cannot list the folder {place} ({error.strerror}); make it readable, or give another folder"
            ) from error
    return Listing(sorted(names), dict(left_out))


def _kind(entry: os.DirEntry[str]) -> str:
    """Return the kind of an entry, of what it leads to if it is a link."""
    try:
        if entry.is_dir():
            return FOLDER
        if entry.is_file():
            return FILE
    except OSError:  # a link to itself
        return BROKEN
    return BROKEN if entry.is_symlink() else SPECIAL
