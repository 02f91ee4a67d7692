"""What the commands of `stbench data` do: call, show progress, print the result."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stbench.core.errors import UserError
from stbench.data import cache_tokens, repa_layout, shards
from stbench.data import prepare as preparing
from stbench.data.shards import Manifest

LISTED = 10
"""Number of left-out images that are printed by name. The manifest lists all."""


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error: images done, images/s, time left."""
    columns = (
        TextColumn(what),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]} images/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total, rate="-")

        def advance(count: int) -> None:
            progress.advance(task, count)
            speed = progress.tasks[0].speed
            progress.update(task, rate="-" if speed is None else f"{speed:.0f}")

        yield advance


def prepare(options: preparing.PrepareOptions) -> None:
    """Crop, encode and write images; print what was left out."""
    task = preparing.open_task(options)
    with _progress(len(task.source.ids), "encode") as advance:
        manifest, written = preparing.prepare(options, task, advance)
    _print_summary(options.target, manifest, written)


def import_repa(
    source: Path,
    target: Path,
    vae: str,
    *,
    second: repa_layout.SecondHalf,
    shards: int | None,
    references: int,
) -> None:
    """Convert a folder in REPA's layout."""
    if not repa_layout.is_repa(source):
        raise UserError(
            f"expected REPA's layout in {source} ({repa_layout.IMAGES}/ and "
            f"{repa_layout.FEATURES}/{repa_layout.LABELS}), found none; "
            f"encode images with `stbench data prepare`"
        )
    folder = repa_layout.RepaFolder(source, second)
    decoder = repa_layout.find_decoder(folder, vae)
    with _progress(len(folder.ids), "convert") as advance:
        manifest, written = repa_layout.convert(
            folder, target, decoder, shards=shards, references=references, advance=advance
        )
    if not manifest.vae_sha256:
        print(
            f"{vae} was not found: recorded its scale {manifest.scale}, but no hash of its weights",
            file=sys.stderr,
        )
    _print_summary(target, manifest, written)


def tokens(options: cache_tokens.TokenOptions) -> None:
    """Cache an encoder's tokens; print how to train with them."""
    task = cache_tokens.open_task(options)
    with _progress(len(task.ids), "tokens") as advance:
        spec = cache_tokens.cache(options, task, advance)
    print(f"tokens of {len(task.ids)} images from {spec.name}, width {spec.width}: {options.target}")
    print(f"to train with them: --recipe repa --set recipe.encoder={options.target} --set data.flip=false")


def _print_summary(target: Path, manifest: Manifest, written: bool) -> None:
    """Print the size of a data set and, on standard error, which files are not in it."""
    for name, why in manifest.unreadable[:LISTED]:
        print(f"left out: {name}: {why}", file=sys.stderr)
    if len(manifest.unreadable) > LISTED:
        print(f"left out: {len(manifest.unreadable) - LISTED} more, listed in the manifest", file=sys.stderr)
    if manifest.ignored:
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(manifest.ignored.items()))
        print(f"ignored, not images: {others}", file=sys.stderr)
    if not written:
        print(f"{target} is already finished; nothing to do")
    left_out = f", {len(manifest.unreadable)} left out" if manifest.unreadable else ""
    shards = f"{len(manifest.shards)} shards of {manifest.kind} {'x'.join(map(str, manifest.shape))}"
    print(f"{manifest.count} images in {len(manifest.classes)} classes{left_out}; {shards}: {target}")


def verify(target: Path) -> None:
    """Check every byte of a prepared data set. Raises UserError after printing the damaged files."""
    manifest, problems = shards.verify(target)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise UserError(
            f"{target}: {len(problems)} damaged files; copy them again, or prepare the data again"
        )
    files = sum(len(shard.files) for shard in manifest.shards)
    print(f"{target}: {manifest.count} images, {files} files, all intact")
