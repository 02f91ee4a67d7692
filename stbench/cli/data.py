"""`stbench data`: prepare data sets, convert them, check them, measure reference statistics."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stbench.cli import options, tokens
from stbench.cli.outputs import require_outputs
from stbench.cli.ranks import start_ranks
from stbench.core import limits
from stbench.core.errors import UserError
from stbench.core.outputs import Output
from stbench.core.text import print_line

if TYPE_CHECKING:
    from stbench.core.world import World
    from stbench.data.prepare import PrepareOptions
    from stbench.data.repa_layout import SecondHalf
    from stbench.data.shards import Manifest

LISTED = 10
"""Number of left-out images that are printed by name. The manifest lists all."""

app = typer.Typer(no_args_is_help=True, help="Prepare, convert and check data sets.")


class Precision(str, Enum):
    """Precision of the autoencoder."""

    fp32 = "fp32"
    bf16 = "bf16"


class Second(str, Enum):
    """What follows the mean in a moment file."""

    std = "std"
    logvar = "logvar"


ShardCount = Annotated[
    int | None,
    typer.Option(min=1, max=limits.MAX_BATCH, help="Number of shards; default: one per 10,000 images."),
]
References = Annotated[
    int,
    typer.Option(
        min=0,
        max=limits.MAX_SAMPLES,
        help="Training images whose pixels are kept as a reference of the evaluation.",
    ),
]


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SRC", help="ImageFolder-style directory, .tar, or saved Hugging Face dataset."
        ),
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, or to finish.")],
    vae: Annotated[
        str, typer.Option(help="Autoencoder: sd-vae-ft-ema, sd-vae-ft-mse, a folder, or none for pixels.")
    ],
    size: Annotated[
        int, typer.Option(min=1, max=limits.MAX_PIXELS, help="Height and width of the centre crop in pixels.")
    ] = 256,
    flip: Annotated[bool, typer.Option("--flip", help="Also encode the mirror images.")] = False,
    shards: ShardCount = None,
    precision: Annotated[Precision, typer.Option(help="Precision of the autoencoder.")] = Precision.fp32,
    batch: Annotated[
        int, typer.Option(min=1, max=limits.MAX_BATCH, help="Images per call of the encoder.")
    ] = 32,
    references: References = 10_000,
    classes: Annotated[
        Path | None,
        typer.Option(help="Map file: JSON or lines with name and label; default: folders are classes."),
    ] = None,
    device: options.Device = "auto",
    devices: options.Devices = None,
) -> None:
    """Crop and encode images to sharded posterior moments; rerun to resume."""
    from stbench.core.device import pick_device
    from stbench.data.prepare import PrepareOptions
    from stbench.train import launch

    start_ranks(devices, device)
    with launch.joined(pick_device(device), devices) as world:
        prepare_options = PrepareOptions(
            source,
            target,
            vae,
            size=size,
            flip=flip,
            shards=shards,
            precision=precision.value,
            batch=batch,
            references=references,
            classes=classes,
            device=launch.local_device(pick_device(device), world),
        )
        prepare_images(prepare_options, world)


def prepare_images(prepare_options: PrepareOptions, world: World | None = None) -> None:
    """Crop, encode and write images; print what was left out."""
    from stbench.cli.progress import counting_progress_bar
    from stbench.core.memory import require_memory
    from stbench.core.world import ALONE
    from stbench.data import prepare as preparing

    _require_set(prepare_options.target, prepare_options.source, prepare_options.classes)
    task = preparing.open_task(prepare_options)
    images = min(prepare_options.batch, len(task.source.ids))
    require_memory(
        prepare_options.device,
        images * 3 * prepare_options.size**2 * 4,
        f"a batch of {images} images of {prepare_options.size} pixels takes",
        "use a smaller --batch or --size",
    )
    with counting_progress_bar("encode", len(task.source.ids)) as advance:
        manifest, written = preparing.prepare(prepare_options, task, advance, world or ALONE)
    _print_summary(prepare_options.target, manifest, written)


def _require_set(target: Path, *inputs: Path | None) -> None:
    """Check that a data set can be written, or finished, at `target`, which is not in the inputs."""
    from stbench.data.shard_writer import is_prepared

    require_outputs([Output(target, "DST", kind="folder", is_own=is_prepared)], inputs)


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder with images/ and vae-sd/.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write, or to finish.")],
    vae: Annotated[
        str, typer.Option(help="Autoencoder that encoded it: a published name or a folder.")
    ] = "sd-vae-ft-mse",
    second: Annotated[
        Second, typer.Option(help="What follows the mean: std (as in REPA) or logvar.")
    ] = Second.std,
    shards: ShardCount = None,
    references: References = 10_000,
) -> None:
    """Convert a folder in REPA's layout to sharded posterior moments."""
    import_repa(source, target, vae, second=second.value, shards=shards, references=references)


