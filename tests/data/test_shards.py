"""Reading shards: damaged files are found and named; rows of any shards are read in order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from stbench.cli import data as data_commands
from stbench.core.errors import UserError
from stbench.data.prepare import PrepareOptions
from stbench.data.shards import MANIFEST, ShardedRows, dump_manifest, read_manifest
from stbench.data.verify import verify
from tests.data.conftest import COUNT


def damage(folder: Path, how: str) -> str:
    """Damage one file of a data set; returns what must be reported."""
    file = folder / "00001-moments.npy"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return "00001-moments.npy is truncated or changed"
    if how == "flipped byte":
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(data)
        return "00001-moments.npy: expected sha256"
    if how == "missing":
        file.unlink()
        return "00001-moments.npy is missing"
    text = (folder / MANIFEST).read_text()
    if how == "edited manifest":
        (folder / MANIFEST).write_text(text.replace('"scale": 0.18215', '"scale": 0.13025'))
        return "manifest.json was changed after it was written"
    if how == "schema":
        (folder / MANIFEST).write_text(text.replace('"schema": 1', '"schema": 99'))
        return "expected stbench-latents with schema 1, found stbench-latents with schema 99"
    if how == "list":
        (folder / MANIFEST).write_text("[1, 2]")
        return "manifest.json is damaged (TypeError('a JSON list instead of an object'))"
    (folder / MANIFEST).write_text(text[:200])
    return "manifest.json is damaged"


def test_an_intact_set_is_verified(finished: PrepareOptions, capsys: pytest.CaptureFixture[str]) -> None:
    data_commands.verify(finished.target)
    assert f"{COUNT} images, 15 files, all intact" in capsys.readouterr().out


@pytest.mark.parametrize(
    "how",
    ["truncated", "flipped byte", "missing", "edited manifest", "schema", "list", "truncated manifest"],
)
def test_verify_names_the_damaged_file(
    copied: PrepareOptions, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = damage(copied.target, how)
    with pytest.raises(UserError) as caught:
        data_commands.verify(copied.target)
    assert expected in f"{capsys.readouterr().err}{caught.value}"
    assert "\n" not in str(caught.value)


def test_verify_lists_every_damaged_file(copied: PrepareOptions, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = sorted(copied.target.glob("*-moments.npy"))[:2]
    first.write_bytes(first.read_bytes()[:-1])
    second.unlink()
    with pytest.raises(UserError, match="2 damaged files; copy them again"):
        data_commands.verify(copied.target)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and first.name in lines[0] and second.name in lines[1]


def test_verify_compares_hashes_with_the_manifest(copied: PrepareOptions) -> None:
    manifest = read_manifest(copied.target)
    files = manifest.shards[0].files
    wrong = {**files, "labels": replace(files["labels"], sha256="0" * 64)}
    shards = (replace(manifest.shards[0], files=wrong), *manifest.shards[1:])
    (copied.target / MANIFEST).write_text(dump_manifest(replace(manifest, shards=shards)))
    (problem,) = verify(copied.target)[1]
    assert "00000-labels.npy: expected sha256 000000000000" in problem


def test_verify_checks_labels_and_the_number_of_images_with_pixels(copied: PrepareOptions) -> None:
    manifest = read_manifest(copied.target)
    shards = (replace(manifest.shards[0], images=manifest.shards[0].images + 1), *manifest.shards[1:])
    fewer = replace(manifest, classes=list(manifest.classes)[:9], shards=shards)
    (copied.target / MANIFEST).write_text(dump_manifest(fewer))
    problems = "\n".join(verify(copied.target)[1])
    assert "-labels.npy: expected labels in 0..8, found" in problems
    assert f"00000-split.npy: expected {shards[0].images} rows with pixels" in problems
    assert "00000-images.npy: expected uint8" in problems


def test_rows_of_any_shards_are_read_in_the_given_order() -> None:
    arrays = [np.arange(a * 10, a * 10 + 2 * n).reshape(n, 2, 1) for a, n in ((0, 3), (9, 0), (1, 4))]
    shards = ShardedRows(arrays)
    whole = np.concatenate(arrays)
    rows, view = np.array([6, 0, 2, 3, 6]), np.array([1, 0, 1, 0, 0])
    assert np.array_equal(shards.read(rows, view), whole[rows, view])
    assert shards.read(rows[:0], view[:0]).shape == (0, 1)
    assert np.array_equal(shards.read(rows[1:2], view[1:2]), whole[:1, 0])
