"""From what the user typed to a specification: config files, `--set a.b=c`, presets, and one-line errors."""

from __future__ import annotations

import difflib
import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from stbench.config import (
    BackboneSpec,
    DataSpec,
    EvalSpec,
    RecipeSpec,
    RunSpec,
    TrainSpec,
    build_objective,
)
from stbench.data import get_dataset
from stbench.data_options import data_fields
from stbench.errors import UserError
from stbench.registry import BACKBONES, DATASETS, OBJECTIVES, RECIPES, SAMPLERS, lookup, names, suggest
from stbench.samplers import check_steps

SECTIONS = ("backbone", "recipe", "train", "eval", "data")
"""First words of the options that --set takes."""


@dataclass(frozen=True)
class Request:
    """What the user asked for, before presets fill the rest."""

    backbone: str
    recipe: str
    dataset: str = "digits"
    data: str | None = None
    """Path of the data, for data sets that are read from one."""
    objective: str | None = None
    steps: int | None = None
    seed: int = 0
    precision: str | None = None
    eval_guidance: Sequence[float] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value: backbone.*, recipe.*, train.*, eval.*, data.*."""


def parse_set(pairs: Sequence[str]) -> dict[str, Any]:
    """`["train.lr=1e-3", ...]` -> {"train.lr": 0.001}; values are JSON where they parse, else text."""
    parsed = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set wants KEY=VALUE, got '{pair}'; for example --set train.lr=1e-3")
        parsed[name.strip()] = _value(text.strip())
    return parsed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"true": True, "True": True, "False": False, "None": None, "none": None}.get(text, text)


OPTIONS = (
    "backbone",
    "recipe",
    "dataset",
    "data",
    "objective",
    "steps",
    "seed",
    "precision",
    "eval_guidance",
    "init_from",
    "original",
    "init_weights",
    "set",
)
"""What a config file may give."""


def read_config(file: Path) -> dict[str, Any]:
    """A YAML, JSON or Python file (mmengine's Config, `_base_` included) as {option: value}; `set` is
    flattened.
    """
    return checked_options(read_file(file, "config", "--config"), OPTIONS, str(file))


def read_file(file: Path, what: str, option: str) -> dict[str, Any]:
    """The content of a YAML, JSON or Python file, or a UserError that calls it a `what` file of `option`."""
    from mmengine.config import Config  # imports yapf and numpy: only when a file is given

    if not file.is_file():
        raise UserError(f"{what} file not found: {file}; expected a .yaml, .json or .py file after {option}")
    try:
        return dict(Config.fromfile(str(file)).to_dict())
    except Exception as error:  # mmengine raises whatever its parsers raise
        raise UserError(
            f"{what} file {file} cannot be read: {type(error).__name__}: {error}".splitlines()[0]
        ) from error


def checked_options(content: Mapping[str, Any], known: Sequence[str], where: str) -> dict[str, Any]:
    """The options with `set` flattened; UserError for one that is not among the known, or a `set` of none."""
    for name in content:
        if name not in known:
            raise UserError(f"{where}: unknown option '{name}'{suggest(name, sorted(known))}")
    if not isinstance(content.get("set", {}), Mapping):
        raise UserError(
            f"{where}: 'set' wants options and values, got {content['set']!r}; "
            f"for example set: {{train.lr: 1e-3}}"
        )
    return {**content, "set": _flatten(content.get("set", {}))}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return flat


def split_backbone(name: str) -> tuple[str, str | None]:
    """ "sit" -> ("sit", None); "sit-b/2" -> ("sit", "b/2"); the longest registered family wins."""
    families = sorted(names(BACKBONES), key=len, reverse=True)
    for family in families:
        if name == family:
            return family, None
        if name.startswith(family + "-"):
            return family, name[len(family) + 1 :]
    lookup(BACKBONES, name.split("-")[0])
    raise AssertionError("unreachable: lookup raised")


def resolve(request: Request) -> RunSpec:
    """Fill in everything the user left out; raises UserError for anything that does not fit."""
    lookup(RECIPES, request.recipe)
    sections = _sections(request.overrides)
    dataset = lookup(DATASETS, request.dataset)
    where = data_fields(request.data, sections["data"])
    data = None if where is None else _section(DataSpec, where, "data")
    if data is not None or dataset.from_path:
        dataset = get_dataset(request.dataset, data)
    default = dataset.preset_for(split_backbone(request.backbone)[0])
    backbone = _backbone_spec(request.backbone, default.size, sections["backbone"])
    preset = dataset.preset_for(backbone.name, backbone.size)
    family = lookup(BACKBONES, backbone.name)
    objective = request.objective or family.presets[backbone.size].get("objective", family.objective)
    lookup(OBJECTIVES, objective)
    train = _train_spec(request, preset, sections["train"])
    settings = _eval_spec(request, preset, objective, train.steps, sections["eval"])
    if (settings.channels or 1) > dataset.channels:
        raise UserError(
            f"eval.channels wants 1..{dataset.channels} latent channels, got {settings.channels}; "
            f"for example --set eval.channels=3"
        )
    return RunSpec(
        dataset=request.dataset,
        data=data and data.model_copy(update={"fingerprint": dataset.fingerprint}),
        backbone=backbone,
        objective=objective,
        recipe=_recipe_spec(request.recipe, sections["recipe"]),
        train=train,
        eval=settings,
        seed=_seed(request.seed),
    )


def _seed(seed: int) -> int:
    if seed < 0:
        raise UserError(f"--seed wants a whole number of at least 0, got {seed}; for example --seed 1")
    return seed


def _sections(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in overrides.items():
        section, dot, option = name.partition(".")
        if not dot or section not in sections:
            raise UserError(
                f"unknown option '{name}': expected backbone.*, recipe.*, train.*, eval.* or data.*"
                f"{suggest(section, sections)}"
            )
        sections[section][option] = value
    return sections


def _backbone_spec(name: str, default_size: str, options: dict[str, Any]) -> BackboneSpec:
    family_name, size = split_backbone(name)
    family = lookup(BACKBONES, family_name)
    if size is None:
        size = default_size if default_size in family.presets else next(iter(family.presets), "custom")
    if size not in family.presets:
        raise UserError(f"unknown size '{size}' of backbone '{family_name}'{suggest(size, family.presets)}")
    fixed = {"channels", "input_size", "classes", "out_channels", "size"}
    allowed = [p for p in inspect.signature(family).parameters if p not in fixed]
    for option in options:
        if option not in allowed:
            raise UserError(f"unknown option 'backbone.{option}'{_near('backbone', option, allowed)}")
    validated = _validate(family, {**family.presets[size], **options}, "backbone", skip=fixed | {"objective"})
    return BackboneSpec(name=family_name, size=size, options={k: validated[k] for k in options})


def _recipe_spec(name: str, options: dict[str, Any]) -> RecipeSpec:
    resolved = _validate(lookup(RECIPES, name), options, "recipe", skip={"info"})
    return RecipeSpec(name=name, options={k: resolved[k] for k in options}, resolved=resolved)


def _train_spec(request: Request, preset: Any, options: dict[str, Any]) -> TrainSpec:
    base = {name: getattr(preset, name) for name in TrainSpec.model_fields if name in asdict(preset)}
    if request.steps is not None:
        base["steps"] = request.steps
    base["precision"] = request.precision or "fp32"
    spec: TrainSpec = _section(TrainSpec, base | options, "train")
    if spec.accumulate > spec.batch:
        raise UserError(
            f"train.accumulate wants at most train.batch={spec.batch} micro-batches, got {spec.accumulate}; "
            f"try --set train.accumulate={spec.batch}"
        )
    return spec


def _eval_spec(
    request: Request, preset: Any, objective: str, steps: int, options: dict[str, Any]
) -> EvalSpec:
    guidance = list(preset.eval_guidance if request.eval_guidance is None else request.eval_guidance)
    base: dict[str, Any] = {
        "points": evaluation_points(preset.eval_points, steps),
        "samples": preset.eval_samples,
        "labels": preset.eval_labels,
        "steps": preset.eval_steps,
        "guidance": guidance,
        "sampler": build_objective(objective).samplers[0],
    }
    return evaluation(base | options, objective, steps)


def evaluation(values: dict[str, Any], objective: str, steps: int) -> EvalSpec:
    """Checked settings for a last stage of `steps` steps; scale 1.0 and the last step are always in."""
    spec = _section(EvalSpec, values, "eval")
    lookup(SAMPLERS, spec.sampler)
    allowed = build_objective(objective).samplers
    if spec.sampler not in allowed:
        raise UserError(
            f"sampler '{spec.sampler}' cannot invert objective '{objective}'; it takes {', '.join(allowed)}"
        )
    if any(point <= 0 or point > steps for point in spec.points):
        raise UserError(
            f"eval.points wants steps in 1..{steps}, got {spec.points}; "
            f"for example --set eval.points=[{steps}]"
        )
    if isinstance(spec.extras, list) and not set(spec.extras) <= {*spec.points, steps}:
        raise UserError(
            f"eval.extras wants evaluation points out of {sorted({*spec.points, steps})}, got {spec.extras}; "
            f"for example --set eval.extras=[{steps}]"
        )
    if spec.interval[0] > spec.interval[1]:
        raise UserError(f"eval.interval wants low <= high, got {spec.interval}; for example [0.0,0.7]")
    check_steps(spec.sampler, build_objective(objective), spec.steps)
    if any(scale < 1.0 for scale in spec.guidance):
        raise UserError(
            f"guidance scales are at least 1.0 (none), got {spec.guidance}; "
            f"for example --eval-guidance 1.0,1.5"
        )
    scales = sorted({1.0, *spec.guidance})
    return spec.model_copy(update={"guidance": scales, "points": sorted({*spec.points, steps})})


def evaluation_points(preset: Sequence[int], steps: int) -> list[int]:
    """The preset's points, doubled on beyond its last, up to and including `steps`."""
    points = list(preset)
    while points[-1] * 2 <= steps:
        points.append(points[-1] * 2)
    return sorted({p for p in points if p < steps} | {steps})


def _section(model: type[BaseModel], values: dict[str, Any], section: str) -> Any:
    for name in values:
        if name not in model.model_fields:
            raise UserError(f"unknown option '{section}.{name}'{_near(section, name, model.model_fields)}")
    try:
        return model(**values)
    except ValidationError as error:
        raise _one_line(error, section) from error


def _validate(function: Any, values: dict[str, Any], section: str, skip: set[str]) -> dict[str, Any]:
    """Check values against a signature; returns every option, defaults included, as plain data."""
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip:
            continue
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (hints.get(name, Any), default)
    values = {k: v for k, v in values.items() if k not in skip}
    for name in values:
        if name not in fields:
            raise UserError(f"unknown option '{section}.{name}'{_near(section, name, fields)}")
    model = create_model("Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    try:
        return model(**values).model_dump()
    except ValidationError as error:
        raise _one_line(error, section) from error


def _near(section: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{section}.{near[0]}'?"
    return f"; {section} takes: {', '.join(known) or 'no options'}"


def _one_line(error: ValidationError, section: str) -> UserError:
    first = error.errors()[0]
    place = ".".join([section, *(str(part) for part in first["loc"][:1])])
    return UserError(
        f"bad value for '{place}': {first['msg'].lower()}, got {first['input']!r}; "
        f"change it with --set {place}=..."
    )
