"""What the commands of `stbench data` do: call, show progress, print what came out."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stbench.core.errors import UserError
from stbench.data import cache_tokens as caching
from stbench.data import prepare as preparing
from stbench.data import repa_layout as repa
from stbench.data import shards as latent_store
from stbench.data.shards import Manifest

NAMED = 10
"""Images left out that are printed by name; the manifest names all."""


@contextlib.contextmanager
def _progress(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on standard error: images done, images a second, time left."""
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


def prepare(job: preparing.PrepareOptions) -> None:
    """Crop, encode and write; say what was left out."""
    listed = preparing.open_task(job)
    with _progress(len(listed.source.ids), "encode") as advance:
        manifest, worked = preparing.prepare(job, listed, advance)
    _summary(job.target, manifest, worked)


def import_repa(
    source: Path, target: Path, vae: str, second: repa.Second, shards: int | None, references: int
) -> None:
    """Convert REPA's layout."""
    if not repa.is_repa(source):
        raise UserError(
            f"expected REPA's layout in {source} (images/ and {repa.FEATURES}/{repa.LABELS}), found none; "
            f"images are encoded with `stbench data prepare`"
        )
    found = repa.Repa(source, second)
    decoder = repa.decoder_of(found, vae)
    with _progress(len(found.ids), "convert") as advance:
        manifest, worked = repa.convert(found, target, decoder, shards, references, advance)
    if not manifest.vae_sha256:
        print(f"{vae} is not here: its hash is not recorded, its scale {manifest.scale} is", file=sys.stderr)
    _summary(target, manifest, worked)


def tokens(job: caching.TokenOptions) -> None:
    """Cache an encoder's tokens; say how they are used."""
    listed = caching.open_task(job)
    with _progress(len(listed.ids), "tokens") as advance:
        made = caching.cache(job, listed, advance)
    print(f"tokens of {len(listed.ids)} images by {made.name}, {made.width} wide: {job.target}")
    print(f"train on them: --recipe repa --set recipe.encoder={job.target} --set data.flip=false")


def _summary(target: Path, manifest: Manifest, worked: bool) -> None:
    for name, why in manifest.unreadable[:NAMED]:
        print(f"left out: {name}: {why}", file=sys.stderr)
    if len(manifest.unreadable) > NAMED:
        print(f"left out: {len(manifest.unreadable) - NAMED} more, named in the manifest", file=sys.stderr)
    if manifest.ignored:
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(manifest.ignored.items()))
        print(f"not taken for images: {others}", file=sys.stderr)
    if not worked:
        print(f"{target} is finished: left alone")
    left_out = f", {len(manifest.unreadable)} left out" if manifest.unreadable else ""
    shards = f"{len(manifest.shards)} shards of {manifest.kind} {'x'.join(map(str, manifest.shape))}"
    print(f"{manifest.count} images in {len(manifest.classes)} classes{left_out}; {shards}: {target}")


def verify(target: Path) -> None:
    """Check every byte; UserError that names the files which are not whole."""
    manifest, problems = latent_store.verify(target)
    if problems:
        for problem in problems:
            print(problem, file=sys.stderr)
        raise UserError(
            f"{target}: {len(problems)} files are not as written; copy them again, or prepare the data anew"
        )
    files = sum(len(shard.files) for shard in manifest.shards)
    print(f"{target}: {manifest.count} images, {files} files, all as written")
