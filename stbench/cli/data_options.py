"""`stbench data ...`: parses, calls, prints; nothing else."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Prepare data sets, convert them, check them.")


class Precision(str, Enum):
    """What the autoencoder computes in."""

    fp32 = "fp32"
    bf16 = "bf16"


class Second(str, Enum):
    """What the second half of the channels holds."""

    std = "std"
    logvar = "logvar"


ShardCount = Annotated[
    int | None, typer.Option(min=1, help="Number of shards; default: one for every 10,000 images.")
]
References = Annotated[
    int, typer.Option(min=0, help="Training images whose pixels are kept, for evaluation during training.")
]


@app.command()
def prepare(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Folder of images, .tar of images, or a saved HF dataset.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make, or to finish.")],
    vae: Annotated[
        str, typer.Option(help="Autoencoder: sd-vae-ft-ema, sd-vae-ft-mse, a folder, or none for pixels.")
    ],
    size: Annotated[int, typer.Option(min=1, help="Height and width of the centre crop, in pixels.")] = 256,
    flip: Annotated[bool, typer.Option("--flip", help="Encode every image's mirror image as well.")] = False,
    shards: ShardCount = None,
    precision: Annotated[Precision, typer.Option(help="What the autoencoder computes in.")] = Precision.fp32,
    batch: Annotated[int, typer.Option(min=1, help="Images that are encoded at a time.")] = 32,
    references: References = 10_000,
    classes: Annotated[
        Path | None,
        typer.Option(help="Map file: JSON or lines of name and label; default: folders are classes."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Crop and encode images to sharded posterior moments; the same command goes on after a stop."""
    from stbench.cli import data as data_commands
    from stbench.core.device import pick_device
    from stbench.data.prepare import PrepareOptions

    chosen = pick_device(device)
    data_commands.prepare(
        PrepareOptions(
            source, target, vae, size, flip, shards, precision.value, batch, references, classes, chosen
        )
    )


@app.command(name="import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Folder that holds images/ and vae-sd/.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make, or to finish.")],
    vae: Annotated[
        str, typer.Option(help="Autoencoder that encoded it: a published name, or a folder.")
    ] = "sd-vae-ft-mse",
    second: Annotated[
        Second, typer.Option(help="What follows the mean: std as REPA stores it, or logvar.")
    ] = Second.std,
    shards: ShardCount = None,
    references: References = 10_000,
) -> None:
    """Convert a folder in REPA's layout to sharded posterior moments."""
    from stbench.cli import data as data_commands

    data_commands.import_repa(source, target, vae, second.value, shards, references)


@app.command()
def tokens(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="The images that SET was made from, in any form it takes.")
    ],
    prepared: Annotated[Path, typer.Argument(metavar="SET", help="A prepared data set.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to make.")],
    encoder: Annotated[
        str | None, typer.Option(help="A timm vision transformer, or digits; default: DINOv2-B/14.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Its weights; default: the Hugging Face cache.")
    ] = None,
    patch: Annotated[int, typer.Option(min=1, help="Patch size of the backbone that is to be taught.")] = 2,
    classes: Annotated[Path | None, typer.Option(help="Map file, if SET was prepared with one.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images that are encoded at a time.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Cache an encoder's tokens of a prepared set's training images, for the recipe repa."""
    from stbench.cli import data as data_commands
    from stbench.core.device import pick_device
    from stbench.data.cache_tokens import TokenOptions
    from stbench.models.encoders import DINOV2

    chosen, name = pick_device(device), encoder or DINOV2
    data_commands.tokens(
        TokenOptions(source, prepared, target, name, checkpoint, patch, classes, batch, chosen)
    )


@app.command()
def verify(target: Annotated[Path, typer.Argument(metavar="DST", help="A prepared data set.")]) -> None:
    """Read a prepared data set whole: sizes, shapes, checksums, labels and counts."""
    from stbench.cli import data as data_commands

    data_commands.verify(target)


@app.command()
def statistics(
    images: Annotated[
        Path, typer.Argument(help="Folder of images, npz with arr_0, or prepared data set (its references).")
    ],
    output: Annotated[Path, typer.Argument(help="npz to write, for `stbench evaluate --reference`.")],
    size: Annotated[
        int | None, typer.Option(min=1, help="Centre-crop a folder's images to this, as ADM crops ImageNet.")
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception weights; default: torch hub's cache.")
    ] = None,
    inception_sha256: Annotated[
        str | None, typer.Option(help="First digits of that file's sha256; default: the published file's.")
    ] = None,
    dino: Annotated[Path | None, typer.Option(help="DINOv2 weights, for FD-DINOv2 too.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images measured at once.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Measure real images once: a reference for `stbench evaluate`, with ADM's names for ADM's arrays."""
    from stbench.cli import evaluate as command
    from stbench.evaluate.feature_networks import NetworkFiles

    networks = NetworkFiles(inception, inception_sha256, dino)
    command.statistics(images, output, size, command.MeasureOptions(networks, batch, device))
