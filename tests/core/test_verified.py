"""Files are hashed once per machine, and again when anything about them changes."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from stbench.core import verified
from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.core.verified import full_verification, hash_and_remember, verify_files, verify_unchanged


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three files that were last changed long enough ago."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(name.encode() * 1000)
    monkeypatch.setattr(verified, "SETTLED", 0.05)
    time.sleep(0.05)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {name: hash_file(folder / name) for name in "abc"}


def memory(folder: Path) -> Path:
    (file,) = folder.glob(".verified-*.json")
    return file


def flip(file: Path) -> None:
    """Flip one bit without changing size or time of modification."""
    before = file.stat()
    with file.open("r+b") as opened:
        opened.seek(500)
        byte = opened.read(1)[0]
        opened.seek(500)
        opened.write(bytes([byte ^ 4]))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_files_are_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hashes(folder)
    verify_files(folder, expected, "copy it again")
    read: list[Path] = []
    monkeypatch.setattr(verified, "hash_file", lambda path: read.append(path) or hash_file(path))
    monkeypatch.setattr(verified, "_hashed", {})  # as in another process
    verify_files(folder, expected, "copy it again")
    assert not read
    with full_verification():
        verify_files(folder, expected, "copy it again")
    assert len(read) == 3


def test_damage_with_the_old_size_and_time_is_found(folder: Path) -> None:
    expected = hashes(folder)
    verify_files(folder, expected, "copy it again")
    flip(folder / "b")
    with pytest.raises(UserError, match=r"data/b is damaged: expected sha256 \w+, found \w+; copy it again"):
        verify_files(folder, expected, "copy it again")


def test_a_missing_file_is_named(folder: Path) -> None:
    expected = hashes(folder)
    (folder / "c").unlink()
    with pytest.raises(UserError, match="cannot read .*data/c .No such file or directory.; copy it again"):
        verify_files(folder, expected, "copy it again")


def test_a_copy_with_its_memory_is_verified_again(folder: Path, tmp_path: Path) -> None:
    expected = hashes(folder)
    verify_files(folder, expected, "copy it again")
    shutil.copytree(folder, tmp_path / "copy")
    flip(tmp_path / "copy" / "a")
    with pytest.raises(UserError, match="copy/a is damaged"):
        verify_files(tmp_path / "copy", expected, "copy it again")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b'{"sha256": 1}', b"\xff", b'"x"'])
def test_a_damaged_memory_is_as_good_as_none(folder: Path, content: bytes) -> None:
    expected = hashes(folder)
    verify_files(folder, expected, "copy it again")
    memory(folder).write_bytes(content)
    flip(folder / "a")
    with pytest.raises(UserError, match="data/a is damaged"):
        verify_files(folder, expected, "copy it again")


def test_an_edited_memory_does_not_count(folder: Path) -> None:
    expected = hashes(folder)
    verify_files(folder, expected, "copy it again")
    flip(folder / "a")
    content = json.loads(memory(folder).read_text())
    status = (folder / "a").stat()
    content["files"]["a"][:4] = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    memory(folder).write_text(json.dumps(content))
    with pytest.raises(UserError, match="data/a is damaged"):
        verify_files(folder, expected, "copy it again")


def test_read_only_data_are_remembered_in_the_cache_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write = verified.atomic_write

    def refuse(path: Path, content: str) -> None:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        write(path, content)

    monkeypatch.setattr(verified, "atomic_write", refuse)
    verify_files(folder, hashes(folder), "copy it again")
    assert not list(folder.glob(".verified-*"))
    assert len(list((tmp_path / "cache" / "stbench").iterdir())) == 1


def test_files_without_recorded_hashes_are_compared_with_their_first_use(folder: Path) -> None:
    verify_unchanged(folder, ["a", "b"], "copy it again")
    verify_unchanged(folder, ["a", "b", "c"], "copy it again")
    flip(folder / "a")
    with pytest.raises(UserError, match="data/a has changed since its first use.*, or delete .*verified-"):
        verify_unchanged(folder, ["a", "b", "c"], "copy it again")
    memory(folder).unlink()
    verify_unchanged(folder, ["a", "b", "c"], "copy it again")


def test_a_file_that_was_just_written_is_remembered_only_when_its_time_says_enough(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 1000)
    expected = {"a": hash_and_remember(tmp_path, "a")}
    flip(tmp_path / "a")  # within the same tick of the clock of the file system, perhaps
    with pytest.raises(UserError, match="a is damaged"):
        verify_files(tmp_path, expected, "copy it again")
