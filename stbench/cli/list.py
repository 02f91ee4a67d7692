"""What `stbench list` prints of each registry: sizes and costs, options and defaults."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from stbench.config.build import build_objective
from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.core.registry import (
    BACKBONES,
    DATASETS,
    OBJECTIVES,
    RECIPES,
    SAMPLERS,
    load_builtins,
    load_plugins,
    lookup,
    names,
)
from stbench.evaluate.metrics import METRICS
from stbench.evaluate.scores import SCORES
from stbench.train.cost import expected_cost

IMAGENET = {"channels": 4, "input_size": 32, "classes": 1000}
"""Latents of 256x256 images: what published sizes are counted at."""
COUNTED_ON = "sit-ti/2"
"""The network on which the overhead of a recipe is counted."""


def list_registered(kind: str, as_json: bool, plugins: Sequence[Path]) -> None:
    """Print one registry."""
    load_builtins()
    load_plugins(plugins)
    rows = _LISTERS[kind]()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(*rows[0]) if rows else Table(kind)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def _backbone_rows() -> list[dict[str, Any]]:
    rows = []
    for name in names(BACKBONES):
        family = lookup(BACKBONES, name)
        for size in family.presets:
            network = _published(family, size)
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


def _published(family: Any, size: str) -> Backbone:
    """A preset on the meta device at its published latent size: the embedded digits' for ti, 256x256 latents
    else.
    """
    preset = {k: v for k, v in family.presets[size].items() if k != "objective"}
    digits = lookup(DATASETS, "digits")
    facts = IMAGENET
    if size.startswith("ti"):
        facts = {"channels": digits.channels, "input_size": digits.input_size, "classes": digits.classes}
    out = build_objective(family.presets[size].get("objective", family.objective)).out_channels(
        facts["channels"]
    )
    with torch.device("meta"):
        return family(**facts, out_channels=out, size=size, **preset)


def _recipe_rows() -> list[dict[str, Any]]:
    vanilla = sum(_stage_flops("vanilla"))
    rows = []
    for name in sorted(names(RECIPES)):
        method = lookup(RECIPES, name)
        parameters = list(inspect.signature(method).parameters.values())[1:]
        options = ", ".join(f"{p.name}={p.default}" for p in parameters)
        costs = _stage_flops(name)
        overhead = f"{costs[-1] / vanilla:.2f}" if costs else "not counted"
        if len(costs) > 1:
            overhead += f", {sum(costs) / vanilla:.2f} with its teacher"
        rows.append(
            {
                "recipe": name,
                # Join the continuation lines of an option's description
                "help": re.sub(r"\n +", " ", inspect.getdoc(method) or ""),
                "options": options or "none",
                f"FLOPs, x vanilla ({COUNTED_ON} on the digits)": overhead,
            }
        )
    return rows


def _stage_flops(recipe: str) -> list[float]:
    """Training FLOPs of each stage at its defaults; none for a plug-in that does not fit the network."""
    try:
        prepared = prepare(resolve(RunRequest(COUNTED_ON, recipe)))
        return [expected_cost(prepared, stage).total for stage in prepared.stages]
    except UserError:
        return []


def _dataset_rows() -> list[dict[str, Any]]:
    rows = []
    for name in names(DATASETS):
        cls = lookup(DATASETS, name)
        latents = f"{cls.channels}x{cls.input_size}x{cls.input_size}"
        help_text = (inspect.getdoc(cls) or "").split("\n\n")[0]
        rows.append(
            {
                "dataset": name,
                "images": cls.size or "yours",
                "latents": latents,
                "classes": cls.classes or "yours",
                "help": help_text,
            }
        )
    return rows


def _objective_rows() -> list[dict[str, Any]]:
    return [
        {
            "objective": name,
            "samplers": ", ".join(lookup(OBJECTIVES, name).samplers),
            "help": _first(OBJECTIVES, name),
        }
        for name in sorted(names(OBJECTIVES))
    ]


def _sampler_rows() -> list[dict[str, Any]]:
    return [{"sampler": name, "help": _first(SAMPLERS, name)} for name in sorted(names(SAMPLERS))]


def _metric_rows() -> list[dict[str, Any]]:
    return [{"metric": name, "help": text} for name, text in (*METRICS.items(), *SCORES.items())]


def _first(registry: Any, name: str) -> str:
    return (inspect.getdoc(lookup(registry, name)) or "").split("\n\n")[0].replace("\n", " ")


_LISTERS = {
    "backbones": _backbone_rows,
    "recipes": _recipe_rows,
    "datasets": _dataset_rows,
    "objectives": _objective_rows,
    "samplers": _sampler_rows,
    "metrics": _metric_rows,
}
