"""`stbench data ...`: parses and calls. No heavy import at the top."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Prepare data sets, convert them, check them.")


@app.command()
def statistics(
    images: Annotated[Path, typer.Argument(help="Folder of images of one size, or an npz with arr_0.")],
    output: Annotated[Path, typer.Argument(help="npz to write, for `stbench evaluate --reference`.")],
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
    from stbench import scoring

    weights = {"inception": inception, "inception_sha256": inception_sha256, "dino": dino}
    scoring.statistics(images, output, scoring.Measuring.of(weights, batch, device))
