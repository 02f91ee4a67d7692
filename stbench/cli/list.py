"""`stbench list`: the registered backbones, recipes, data sets, objectives and samplers, and the metrics."""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import textwrap
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stbench.cli import options

if TYPE_CHECKING:
    from stbench.core.backbone import Backbone

IMAGENET = {"channels": 4, "input_size": 32, "classes": 1000}
"""Latents of 256x256 images, for which the published sizes are counted."""
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
    name: Annotated[
        str | None, typer.Argument(help="Only this one; for a recipe, a page with its options.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plugin: options.Plugins = [],  # noqa: B006
) -> None:
    """List what is registered, with parameter counts, costs, options and defaults."""
    from stbench.core.registry import load_builtins, load_plugins

    load_builtins()
    load_plugins(plugin)
    if kind is Kind.recipes and not as_json:
        if name is None:
            _print_recipes()
        else:
            _print_recipe(name)
        return
    rows = _ROWS[kind]()
    if name is not None:
        rows = [_named(rows, name)]
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        _print_rows(rows, kind)


def _print_rows(rows: Sequence[Row], kind: Kind) -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    from stbench.core.text import visible

    first, *others = rows[0] if rows else [kind.value]
    table = Table(Column(first, no_wrap=True), *others)
    for row in rows:
        # Text, because a str would be parsed as rich markup; the help of a recipe has several lines.
        lines = [map(visible, str(value).splitlines()) for value in row.values()]
        table.add_row(*(Text("\n".join(cell)) for cell in lines))
    Console().print(table)


def _named(rows: Sequence[Row], name: str) -> Row:
    """Return the row whose first field is `name`."""
    from stbench.core.errors import UserError
    from stbench.core.registry import suggest
    from stbench.core.text import visible

    found = {str(next(iter(row.values()))): row for row in rows}
    if name not in found:
        raise UserError(f"nothing is named {visible(name, 60)}{suggest(name, sorted(found))}")
    return found[name]


def _print_recipes() -> None:
    """Print one line per recipe, with its cost."""
    from stbench.cli.recipe_cost import COUNTED_ON, extra_cost
    from stbench.cli.recipe_page import read_page
    from stbench.compare.format import Section
    from stbench.compare.terminal import print_section, print_text, terminal_width
    from stbench.core.registry import RECIPES, lookup, names

    known = sorted(names(RECIPES))
    costs = [extra_cost(name) for name in known]
    rest = max(terminal_width() - max(map(len, known)) - max(map(len, costs)) - 4, 20)
    summaries = (read_page(name, lookup(RECIPES, name)).summary for name in known)
    lines = [
        (name, cost, textwrap.shorten(summary, rest, placeholder=" ..."))
        for name, cost, summary in zip(known, costs, summaries, strict=True)
    ]
    header = ("recipe", "cost", "what it does")
    print_section(Section("", header, tuple(lines), frozenset({0, 2})), title=False)
    print_text(f"cost: extra training FLOPs of all stages over vanilla, {COUNTED_ON} on the digits")
    print_text("`stbench list recipes NAME` prints options, defaults, cost and published values.")


def _print_recipe(name: str) -> None:
    """Print the page of a recipe."""
    from stbench.cli import recipe_page
    from stbench.cli.recipe_cost import relative_cost
    from stbench.core.registry import RECIPES, lookup

    recipe = lookup(RECIPES, name)
    page = recipe_page.read_page(name, recipe)
    recipe_page.print_page(page, relative_cost(name), _defaults(recipe))
    recipe_page.print_published(name)


def _defaults(recipe: Any) -> dict[str, dict[str, Any]]:
    """Return the defaults of a recipe by backbone; {} for a plug-in that fits neither."""
    from stbench.cli.recipe_page import PUBLISHED, PUBLISHED_STEPS, SMALL
    from stbench.core.errors import UserError
    from stbench.core.recipe import effective_options
    from stbench.core.registry import BACKBONES, lookup

    found = {}
    for backbone, steps in ((SMALL, 400), (PUBLISHED, PUBLISHED_STEPS)):
        family, _, size = backbone.partition("-")
        info = _published_network(lookup(BACKBONES, family), size).info
        with contextlib.suppress(UserError):
            found[backbone] = effective_options(recipe, info, {}, steps=steps)
    return found


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
    from stbench.cli.recipe_cost import COUNTED_ON, relative_cost
    from stbench.core.registry import RECIPES, lookup, names

    rows = []
    for name in sorted(names(RECIPES)):
        recipe = lookup(RECIPES, name)
        parameters = list(inspect.signature(recipe).parameters.values())[1:]  # the first is the backbone info
        recipe_options = ", ".join(f"{p.name}={p.default}" for p in parameters)
        overhead = relative_cost(name)
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
    from stbench.config.build import build_objective
    from stbench.core.ranges import option_parameters
    from stbench.core.registry import OBJECTIVES, lookup, names
    from stbench.diffusion.sample import samplers_for

    objectives = {name: lookup(OBJECTIVES, name) for name in sorted(names(OBJECTIVES))}
    return [
        {
            "objective": name,
            "samplers": ", ".join(samplers_for(build_objective(name))),
            "options": ", ".join(f"{p.name}={p.default}" for p in option_parameters(cls).values()) or "none",
            "help": _first_paragraph(cls),
        }
        for name, cls in objectives.items()
    ]


def _sampler_rows() -> list[Row]:
    from stbench.core.registry import SAMPLERS, lookup, names

    samplers = {name: lookup(SAMPLERS, name) for name in sorted(names(SAMPLERS))}
    return [{"sampler": name, "help": _first_paragraph(cls)} for name, cls in samplers.items()]


def _metric_rows() -> list[Row]:
    from stbench.evaluate.fdr6 import FDR_METRICS
    from stbench.evaluate.metrics import METRICS
    from stbench.evaluate.registered_metrics import metric_descriptions
    from stbench.evaluate.scores import SCORES

    described = (METRICS, FDR_METRICS, metric_descriptions(), SCORES)
    return [{"metric": name, "help": text} for group in described for name, text in group.items()]


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
