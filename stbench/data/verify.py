"""Check the files of a prepared data set against the hashes in its manifest."""

from __future__ import annotations

from pathlib import Path

from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.core.text import print_line
from stbench.core.verified import verify_files
from stbench.data.shards import REMEDY, Manifest, Shard, open_array, read_manifest, require_size


def require_intact(folder: Path, manifest: Manifest) -> None:
    """Check every file of a prepared data set against its recorded sha256, once per machine.

    Raises UserError for the first file that is missing or damaged.
    """
    sizes = {
        f"{shard.name}-{array}.npy": file for shard in manifest.shards for array, file in shard.files.items()
    }
    for name, file in sizes.items():  # cheap, and says more than another hash
        require_size(folder / name, file.bytes)
    hashes = {name: file.sha256 for name, file in sizes.items() if file.sha256}
    if len(hashes) < len(sizes):
        print_line(
            f"{folder} was prepared by a version that recorded no hashes, so that damage cannot be noticed; "
            f"prepare the data again",
            error=True,
        )
    verify_files(folder, hashes, REMEDY)


def verify(folder: Path) -> tuple[Manifest, list[str]]:
    """Read every byte of a prepared data set; return its manifest and one line per damaged file.

    Checks sizes, dtypes, shapes, hashes, labels and counts. Raises UserError if the manifest cannot be read.
    """
    manifest, problems = read_manifest(folder), []
    for shard in manifest.shards:
        for array in shard.files:
            if problem := _problem(manifest, folder, shard, array):
                problems.append(problem)
    return manifest, problems


def _problem(manifest: Manifest, folder: Path, shard: Shard, array: str) -> str | None:
    """Return what is wrong with a file, None if nothing is."""
    path, expected = shard.path(folder, array), shard.files[array].sha256
    try:
        values = open_array(manifest, folder, shard, array)
    except UserError as error:
        return str(error).partition(";")[0]
    found = hash_file(path)  # whatever is remembered
    if expected and found != expected:
        return f"{path}: expected sha256 {expected[:12]}, found {found[:12]}"
    classes = len(manifest.classes)
    if array == "labels" and shard.count and not (values.min() >= 0 and values.max() < classes):
        return f"{path}: expected labels in 0..{classes - 1}, found {values.min()}..{values.max()}"
    if array == "split" and (kept := int((values > 0).sum())) != shard.images:
        return f"{path}: expected {shard.images} rows with pixels, found {kept}"
    return None
