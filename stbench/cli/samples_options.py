"""The options of `stbench evaluate`.

Heavy modules are imported inside the commands, so that `--help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    samples_or_run: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="A run folder, an ADM-style npz, or a folder of images.")
    ],
    reference: Annotated[
        Path | None,
        typer.Option(help="ADM npz, file of `data statistics`, or images; default: the run's own data."),
    ] = None,
    eval_guidance: Annotated[str | None, typer.Option(help="Guidance scales, e.g. 1.0,1.5,2.0.")] = None,
    samples: Annotated[int | None, typer.Option(min=10, help="Number of generated images per row.")] = None,
    overrides: Annotated[
        list[str], typer.Option("--set", help="Other evaluation settings, e.g. eval.steps=50.")
    ] = [],  # noqa: B006
    inception: Annotated[
        Path | None, typer.Option(help="Inception weights; default: torch hub's cache.")
    ] = None,
    inception_sha256: Annotated[
        str | None, typer.Option(help="First digits of the file's sha256; default: the published file's.")
    ] = None,
    dino: Annotated[Path | None, typer.Option(help="DINOv2 weights; adds FD-DINOv2.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON to write; default: next to the samples.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images per measured batch.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Score samples against a reference, or evaluate a run's stored weights under another protocol."""
    from stbench.cli import evaluate as command
    from stbench.evaluate.feature_networks import NetworkFiles

    networks = NetworkFiles(inception, inception_sha256, dino)
    measure = command.MeasureOptions(networks, batch, device)
    run = command.RunOptions(eval_guidance, samples, tuple(overrides))
    command.evaluate(samples_or_run, reference, output, measure=measure, run=run)
