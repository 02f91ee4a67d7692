"""`stbench export`: write a run's weights for other codebases."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stbench.core.errors import UserError
from stbench.core.text import print_line

if TYPE_CHECKING:
    from stbench.core.backbone import Backbone, Weights
    from stbench.evaluate.past_run import PastRun
    from stbench.models.export import Kind


class Format(str, Enum):
    """Codebases to write for."""

    official = "official"
    diffusers = "diffusers"


class WeightsChoice(str, Enum):
    """Choices of --weights."""

    ema = "ema"
    raw = "raw"


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    output: Annotated[
        Path, typer.Option(help="File to write (official, ends in .pt), or folder (diffusers).")
    ],
    format: Annotated[
        Format,
        typer.Option(help="official: the published repository's format; diffusers: DiTTransformer2DModel."),
    ] = Format.official,
    weights: Annotated[
        WeightsChoice, typer.Option(help="EMA weights, or raw weights of the last step.")
    ] = WeightsChoice.ema,
) -> None:
    """Write a run's final weights for the published repositories or for diffusers."""
    from stbench.core.registry import load_builtins

    load_builtins()
    for line in export_run(run, format.value, output, weights.value):
        print_line(line)


def export_run(path: Path, kind: Kind, output: Path, weights: Weights) -> list[str]:
    """Write a run's final weights; returns lines that say what was written and which code loads it.

    Raises:
        UserError: The other codebase cannot express the network, or the output exists.
    """
    from stbench.cli.outputs import require_outputs
    from stbench.core.outputs import Output
    from stbench.evaluate.past_run import open_run
    from stbench.models.export import export_network

    kind_of_output: Literal["file", "new folder"] = "file" if kind == "official" else "new folder"
    require_outputs([Output(output, kind=kind_of_output, remedy="choose another --output")])
    run = open_run(path)
    network, spec = final_network(run, weights), run.prepared.spec
    return export_network(network, spec.backbone.effective, spec.objective, kind=kind, output=output)


def final_network(run: PastRun, weights: Weights) -> Backbone:
    """The network of the last stage at its last stored step: in eval mode, on the host.

    Raises:
        UserError: The run has no such weights yet.
    """
    files = run.weight_files(weights)
    if not files:
        raise UserError(f"{run.folder.path} has no {weights} weights yet; finish it with `stbench run` first")
    return run.load(files[max(files)])
