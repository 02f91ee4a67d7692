"""From option values, typed or read, to a checked specification: one way for `run` and `sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from stbench import engine
from stbench.config import RunSpec
from stbench.environment import default_precision
from stbench.errors import UserError
from stbench.initial import require_fit, take_up
from stbench.resolve import Request, resolve


def scales(text: str) -> list[float]:
    """ "1.0,1.5" -> [1.0, 1.5]; UserError for anything else."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--eval-guidance wants numbers with commas, got '{text}'; for example 1.0,1.5,2.0"
        ) from error


def completed(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The values with scales as a list, and with the precision that suits the device where none is given."""
    values = {"precision": default_precision(device), **values}
    if isinstance(values.get("eval_guidance"), str):
        values["eval_guidance"] = scales(values["eval_guidance"])
    return values


def specify(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> RunSpec:
    """The resolved specification of completed values, its stages checked; UserError for what does not fit."""
    for required in ("backbone", "recipe"):
        if required not in values:
            raise UserError(f"expected --{required}, found none; for example --backbone sit --recipe vanilla")
    values, overrides, start = take_up(values, overrides)
    spec = resolve(_request(values, overrides))
    dataset, jobs, _ = engine.prepare(spec)
    needs = engine.recipe_needs(jobs)
    if start is not None:
        require_fit(start, spec, dataset)
        needs = ", ".join(filter(None, [needs, "initial weights"]))
    recipe = spec.recipe.model_copy(update={"needs": needs})
    return spec.model_copy(update={"recipe": recipe, "init": start and start.spec})


def _request(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> Request:
    for name in ("steps", "seed"):
        if type(values.get(name, 0)) is not int:
            raise UserError(
                f"expected a whole number for {name}, got {values[name]!r}; for example --{name} 100"
            )
    for name in ("backbone", "recipe", "dataset", "data", "objective", "precision"):
        if not isinstance(values.get(name, ""), str):
            raise UserError(f"expected a name for {name}, got {values[name]!r}; see `stbench list`")
    if not isinstance(values.get("eval_guidance", []), list):
        raise UserError(
            f"expected scales for eval_guidance, got {values['eval_guidance']!r}; for example [1.0, 1.5]"
        )
    if "data" in values:
        values = {"dataset": "custom", **values}
    return Request(**values, overrides=overrides)
