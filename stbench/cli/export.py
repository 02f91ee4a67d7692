"""`stbench export`: write a run's weights for other codebases."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stbench.cli import options
from stbench.core.errors import UserError
from stbench.core.text import print_line

if TYPE_CHECKING:
    from stbench.core.backbone import Backbone, Weights
    from stbench.evaluate.past_run import PastRun
    from stbench.evaluate.run_plugins import PluginChoice
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
    plugin: options.Plugins = [],  # noqa: B006
    allow_changed_plugin: options.AllowChangedPlugin = False,
) -> None:
    """Write a run's final weights for the published repositories or for diffusers."""
    from stbench.core.registry import load_builtins
    from stbench.evaluate.run_plugins import PluginChoice

    load_builtins()
    chosen = PluginChoice(tuple(plugin), allow_changed_plugin)
    for line in export_run(run, format.value, output, weights.value, plugins=chosen):
        print_line(line)


def export_run(
    path: Path, kind: Kind, output: Path, weights: Weights, *, plugins: PluginChoice | None = None
) -> list[str]:
    """Write a run's final weights; returns lines that say what was written and which code loads it.

    Raises:
        UserError: The other codebase cannot express the network, or the output exists.
    """
    from stbench.evaluate.past_run import open_run
    from stbench.evaluate.run_plugins import PluginChoice
    from stbench.models.export import export_network

    run = open_run(path, plugins or PluginChoice())
    if output.exists():
        raise UserError(f"{output} exists; choose another --output")
    network, spec = final_network(run, weights), run.prepared.spec
    return export_network(network, spec.backbone.effective, spec.objective, kind=kind, output=output)


def final_network(run: PastRun, weights: Weights) -> Backbone:
    """The network of the last stage at its last stored step: in eval mode, on the host.

    Raises:
        UserError: The run has no such weights yet.
    """
    return run.load(run.final_file(weights))
