"""The arguments of `stbench export`. No heavy import: `--help` answers at once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Format(str, Enum):
    """For whose code the weights are written."""

    official = "official"
    diffusers = "diffusers"


class Choice(str, Enum):
    """Which of a run's weights."""

    ema = "ema"
    raw = "raw"


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[
        Path, typer.Option(help="File to write (official, ends in .pt), or folder (diffusers).")
    ],
    format: Annotated[
        Format, typer.Option(help="official: the published repository's; diffusers: DiTTransformer2DModel.")
    ] = Format.official,
    weights: Annotated[
        Choice, typer.Option(help="Averaged weights, or those of the last step.")
    ] = Choice.ema,
) -> None:
    """Write a run's final weights for the published repositories, or for diffusers."""
    from stbench.cli.export import export_run
    from stbench.core.registry import load_builtins

    load_builtins()
    for line in export_run(run, format.value, output, weights.value):
        typer.echo(line)
