"""Output paths, checked before a command computes anything: no output destroys what stbench did not write.

A file is written beside its path and renamed over it, so devices, pipes and links would be replaced. An
output must therefore be a new path, or a regular file or folder that the command recognises as its own.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Literal

from stbench.core.errors import UserError
from stbench.core.files import temporary_path


@dataclass(frozen=True)
class Output:
    """A path that a command writes."""

    path: Path
    option: str = "--output"
    """Option or argument that names it."""
    kind: Literal["file", "new folder", "folder"] = "file"
    """A file; a folder that appears complete; or a folder that is filled, which may be a link to a folder."""
    is_own: Callable[[Path], bool] | None = None
    """Whether what exists at the path was written by this command, which may replace or finish it.

    By default nothing may exist, except for a folder that is filled.
    """
    remedy: str = "choose another path"
    """End of the error messages."""


def check_outputs(outputs: Sequence[Output], inputs: Iterable[Path] = ()) -> None:
    """Check that all outputs can be written and destroy nothing.

    Nothing is left on the disk: whether a path can be written is tried with an empty file, which is deleted.

    Args:
        outputs: What the command writes.
        inputs: Files and folders that it reads. An output is none of them, under any name, and is not in one.

    Raises:
        UserError: An output is a device, pipe, link, folder in place of a file, or something that the command
            did not write; it is read-only or cannot be written; or it is, or is in, an input or other output.
    """
    for output in outputs:
        try:
            found = _lstat(output)
            _require_type(output, found)
            for path in inputs:
                _require_apart(output, path)
            _require_own(output, found)
        except (OSError, ValueError) as error:  # ValueError: a NUL
            raise _cannot_write(output, error) from error
    for first, second in combinations(outputs, 2):
        _require_different(first, second)
    for output in outputs:
        try:
            _try_writing(output)
        except OSError as error:
            raise _cannot_write(output, error) from error


def _lstat(output: Output) -> os.stat_result | None:
    """Facts about what exists at the path itself, or about the folder that a link stands for."""
    path = output.path
    if path.name in ("", "..") and output.kind != "folder":
        raise UserError(f"{output.option} must name a {output.kind}, found '{path}'; {output.remedy}")
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if stat.S_ISLNK(found.st_mode) and output.kind == "folder":
        return path.stat() if path.exists() else found
    return found


def _require_type(output: Output, found: os.stat_result | None) -> None:
    """A regular file where a file is written, a folder where a folder is."""
    if found is None:
        return
    expected, is_type = ("file", stat.S_ISREG) if output.kind == "file" else ("folder", stat.S_ISDIR)
    if not is_type(found.st_mode):
        raise UserError(
            f"{output.option} {output.path} is {_type_name(found.st_mode)}, expected a new path or a "
            f"{expected} of this command; {output.remedy}"
        )
    if not found.st_mode & 0o222:
        raise UserError(f"{output.option} {output.path} is read-only; {output.remedy}")


def _type_name(mode: int) -> str:
    names = {
        stat.S_ISLNK: "a symbolic link",
        stat.S_ISDIR: "a folder",
        stat.S_ISREG: "a file",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }
    return next((name for is_type, name in names.items() if is_type(mode)), "a device")


def _require_own(output: Output, found: os.stat_result | None) -> None:
    """What exists was written by this command. An empty file or folder contains nothing to lose."""
    path = output.path
    if found is None or (stat.S_ISREG(found.st_mode) and not found.st_size):
        return
    if output.is_own is None:
        if output.kind == "folder":
            return
        raise UserError(f"{output.option} {path} exists; delete it, or {output.remedy}")
    if stat.S_ISDIR(found.st_mode) and output.kind == "folder" and not any(path.iterdir()):
        return
    if not output.is_own(path):
        raise UserError(
            f"{output.option} {path} exists and was not written by this command; delete it, or "
            f"{output.remedy}"
        )


def _require_apart(output: Output, path: Path) -> None:
    """The output is not an input, also not by another spelling or a hard link, and is not in an input."""
    if not path.exists():
        return
    if output.path.exists() and output.path.samefile(path):
        raise UserError(
            f"{output.option} {output.path} is also an input of this command ({path}); {output.remedy}"
        )
    if path.is_dir() and _real(path) in _real(output.path).parents:
        raise UserError(
            f"{output.option} {output.path} is in {path}, an input of this command; {output.remedy}"
        )


def _require_different(first: Output, second: Output) -> None:
    """Two outputs are not the same path, also not by another spelling, and none is in the other."""
    one, other = _real(first.path), _real(second.path)
    linked = one.exists() and other.exists() and one.samefile(other)
    if linked or one == other or one in other.parents or other in one.parents:
        options = first.option if first.option == second.option else f"{first.option} and {second.option}"
        raise UserError(
            f"{options}: {first.path} and {second.path} are the same path, or one is in the other; give each "
            f"output a path of its own"
        )


def _try_writing(output: Output) -> None:
    """Create an empty file where the output will be written, and delete it."""
    folder = output.path if output.kind == "folder" else output.path.parent
    if folder.is_dir() and output.kind != "folder":
        # With the name under which it will be written: it may be too long.
        temporary = temporary_path(output.path)
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        temporary.unlink()
        return
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise UserError(f"{output.option} {output.path}: {folder} is not a folder; {output.remedy}")
    with tempfile.TemporaryFile(dir=folder):
        pass


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))  # unlike Path.resolve, no error for a loop of links


def _cannot_write(output: Output, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{output.option} {output.path} cannot be written: {reason}; {output.remedy}")