def import_repa(
    source: Path, target: Path, vae: str, *, second: SecondHalf, shards: int | None, references: int
) -> None:
    """Convert a folder in REPA's layout; print what was written.

    Raises:
        UserError: The folder has another layout, or is damaged.
    """
    from stbench.cli.progress import counting_progress_bar
    from stbench.data import repa_convert, repa_layout

    _require_set(target, source)
    if not repa_layout.is_repa(source):
        raise UserError(
            f"expected REPA's layout in {source} ({repa_layout.IMAGES}/ and "
            f"{repa_layout.FEATURES}/{repa_layout.LABELS}), found none; "
            f"encode images with `stbench data prepare`"
        )
    folder = repa_layout.RepaFolder(source, second)
    decoder = repa_layout.find_decoder(folder, vae)
    with counting_progress_bar("convert", len(folder.ids)) as advance:
        manifest, written = repa_convert.convert(
            folder, target, decoder, shards=shards, references=references, advance=advance
        )
    if not manifest.vae_sha256:
        print_line(
            f"{vae} was not found: recorded its scale {manifest.scale}, but no hash of its weights",
            error=True,
        )
    _print_summary(target, manifest, written)


app.command()(tokens.tokens)


@app.command()
def verify(target: Annotated[Path, typer.Argument(metavar="DST", help="A prepared data set.")]) -> None:
    """Check every byte of a prepared data set: sizes, shapes, hashes, labels and counts."""
    from stbench.data import verify as verification

    manifest, problems = verification.verify(target)
    for problem in problems:
        print_line(problem, error=True)
    if problems:
        raise UserError(
            f"{target}: {len(problems)} damaged files; copy them again, or prepare the data again"
        )
    files = sum(len(shard.files) for shard in manifest.shards)
    print_line(f"{target}: {manifest.count} images, {files} files, all intact")


@app.command()
def statistics(
    images: Annotated[
        Path, typer.Argument(help="Folder of images, npz with arr_0, or prepared data set (its references).")
    ],
    output: Annotated[Path, typer.Argument(help="npz to write, for `stbench evaluate --reference`.")],
    size: Annotated[
        int | None,
        typer.Option(
            min=1, max=limits.MAX_PIXELS, help="Centre-crop the images of a folder to this size, as ADM does."
        ),
    ] = None,
    inception: options.Inception = None,
    inception_sha256: options.InceptionSha256 = None,
    dino: options.Dino = None,
    fdr: options.Fdr = None,
    batch: options.MeasureBatch = 64,
    device: options.Device = "auto",
    plugin: options.Plugins = [],  # noqa: B006
) -> None:
    """Compute the statistics of real images, a reference for `stbench evaluate`, in ADM's npz format."""
    from stbench.cli.progress import progress_bar
    from stbench.cli.scoring import print_ignored
    from stbench.core.device import pick_device
    from stbench.core.registry import load_plugins
    from stbench.data.spec import ratio_extractors
    from stbench.evaluate.feature_networks import NetworkFiles
    from stbench.evaluate.image_sets import open_images
    from stbench.evaluate.ratio_networks import load_networks
    from stbench.evaluate.reference import is_statistics, write_statistics

    if output.suffix != ".npz":
        raise UserError(f"the output must be a file that ends in .npz, found {output}; try {output}.npz")
    require_outputs([Output(output, "OUTPUT", is_own=is_statistics)], [images, inception, dino])
    found = open_images(images, size)
    print_ignored(found)
    torch_device = pick_device(device)
    load_plugins(plugin)
    files = NetworkFiles(inception, inception_sha256, dino)
    networks = load_networks(files, ratio_extractors(fdr.split(",") if fdr else ()), torch_device)
    with progress_bar("images", transient=True) as report:
        done = write_statistics(found, networks, output, batch=batch, device=torch_device, report=report)
    print_line(f"{done.count} images of {done.size[1]}x{done.size[0]}: {output}")


def _print_summary(target: Path, manifest: Manifest, written: bool) -> None:
    """Print the size of a data set and, on standard error, which files are not in it."""
    for name, why in manifest.unreadable[:LISTED]:
        print_line(f"left out: {name}: {why}", error=True)
    if len(manifest.unreadable) > LISTED:
        print_line(f"left out: {len(manifest.unreadable) - LISTED} more, listed in the manifest", error=True)
    if manifest.ignored:
        others = ", ".join(f"{count} {suffix}" for suffix, count in sorted(manifest.ignored.items()))
        print_line(f"ignored, not images: {others}", error=True)
    if not written:
        print_line(f"{target} is already finished; nothing to do")
    left_out = f", {len(manifest.unreadable)} left out" if manifest.unreadable else ""
    shards = f"{len(manifest.shards)} shards of {manifest.kind} {'x'.join(map(str, manifest.shape))}"
    print_line(f"{manifest.count} images in {len(manifest.classes)} classes{left_out}; {shards}: {target}")
