"""Atomic writes, disk-full errors, folder locks and file hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from stbench.core.errors import UserError
from stbench.core.files import (
    atomic_file,
    atomic_folder,
    atomic_write,
    hash_file,
    is_locked,
    lock_folder,
    remove_unfinished,
    temporary_path,
    write_array,
)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fsync fails with ENOSPC, where a file system reports a full disk at the latest."""

    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may have at most 5000 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_text_and_bytes_are_written_and_parent_folders_created(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a" / "b" / "text", "Größe\n")
    atomic_write(tmp_path / "a" / "bytes", b"\x00\xff")
    assert (tmp_path / "a" / "b" / "text").read_bytes() == "Größe\n".encode()
    assert (tmp_path / "a" / "bytes").read_bytes() == b"\x00\xff"


def test_a_failed_block_keeps_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "file") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_readers_see_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", "old")
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"


def test_a_full_disk_is_a_user_error_that_names_the_file(tmp_path: Path, full_disk: None) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(
        UserError,
        match=r"cannot write .*/file: No space left .* \(3 bytes needed, .* free",
    ):
        atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_file_size_limit_is_reported_like_a_full_disk(tmp_path: Path, small_files: None) -> None:
    with pytest.raises(UserError, match=r"cannot write .*b.npy: File too large \(5.9\d+ KiB needed\)"):
        write_array(tmp_path / "b.npy", np.zeros(6000, np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_other_os_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), atomic_file(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "no")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "array", [np.arange(24).reshape(2, 3, 4), np.ones((3, 2)).T, np.empty((0, 4), np.float16)]
)
def test_an_array_is_readable_by_numpy_and_its_hash_is_that_of_the_file(
    tmp_path: Path, array: np.ndarray
) -> None:
    file = tmp_path / "array.npy"
    digest = write_array(file, array)
    found = np.load(file)
    assert np.array_equal(found, array) and found.dtype == array.dtype
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_folder_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "deep" / "new") as draft:
        (draft / "file").write_text("content")
        assert not (tmp_path / "deep" / "new").exists()
    assert (tmp_path / "deep" / "new" / "file").read_text() == "content"
    with pytest.raises(ValueError), atomic_folder(tmp_path / "other") as draft:
        (draft / "file").write_text("content")
        raise ValueError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep"]


def test_unfinished_files_are_removed_and_no_others(tmp_path: Path) -> None:
    names = [".a.12.tmp", ".b.npz.7.tmp", ".notes.tmp", "c.tmp"]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "sub" / ".png.3.tmp").mkdir(parents=True)
    (tmp_path / "sub" / ".png.3.tmp" / "000000.png").touch()
    remove_unfinished(tmp_path, "b.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.12.tmp", ".notes.tmp", "c.tmp", "sub"]
    remove_unfinished(tmp_path, recursive=True)
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [".notes.tmp", "c.tmp", "sub"]


def test_the_hash_of_several_files_is_that_of_their_bytes_in_order(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two" * 3_000_000)
    expected = hashlib.sha256(b"one" + b"two" * 3_000_000).hexdigest()
    assert hash_file(tmp_path / "a", tmp_path / "b") == expected
    assert hash_file(tmp_path / "a") == hashlib.sha256(b"one").hexdigest()


HOLD = "import sys, time; from pathlib import Path; from stbench.core.files import lock_folder\n" \
    "with lock_folder(Path(sys.argv[1]), ''):\n    print('held', flush=True); time.sleep(60)"  # fmt: skip


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[[], int]]:
    """Start a process that holds the lock of `tmp_path`; returns its process id."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"

        def kill() -> int:
            process.kill()
            process.wait()
            return process.pid

        yield kill
        kill()


def test_a_locked_folder_is_refused_until_its_owner_is_killed(
    tmp_path: Path, owner: Callable[[], int]
) -> None:
    assert is_locked(tmp_path)
    with pytest.raises(UserError) as caught, lock_folder(tmp_path, "wait for it"):
        raise AssertionError("the folder was locked twice")
    pid = owner()
    assert str(caught.value) == f"{tmp_path} is in use by process {pid}; wait for it"
    assert not is_locked(tmp_path)
    with lock_folder(tmp_path, ""):
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_a_lock_excludes_its_own_process_too_and_ends_with_the_block(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    assert not is_locked(folder)
    for _ in range(2):
        with lock_folder(folder, ""), pytest.raises(UserError, match=f"in use by process {os.getpid()}"):
            lock_folder(folder, "").__enter__()
        assert not is_locked(folder)


def test_a_lock_file_that_is_a_link_does_not_touch_its_target(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    (tmp_path / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"\.lock is a link"):
        lock_folder(tmp_path, "").__enter__()
    assert (tmp_path / "precious").read_text() == "content"


def test_a_lock_file_that_is_a_hard_link_or_has_other_content_is_not_written(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("1")
    os.link(tmp_path / "precious", tmp_path / ".lock")
    for use in (lambda: lock_folder(tmp_path, "").__enter__(), lambda: is_locked(tmp_path)):
        with pytest.raises(UserError, match=r"\.lock is a link"):
            use()
    assert (tmp_path / "precious").read_text() == "1"
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").write_bytes(b"\xff notes")
    with lock_folder(tmp_path, ""), pytest.raises(UserError, match=r"in use by process (unknown|\d+)"):
        lock_folder(tmp_path, "").__enter__()
    # Versions of filelock for Python 3.10 truncate a lock file when they own it.
    if sys.version_info >= (3, 11):
        assert (tmp_path / ".lock").read_bytes() == b"\xff notes"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_lock_that_is_not_a_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / ".lock")
    with pytest.raises(UserError, match="is not a file"):
        lock_folder(tmp_path, "").__enter__()


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("content")
    temporary_path(tmp_path / "new").symlink_to(tmp_path / "precious")
    atomic_write(tmp_path / "new", "other")
    assert (tmp_path / "precious").read_text() == "content" and (tmp_path / "new").read_text() == "other"


def test_a_write_of_unknown_size_says_how_much_there_was(tmp_path: Path, full_disk: None) -> None:
    with (
        pytest.raises(UserError, match=r"\(more than 2 KiB needed, .* free on its disk\)"),
        atomic_file(tmp_path / "file") as file,
    ):
        file.write(bytes(2048))


def test_a_full_disk_does_not_fail_at_the_lock(tmp_path: Path, small_files: None) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with (
        lock_folder(tmp_path, ""),
        pytest.raises(UserError, match=r"cannot write .*status\.json: File too large \(.* needed\)"),
    ):
        atomic_write(tmp_path / "status.json", "{}")
