"""`stbench list`: the registered backbones, recipes, data sets, objectives and samplers, and the metrics."""

from __future__ import annotations

import inspect
import json
import re
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stbench.cli import options

if TYPE_CHECKING:
    from stbench.core.backbone import Backbone

IMAGENET = {"channels": 4, "input_size": 32, "classes": 1000}
"""Latents of 256x256 images, for which the published sizes are counted."""
COUNTED_ON = "sit-ti/2"
"""Backbone on which the overhead of a recipe is counted."""

Row = dict[str, Any]


class Kind(str, Enum):
    """What `list` lists."""

    backbones = "backbones"
    recipes = "recipes"
    datasets = "datasets"
    objectives = "objectives"
    samplers = "samplers"
    metrics = "metrics"


def list_registry(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugin: options.Plugins = [],  # noqa: B006
) -> None:
    """List what is registered, with parameter counts, costs, options and defaults."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stbench.core.registry import load_builtins, load_plugins
    from stbench.core.text import visible

    load_builtins()
    load_plugins(plugin)
    rows = _ROWS[kind]()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(*rows[0]) if rows else Table(kind.value)
    for row in rows:
        # Text, because a str would be parsed as rich markup; the help of a recipe has several lines.
        lines = [map(visible, str(value).splitlines()) for value in row.values()]
        table.add_row(*(Text("\n".join(cell)) for cell in lines))
    Console().print(table)


def _backbone_rows() -> list[Row]:
    from stbench.core.registry import BACKBONES, lookup, names

    rows = []
    for name in names(BACKBONES):
        family = lookup(BACKBONES, name)
        for size in family.presets:
            network = _published_network(family, size)
            info = network.info
            rows.append(
                {
                    "backbone": f"{name}-{size}",
                    "objective": family.presets[size].get("objective", family.objective),
                    "blocks": info.depth,
                    "width": info.width,
                    "tokens": info.tokens,
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "GMACs": round(network.flops() / 2e9, 2),
                    "counted at": f"{info.channels}x{info.input_size}x{info.input_size}",
                }
            )
    return rows


def _published_network(family: Any, size: str) -> Backbone:
    """A preset on the meta device at its published latent size: that of the digits for ti, else 256x256."""
    import torch

    from stbench.config.build import build_objective
    from stbench.core.registry import DATASETS, lookup

    preset = {name: value for name, value in family.presets[size].items() if name != "objective"}
    facts = IMAGENET
    if size.startswith("ti"):
        digits = lookup(DATASETS, "digits")
        facts = {"channels": digits.channels, "input_size": digits.input_size, "classes": digits.classes}
    objective = build_objective(family.presets[size].get("objective", family.objective))
    out_channels = objective.out_channels(facts["channels"])
    with torch.device("meta"):
        return family(**facts, out_channels=out_channels, size=size, **preset)


def _recipe_rows() -> list[Row]:
    from stbench.core.registry import RECIPES, lookup, names

    vanilla = sum(_stage_flops("vanilla"))
    rows = []
    for name in sorted(names(RECIPES)):
        recipe = lookup(RECIPES, name)
        parameters = list(inspect.signature(recipe).parameters.values())[1:]  # the first is the backbone info
        recipe_options = ", ".join(f"{p.name}={p.default}" for p in parameters)
        costs = _stage_flops(name)
        overhead = f"{costs[-1] / vanilla:.2f}" if costs else "not counted"
        if len(costs) > 1:
            overhead += f", {sum(costs) / vanilla:.2f} with its teacher"
        rows.append(
            {
                "recipe": name,
                # The continuation lines of an option's description are joined.
                "help": re.sub(r"\n +", " ", inspect.getdoc(recipe) or ""),
                "options": recipe_options or "none",
                f"FLOPs, x vanilla ({COUNTED_ON} on the digits)": overhead,
            }
        )
    return rows


def _stage_flops(recipe: str) -> list[float]:
    """Training FLOPs of each stage with default options; [] for a plug-in that does not fit the network."""
    from stbench.config.plan import prepare
    from stbench.config.resolve import RunRequest, resolve
    from stbench.core.errors import UserError
    from stbench.train.cost import expected_cost

    try:
        prepared = prepare(resolve(RunRequest(COUNTED_ON, recipe)))
        return [expected_cost(prepared, stage).total for stage in prepared.stages]
    except UserError:
        return []


def _dataset_rows() -> list[Row]:
    from stbench.core.registry import DATASETS, lookup, names

    rows = []
    for name in names(DATASETS):
        dataset = lookup(DATASETS, name)
        rows.append(
            {
                "dataset": name,
                "images": dataset.size or "yours",
                "latents": f"{dataset.channels}x{dataset.input_size}x{dataset.input_size}",
                "classes": dataset.classes or "yours",
                "help": _first_paragraph(dataset),
            }
        )
    return rows


def _objective_rows() -> list[Row]:
    from stbench.core.registry import OBJECTIVES, lookup, names

    objectives = {name: lookup(OBJECTIVES, name) for name in sorted(names(OBJECTIVES))}
    return [
        {"objective": name, "samplers": ", ".join(cls.samplers), "help": _first_paragraph(cls)}
        for name, cls in objectives.items()
    ]


def _sampler_rows() -> list[Row]:
    from stbench.core.registry import SAMPLERS, lookup, names

    samplers = {name: lookup(SAMPLERS, name) for name in sorted(names(SAMPLERS))}
    return [{"sampler": name, "help": _first_paragraph(cls)} for name, cls in samplers.items()]


def _metric_rows() -> list[Row]:
    from stbench.evaluate.metrics import METRICS
    from stbench.evaluate.scores import SCORES

    return [{"metric": name, "help": text} for name, text in (*METRICS.items(), *SCORES.items())]


def _first_paragraph(registered: Any) -> str:
    """First paragraph of a docstring, in one line."""
    return (inspect.getdoc(registered) or "").split("\n\n")[0].replace("\n", " ")


_ROWS = {
    Kind.backbones: _backbone_rows,
    Kind.recipes: _recipe_rows,
    Kind.datasets: _dataset_rows,
    Kind.objectives: _objective_rows,
    Kind.samplers: _sampler_rows,
    Kind.metrics: _metric_rows,
}
