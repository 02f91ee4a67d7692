"""The options of the commands of `stbench data`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

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
    int | None, typer.Option(min=1, help="Number of shards; default: one per 10,000 images.")
]
References = Annotated[
    int,
    typer.Option(min=0, help="Training images whose pixels are kept as a reference of the evaluation."),
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
    size: Annotated[int, typer.Option(min=1, help="Height and width of the centre crop in pixels.")] = 256,
    flip: Annotated[bool, typer.Option("--flip", help="Also encode the mirror images.")] = False,
    shards: ShardCount = None,
    precision: Annotated[Precision, typer.Option(help="Precision of the autoencoder.")] = Precision.fp32,
    batch: Annotated[int, typer.Option(min=1, help="Images per call of the encoder.")] = 32,
    references: References = 10_000,
    classes: Annotated[
        Path | None,
        typer.Option(help="Map file: JSON or lines with name and label; default: folders are classes."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Crop and encode images to sharded posterior moments. Rerun the same command to resume."""
    from stbench.cli import data as data_commands
    from stbench.core.device import pick_device
    from stbench.data.prepare import PrepareOptions

    data_commands.prepare(
        PrepareOptions(
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
            device=pick_device(device),
        )
    )


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
    from stbench.cli import data as data_commands

    data_commands.import_repa(source, target, vae, second=second.value, shards=shards, references=references)


@app.command()
def tokens(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="The images that SET was made from, or the imported folder.")
    ],
    prepared: Annotated[Path, typer.Argument(metavar="SET", help="A prepared data set.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    encoder: Annotated[
        str | None, typer.Option(help="A timm vision transformer, or digits; default: DINOv2-B/14.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of the encoder; default: from the Hugging Face cache.")
    ] = None,
    patch: Annotated[int, typer.Option(min=1, help="Patch size of the backbone.")] = 2,
    classes: Annotated[Path | None, typer.Option(help="Map file that SET was prepared with.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call of the encoder.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Cache an encoder's tokens of the training images of a prepared data set, for the recipe repa."""
    from stbench.cli import data as data_commands
    from stbench.core.device import pick_device
    from stbench.data.cache_tokens import TokenOptions
    from stbench.models.encoders import DINOV2

    data_commands.tokens(
        TokenOptions(
            source,
            prepared,
            target,
            encoder=encoder or DINOV2,
            checkpoint=checkpoint,
            patch=patch,
            classes=classes,
            batch=batch,
            device=pick_device(device),
        )
    )


@app.command()
def verify(target: Annotated[Path, typer.Argument(metavar="DST", help="A prepared data set.")]) -> None:
    """Check every byte of a prepared data set: sizes, shapes, hashes, labels and counts."""
    from stbench.cli import data as data_commands

    data_commands.verify(target)


@app.command()
def statistics(
    images: Annotated[
        Path, typer.Argument(help="Folder of images, npz with arr_0, or prepared data set (its references).")
    ],
    output: Annotated[Path, typer.Argument(help="npz to write, for `stbench evaluate --reference`.")],
    size: Annotated[
        int | None,
        typer.Option(min=1, help="Centre-crop the images of a folder to this size, as ADM does."),
    ] = None,
    inception: Annotated[
        Path | None, typer.Option(help="Inception weights; default: from the torch hub cache.")
    ] = None,
    inception_sha256: Annotated[
        str | None, typer.Option(help="First digits of that file's sha256; default: the published file's.")
    ] = None,
    dino: Annotated[Path | None, typer.Option(help="DINOv2 weights, to add FD-DINOv2.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per call of the feature network.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Compute the statistics of real images, a reference for `stbench evaluate`, in ADM's npz format."""
    from stbench.cli import evaluate as command
    from stbench.evaluate.feature_networks import NetworkFiles

    networks = NetworkFiles(inception, inception_sha256, dino)
    command.statistics(images, output, size, command.MeasureOptions(networks, batch, device))
