"""`stbench export`: write a run's weights for other codebases."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from stbench.cli import options
from stbench.core.errors import UserError
from stbench.core.text import print_line

if TYPE_CHECKING:
    from torch import Tensor

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


class HeadsChoice(str, Enum):
    """Choices of --with-heads."""

    repa = "repa"
    sra = "sra"
    vae_align = "vae-align"
    self_transcendence = "self-transcendence"
    internal_guidance = "internal-guidance"
    none = "none"


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
    with_heads: Annotated[
        HeadsChoice | None,
        typer.Option(
            help="Heads that this recipe's repository stores with the network, as its script requires: the "
            "run's own if it has them, else zeros. Default: the run's own, if any; none: without heads."
        ),
    ] = None,
    plugin: options.Plugins = [],  # noqa: B006
    allow_changed_plugin: options.AllowChangedPlugin = False,
) -> None:
    """Write a run's final weights for the published repositories or for diffusers."""
    from stbench.core.registry import load_builtins
    from stbench.evaluate.run_plugins import PluginChoice

    load_builtins()
    chosen = PluginChoice(tuple(plugin), allow_changed_plugin)
    heads = with_heads and with_heads.value
    for line in export_run(run, format.value, output, weights.value, heads, plugins=chosen):
        print_line(line)


def export_run(
    path: Path,
    kind: Kind,
    output: Path,
    weights: Weights,
    with_heads: str | None = None,
    *,
    plugins: PluginChoice | None = None,
) -> list[str]:
    """Write a run's final weights; returns lines that say what was written and which code loads it.

    `with_heads` is a recipe whose repository stores heads with the network, or "none"; by default the run's.

    Raises:
        UserError: The other codebase cannot express the network, or the output exists.
    """
    from stbench.cli.outputs import require_outputs
    from stbench.core.backbone import kept_heads
    from stbench.core.guides import HeadGuide
    from stbench.core.outputs import Output
    from stbench.evaluate.past_run import open_run
    from stbench.evaluate.run_plugins import PluginChoice
    from stbench.models.export import export_network
    from stbench.models.official_heads import HEAD

    kind_of_output: Literal["file", "new folder"] = "file" if kind == "official" else "new folder"
    require_outputs([Output(output, kind=kind_of_output, remedy="choose another --output")])
    run = open_run(path, plugins or PluginChoice())
    network, spec = final_network(run, weights), run.prepared.spec
    if kind == "diffusers":
        if with_heads not in (None, "none"):
            raise UserError("--with-heads applies to --format official; leave it out for diffusers")
        with_heads = "none"
    heads, found = _heads(run, with_heads, network)
    guide = run.last_stage.definition.guides.get(HEAD)
    block = {"head_block": guide.block} if isinstance(guide, HeadGuide) else {}
    written = export_network(
        network, spec.backbone.effective, spec.objective, kind=kind, output=output, heads=heads, **block
    )
    left = [name for name in kept_heads(network) if name != HEAD or not found.endswith("trained")]
    found += f"; left out: {', '.join(left)}" if left else ""
    return [written[0], f"heads: {found}", *written[1:]]


def _heads(run: PastRun, with_heads: str | None, network: Backbone) -> tuple[dict[str, Tensor], str]:
    """The heads to store under their repository's names, and what they are in words."""
    from stbench.evaluate.stored_heads import stored_heads
    from stbench.models.export_heads import rename_heads, stores_heads, zero_heads
    from stbench.models.official_heads import HEAD, stored_head

    recipe, guides = run.prepared.spec.recipe.name, run.last_stage.definition.guides
    own_repository = recipe if stores_heads(recipe) else "internal-guidance" if HEAD in guides else "none"
    wanted = with_heads or own_repository
    if wanted == "none":
        return {}, "none"
    stage, own = run.last_stage, {}
    if wanted == "internal-guidance" and HEAD in guides:
        return stored_head(network), f"{wanted}, trained"
    if wanted == recipe:
        own = stored_heads(run.folder.stage(stage.index, stage.name), max(run.weight_files("ema")))
    if own:
        return rename_heads(wanted, own), f"{wanted}, trained"  # type: ignore[arg-type]
    if with_heads is None:
        return {}, "none, because the run keeps no training state of this step"
    return zero_heads(wanted, network.info), f"{wanted}, zeros"  # type: ignore[arg-type]


def final_network(run: PastRun, weights: Weights) -> Backbone:
    """The network of the last stage at its last stored step: in eval mode, on the host.

    Raises:
        UserError: The run has no such weights yet.
    """
    return run.load(run.final_file(weights))
