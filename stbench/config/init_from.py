"""Training that starts from an official checkpoint: what the file decides of a run, and its weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stbench.config.build import build_objective
from stbench.config.overrides import split_backbone
from stbench.config.spec import InitSpec, RunSpec
from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, lookup
from stbench.models.official import OfficialModel, load_official

FIXED = frozenset({"channels", "input_size", "classes", "out_channels", "size"})
"""Constructor options that the data set and the objective decide."""

TABLES = ("y_embedder.embedding_table.weight", "label_emb.weight")
"""Where the families keep their label tables; the last row is the null label."""


@dataclass(frozen=True)
class Start:
    """A checkpoint that a run will start from."""

    spec: InitSpec
    shapes: Mapping[str, Any]
    """Constructor options that the file decided."""
    objective: str


def take_up(
    values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], Start | None]:
    """Option values and overrides with what the file after `init_from` decides: size, options, objective.

    Raises UserError for a file that cannot be loaded, or that is not what the options say.
    """
    plain = dict(values)
    file, original = plain.pop("init_from", None), plain.pop("original", None)
    weights = plain.pop("init_weights", None)
    if file is None:
        for name, value in (("original", original), ("init-weights", weights)):
            if value is not None:
                raise UserError(f"--{name} says how to read a checkpoint: expected --init-from FILE with it")
        return plain, dict(overrides), None
    if weights not in (None, "raw", "ema"):
        raise UserError(f"--init-weights wants raw or ema, got {weights!r}; leave it out for ema")
    family, size = split_backbone(plain["backbone"])
    heads, path = overrides.get("backbone.heads"), Path(str(file)).resolve()
    model = load_official(path, weights=weights or "ema", heads=heads, original=original, family=family)
    plain["backbone"] = _sized(plain["backbone"], size, model, path)
    plain.setdefault("objective", model.objective)
    spec = InitSpec(
        file=str(path),
        sha256=model.sha256,
        weights=weights or "ema",
        original=original,
        heads=heads,
        classes=model.options["classes"],
        source=model.source,
    )
    options = _options(model, overrides, path)
    return plain, {**overrides, **options}, Start(spec, model.options, model.objective)


def _sized(typed: str, size: str | None, model: OfficialModel, path: Path) -> str:
    if model.size == "custom":
        return typed
    name = f"{model.family}-{model.size}"
    if size not in (None, model.size):
        raise UserError(f"expected a {typed} in {path}, found a {name}; type --backbone {name}")
    return name


def _options(model: OfficialModel, overrides: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """backbone.* overrides that make the run's network the file's; one that the user gave must agree."""
    found = {key: value for key, value in model.options.items() if key not in FIXED}
    if found.get("label_rows") == model.options["classes"] + 1:
        del found["label_rows"]  # a table with a null label fits any number of classes
    for key, value in found.items():
        said = overrides.get(f"backbone.{key}", value)
        if said != value:
            raise UserError(
                f"expected backbone.{key}={said} in {path}, found {value}; leave --set backbone.{key} out"
            )
    if model.size != "custom":
        cls = lookup(BACKBONES, model.family)
        defaults = {name: p.default for name, p in inspect.signature(cls).parameters.items()}
        defaults |= cls.presets[model.size]
        found = {key: value for key, value in found.items() if value != defaults[key]}
    return {f"backbone.{key}": value for key, value in found.items()}


def require_fit(start: Start, spec: RunSpec, dataset: Any) -> None:
    """Raise UserError where the checkpoint is for other latents, or predicts something else."""
    shapes, file = start.shapes, start.spec.file
    held = f"{shapes['channels']}x{shapes['input_size']}x{shapes['input_size']}"
    wanted = f"{dataset.channels}x{dataset.input_size}x{dataset.input_size}"
    if held != wanted:
        raise UserError(
            f"expected weights for {wanted} latents of data set '{spec.dataset}', found {held} in {file}; "
            f"give a checkpoint or a data set of the same size"
        )
    out = build_objective(spec.objective).out_channels(dataset.channels)
    if out != shapes["out_channels"]:
        raise UserError(
            f"expected {out} predicted channels for objective '{spec.objective}', found "
            f"{shapes['out_channels']} in {file}; type --objective {start.objective}"
        )


def note(init: InitSpec, classes: int) -> str:
    """One line for the user: what the run starts from, and what becomes of the label table."""
    line = f"starts from {init.source}"
    if classes == init.classes:
        return line
    return (
        f"{line}; {init.classes} classes there, {classes} here: label rows start fresh, the null row is kept"
    )


@torch.no_grad()
def start_from(student: Backbone, init: InitSpec) -> None:
    """Load the checkpoint's weights into a fresh student.

    With another number of classes the student keeps its fresh label table, but for the null row. Raises
    UserError if the file is gone or no longer the one the run was named after.
    """
    model = load_official(
        Path(init.file),
        weights=init.weights,
        heads=init.heads,
        original=init.original,
        family=student.info.name,
    )
    if model.sha256 != init.sha256:
        raise UserError(
            f"{init.file} has changed: expected tensors of sha256 {init.sha256[:12]}, found "
            f"{model.sha256[:12]}; put the old file back, or start the run again"
        )
    state, own = model.backbone.state_dict(), student.state_dict()
    for table in TABLES:
        if table in state and state[table].shape != own[table].shape:
            fresh = own[table].clone()
            fresh[-1] = state[table][-1]
            state[table] = fresh
    student.load_state_dict(state)
