"""`--init-from`: start training from a checkpoint of an official repository."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stbench.config.build import build_objective
from stbench.config.overrides import DECIDED_BY_DATA, split_backbone
from stbench.config.spec import InitSpec, RunSpec
from stbench.core.backbone import Backbone, load_trunk
from stbench.core.errors import UserError
from stbench.core.files import absolute_path
from stbench.core.registry import BACKBONES, lookup
from stbench.core.safe_load import shown
from stbench.models.official import OfficialModel, load_official
from stbench.runs.recorded import require_recorded

LABEL_TABLES = ("y_embedder.embedding_table.weight", "label_emb.weight")
"""Names of the families' label embeddings; the last row is the null label."""


@dataclass(frozen=True)
class Start:
    """A checkpoint from which a run will start."""

    spec: InitSpec
    options: Mapping[str, Any]
    """Constructor options that the file decides."""
    objective: str


def read_start(
    values: Mapping[str, Any], overrides: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], Start | None]:
    """Read the checkpoint of `--init-from`, if there is one.

    Returns the option values and overrides completed with what the file decides (size, backbone options,
    objective), and the checkpoint.

    Raises:
        UserError: If the file cannot be loaded or contradicts the options.
    """
    values, overrides = dict(values), dict(overrides)
    file, original = values.pop("init_from", None), values.pop("original", None)
    weights = values.pop("init_weights", None)
    if file is None:
        for name, value in (("original", original), ("init-weights", weights)):
            if value is not None:
                raise UserError(f"--{name} is only used with --init-from FILE; add it, or leave --{name} out")
        return values, overrides, None
    if weights not in (None, "raw", "ema"):
        raise UserError(f"--init-weights must be raw or ema, got {shown(weights)}; leave it out for ema")
    family, size = split_backbone(values["backbone"])
    heads, path = overrides.get("backbone.heads"), absolute_path(str(file))
    if heads is not None and (type(heads) is not int or heads < 1):
        raise UserError(f"backbone.heads must be a positive integer, got {heads!r}; for example 6")
    require_recorded(path)
    model = load_official(
        path,
        weights=weights or "ema",
        heads=heads,
        original=original,
        objective=values.get("objective"),
        family=family,
    )
    values["backbone"] = _sized(values["backbone"], size, model, path)
    values.setdefault("objective", model.objective)
    spec = InitSpec(
        file=str(path),
        sha256=model.sha256,
        weights=weights or "ema",
        original=original,
        heads=heads,
        classes=model.options["classes"],
        source=model.description,
    )
    options = _options(model, overrides, path)
    return values, {**overrides, **options}, Start(spec, model.options, model.objective)


def _sized(typed: str, size: str | None, model: OfficialModel, path: Path) -> str:
    if model.size == "custom":
        return typed
    name = f"{model.family}-{model.size}"
    if size not in (None, model.size):
        raise UserError(f"expected a {typed} in {path}, found a {name}; use --backbone {name}")
    return name


def _options(model: OfficialModel, overrides: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The backbone.* overrides that make the run's network equal to the file's.

    An option that the user set must agree with the file.
    """
    found = {key: value for key, value in model.options.items() if key not in DECIDED_BY_DATA}
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
    """Check that the checkpoint fits the data set and the objective.

    Raises:
        UserError: If it is for latents of another shape, or predicts another number of channels.
    """
    shapes, file = start.options, start.spec.file
    found = f"{shapes['channels']}x{shapes['input_size']}x{shapes['input_size']}"
    wanted = f"{dataset.channels}x{dataset.input_size}x{dataset.input_size}"
    if found != wanted:
        raise UserError(
            f"expected weights for {wanted} latents of data set '{spec.dataset}', found {found} in {file}; "
            f"use a checkpoint and a data set of the same size"
        )
    out = build_objective(spec.objective).out_channels(dataset.channels)
    if out != shapes["out_channels"]:
        raise UserError(
            f"expected {out} predicted channels for objective '{spec.objective}', found "
            f"{shapes['out_channels']} in {file}; use --objective {start.objective}"
        )


def describe_start(init: InitSpec, classes: int) -> str:
    """One line that says what the run starts from and what happens to the label embedding."""
    line = f"starts from {init.source}"
    if classes == init.classes:
        return line
    return (
        f"{line}; it has {init.classes} classes and the data set has {classes}, so the label embedding is "
        f"initialised anew, except for the null label"
    )


@torch.no_grad()
def load_start(student: Backbone, init: InitSpec, objective: str) -> None:
    """Load the weights of the checkpoint into a newly built student that is trained with `objective`.

    If the number of classes differs, the student keeps its initial label embedding except for the null
    label. Heads that only one of student and checkpoint has are skipped.

    Raises:
        UserError: If the file is missing or has changed since the run began.
    """
    model = load_official(
        Path(init.file),
        weights=init.weights,
        heads=init.heads,
        original=init.original,
        objective=objective,
        family=student.info.name,
    )
    if model.sha256 != init.sha256:
        raise UserError(
            f"{init.file} has changed: expected tensors with sha256 {init.sha256[:12]}, found "
            f"{model.sha256[:12]}; restore the file, or start a new run"
        )
    state, own = model.backbone.state_dict(), student.state_dict()
    for table in LABEL_TABLES:
        if table in state and state[table].shape != own[table].shape:
            merged = own[table].clone()
            merged[-1] = state[table][-1]
            state[table] = merged
    load_trunk(student, state)
