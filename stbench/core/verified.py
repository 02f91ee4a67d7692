"""Verify files against their sha256 once per machine, and remember which ones were intact.

A file is hashed again when its path, size, inode or time of change differs from what was remembered, or
within `full_verification`. The memory is a small file beside the data, or in the user's cache folder if the
data are read-only. It belongs to one user on one machine: data on a shared disk are verified by each.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from stbench.core.errors import UserError
from stbench.core.files import atomic_write, hash_file
from stbench.core.text import print_line

SCHEMA = 1
"""Version of the memory files."""

ANNOUNCED = 1 << 30
"""Bytes from which hashing is announced, because it takes seconds."""

MAX_MEMORY = 1 << 28
"""Largest memory file that is read, in bytes."""

SETTLED = 2.0
"""Seconds since its last change after which a file's time of change tells whether it changes again."""

UNSETTLED = [0, 0, 0, 0]
"""Stamp of a file that was hashed too soon after a change; it matches none."""

Stamp = list[int]
"""Size, inode, and times of modification and change in nanoseconds."""

_full: ContextVar[bool] = ContextVar("full", default=False)
_hashed: dict[Path, tuple[Stamp, str]] = {}
"""Files that this process has hashed, so that no command hashes a file twice."""


@contextmanager
def full_verification(enabled: bool = True) -> Iterator[None]:
    """Hash every file again in a `with` block, whatever is remembered."""
    token = _full.set(enabled)
    try:
        yield
    finally:
        _full.reset(token)


def verify_files(folder: Path, expected: Mapping[str, str], remedy: str) -> None:
    """Check files of a folder against their recorded sha256.

    `expected` maps names within the folder to hashes. Raises UserError, which names the first damaged file
    and ends with `remedy`, if a file is missing or has another hash.
    """
    memory = _Memory(folder)
    unknown = [n for n, sha in expected.items() if _full.get() or memory.recall(n) != sha]
    wrong = []
    for name, (stamp, found) in _hash_all(folder, unknown, remedy).items():
        if found == expected[name]:
            memory.remember(name, stamp, found)
        else:
            wrong.append((name, found))
    memory.save()
    if wrong:
        name, found = wrong[0]
        others = f" ({len(wrong)} damaged files)" if len(wrong) > 1 else ""
        raise UserError(
            f"{folder / name} is damaged{others}: expected sha256 {expected[name][:12]}, "
            f"found {found[:12]}; {remedy}"
        )


def verify_unchanged(folder: Path, names: Sequence[str], remedy: str) -> None:
    """Check files without recorded hashes against the hashes of their first use on this machine.

    Raises UserError, which names the first changed file and ends with `remedy`, if a file is missing or has
    another hash than on its first use.
    """
    memory = _Memory(folder)
    unknown = [name for name in names if _full.get() or memory.recall(name) is None]
    wrong = []
    for name, (stamp, found) in _hash_all(folder, unknown, remedy).items():
        before = memory.sha256(name)
        if before in (None, found):
            memory.remember(name, stamp, found)
        else:
            wrong.append((name, before, found))
    memory.save()
    if wrong:
        name, before, found = wrong[0]
        others = f" ({len(wrong)} files)" if len(wrong) > 1 else ""
        raise UserError(
            f"{folder / name} has changed since its first use{others}: expected sha256 {str(before)[:12]}, "
            f"found {found[:12]}; {remedy}, or delete {memory.file} if the change is intended"
        )


def hash_and_remember(folder: Path, name: str) -> str:
    """Hash a file that was just written, so that its first use does not hash it again; returns the sha256."""
    stamp = _stamp(folder / name)
    digest = hash_file(folder / name)
    memory = _Memory(folder)
    memory.remember(name, stamp, digest)
    memory.save()
    return digest


def _hash_all(folder: Path, names: Sequence[str], remedy: str) -> dict[str, tuple[Stamp, str]]:
    """Hash files in parallel, except those that this process has hashed already."""

    def hashed(name: str) -> tuple[Stamp, str]:
        path = folder / name
        # The stamp is taken first: a file that changes while it is read does not count as known.
        stamp = _stamp(path)
        known = _hashed.get(path.absolute())
        if known is not None and known[0] == stamp:
            return known
        if time.time() - stamp[-1] / 1e9 < SETTLED:
            return UNSETTLED, hash_file(path)
        _hashed[path.absolute()] = stamp, hash_file(path)
        return _hashed[path.absolute()]

    try:
        total = sum(_stamp(folder / name)[0] for name in names)
        if total >= ANNOUNCED:
            print_line(f"verifying {len(names)} files in {folder} ({total / 2**30:.1f} GiB)", error=True)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return dict(zip(names, pool.map(hashed, names), strict=True))
    except OSError as error:
        raise UserError(f"cannot read {error.filename} ({error.strerror}); {remedy}") from error


def _stamp(path: Path) -> Stamp:
    status = path.stat()
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


class _Memory:
    """Which files of a folder were intact, and their stamps at that time."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._changed = folder.resolve(), False
        self._entries: dict[str, object] = {}
        for file in self._places():
            if (entries := _read(file, self._owner())) is not None:
                self._entries = entries
                break

    def recall(self, name: str) -> str | None:
        """Return the hash of a file that has not changed since it was verified, else None."""
        entry = self._entries.get(name)
        with suppress(OSError):
            if isinstance(entry, list) and entry[:-1] == _stamp(self._folder / name):
                return str(entry[-1])
        return None

    def sha256(self, name: str) -> str | None:
        """Return the remembered hash of a file, changed or not."""
        entry = self._entries.get(name)
        return str(entry[-1]) if isinstance(entry, list) and entry else None

    def remember(self, name: str, stamp: Stamp, sha256: str) -> None:
        """Note that a file was intact."""
        entry = [*stamp, sha256]
        self._changed |= self._entries.get(name) != entry
        self._entries[name] = entry

    @property
    def file(self) -> Path:
        """The file that contains the memory, or would."""
        return next((file for file in self._places() if file.is_file()), self._places()[0])

    def save(self) -> None:
        """Write the memory beside the data, or else to the cache folder; without either, nothing is kept."""
        if not self._changed:
            return
        content = {"schema": SCHEMA, "owner": self._owner(), "files": self._entries}
        text = json.dumps(content | {"sha256": _digest(content)}) + "\n"
        for file in self._places():
            with suppress(OSError, UserError):
                atomic_write(file, text)
                return

    def _owner(self) -> str:
        """The machine, the user and the folder: a copy of the folder with its memory is verified again."""
        return f"{platform.node()}:{_user()}:{os.fsencode(self._folder).hex()}"

    def _places(self) -> tuple[Path, Path]:
        name = hashlib.sha256(self._owner().encode()).hexdigest()[:16]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        return self._folder / f".verified-{name}.json", cache / "stbench" / f"verified-{name}.json"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container without an entry for the user
        return str(os.getuid()) if hasattr(os, "getuid") else "unknown"


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read(file: Path, owner: str) -> dict[str, object] | None:
    """Read a memory file; None if it is missing, damaged or of another owner."""
    try:
        if file.stat().st_size > MAX_MEMORY:
            return None
        content = json.loads(file.read_bytes())
        digest = content.pop("sha256")
    except (OSError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        return None
    if content.get("schema") != SCHEMA or content.get("owner") != owner or digest != _digest(content):
        return None
    entries = content["files"]
    return entries if isinstance(entries, dict) else None
