"""`stbench data tokens`: cache the tokens of an encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stbench.cli import options
from stbench.cli.outputs import require_outputs
from stbench.cli.ranks import start_ranks
from stbench.core import limits
from stbench.core.outputs import Output
from stbench.core.text import print_line

if TYPE_CHECKING:
    from stbench.core.world import World
    from stbench.data.cache_tokens import TokenOptions
    from stbench.models.encoders import EncoderSpec


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
    patch: Annotated[int, typer.Option(min=1, max=limits.MAX_PIXELS, help="Patch size of the backbone.")] = 2,
    classes: Annotated[Path | None, typer.Option(help="Map file that SET was prepared with.")] = None,
    batch: Annotated[
        int, typer.Option(min=1, max=limits.MAX_BATCH, help="Images per call of the encoder.")
    ] = 64,
    class_token: Annotated[
        bool, typer.Option("--class-token", help="Write the class token too, before the tokens of an image.")
    ] = False,
    device: options.Device = "auto",
    devices: options.Devices = None,
) -> None:
    """Cache an encoder's tokens of the training images of a prepared data set, for the recipe repa."""
    from stbench.core.device import pick_device
    from stbench.data import cache_tokens
    from stbench.models.timm_models import DINOV2
    from stbench.train import launch

    start_ranks(devices, device)
    token_options = cache_tokens.TokenOptions(
        source,
        prepared,
        target,
        encoder=encoder or DINOV2,
        checkpoint=checkpoint,
        patch=patch,
        classes=classes,
        batch=batch,
        class_token=class_token,
        device=pick_device(device),
    )
    require_outputs(
        [Output(target, "DST", kind="folder", is_own=cache_tokens.is_token_folder)],
        [source, prepared, checkpoint, classes],
    )
    with launch.joined(token_options.device, devices) as world:
        rank_device = launch.local_device(token_options.device, world)
        count, spec = write_tokens(replace(token_options, device=rank_device), world)
    print_line(f"tokens of {count} images from {spec.name}, width {spec.width}: {target}")
    print_line(f"to train with them: --recipe repa --set recipe.encoder={target} --set data.flip=false")


def write_tokens(token_options: TokenOptions, world: World) -> tuple[int, EncoderSpec]:
    """Encode the images and write their tokens; returns how many images there are, and the encoder."""
    from stbench.cli.progress import counting_progress_bar
    from stbench.data import cache_tokens

    task = cache_tokens.open_task(token_options)
    with counting_progress_bar("tokens", len(task.ids)) as advance:
        return len(task.ids), cache_tokens.cache(token_options, task, advance, world)
