"""What a run is: the validated specification, its overrides (`--set a.b=c`), and its hashes. Knows nothing of training."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from stbench.contracts import Backbone, BackboneInfo, Objective, Stage
from stbench.errors import UserError
from stbench.registry import (
    BACKBONES,
    DATASETS,
    OBJECTIVES,
    RECIPES,
    SAMPLERS,
    lookup,
    names,
    plugin_hash,
    suggest,
)

Precision = Literal["fp32", "tf32", "bf16"]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class BackboneSpec(_Model):
    """Family, size and the options that differ from the size's preset."""

    name: str
    size: str
    options: dict[str, Any] = Field(default_factory=dict)


class RecipeSpec(_Model):
    """A method, the options the user set, and all options with their defaults."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    resolved: dict[str, Any] = Field(default_factory=dict)
    needs: str = ""


class TrainSpec(_Model):
    """How every stage is trained. `steps` is the length of the last stage."""

    steps: int = Field(gt=0)
    batch: int = Field(gt=0)
    accumulate: int = Field(default=1, gt=0)
    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_eps: float = Field(default=1e-8, gt=0)
    warmup: int = Field(default=0, ge=0)
    clip: float | None = Field(default=None, gt=0)
    ema_decay: float = Field(ge=0, lt=1)
    ema_warmup: bool = False
    label_drop: float = Field(ge=0, lt=1)
    precision: Precision = "fp32"
    compile: bool = False
    save_every: int = Field(default=100, gt=0)


class EvalSpec(_Model):
    """When and how the EMA weights are evaluated. `steps` is the number of function evaluations a sample costs."""

    points: list[int]
    samples: int = Field(gt=1)
    labels: Literal["balanced", "random"] = "balanced"
    seed: int = 0
    sampler: str
    steps: int = Field(gt=0)
    guidance: list[float] = Field(default_factory=lambda: [1.0])
    interval: tuple[float, float] = (0.0, 1.0)
    channels: int | None = None
    extras: Literal["last", "all"] = "last"


class RunSpec(_Model):
    """One run, fully resolved."""

    dataset: str
    backbone: BackboneSpec
    objective: str
    recipe: RecipeSpec
    train: TrainSpec
    eval: EvalSpec
    seed: int = Field(ge=0)


@dataclass(frozen=True)
class Request:
    """What the user asked for, before presets fill the rest."""

    backbone: str
    recipe: str
    dataset: str = "digits"
    objective: str | None = None
    steps: int | None = None
    seed: int = 0
    precision: str | None = None
    eval_guidance: Sequence[float] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value: backbone.*, recipe.*, train.*, eval.*."""


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


def read_config(file: Path) -> dict[str, Any]:
    """A YAML, JSON or Python file (mmengine's Config, `_base_` included) as {option: value}; `set` is flattened."""
    from mmengine.config import Config  # imports yapf and numpy: only when a file is given

    if not file.is_file():
        raise UserError(f"config file not found: {file}; expected a .yaml, .json or .py file after --config")
    try:
        content = Config.fromfile(str(file)).to_dict()
    except Exception as error:  # mmengine raises whatever its parsers raise
        raise UserError(
            f"config file {file} cannot be read: {type(error).__name__}: {error}".splitlines()[0]
        ) from error
    known = {
        "backbone",
        "recipe",
        "dataset",
        "objective",
        "steps",
        "seed",
        "precision",
        "eval_guidance",
        "set",
    }
    for name in content:
        if name not in known:
            raise UserError(f"{file}: unknown option '{name}'{suggest(name, sorted(known))}")
    content["set"] = _flatten(content.get("set", {}))
    return content


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


def build_backbone(
    spec: BackboneSpec, objective: str, dataset: Any, device: str = "cpu", seed: int = 0
) -> Backbone:
    """The network of a spec for a data set's latents, freshly initialised from a generator of its own."""
    family = lookup(BACKBONES, spec.name)
    preset = {k: v for k, v in family.presets[spec.size].items() if k != "objective"}
    kwargs = {**preset, **spec.options}
    out = build_objective(objective).out_channels(dataset.channels)
    with torch.device(device), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family(
            channels=dataset.channels,
            input_size=dataset.input_size,
            classes=dataset.classes,
            out_channels=out,
            size=spec.size,
            **kwargs,
        )


def build_objective(name: str) -> Objective:
    """A registered objective by name."""
    return lookup(OBJECTIVES, name)()


def stages_of(spec: RunSpec, info: BackboneInfo) -> list[Stage]:
    """The method's stages for this network."""
    return list(lookup(RECIPES, spec.recipe.name)(info, **spec.recipe.resolved))


def resolve(request: Request) -> RunSpec:
    """Fill in everything the user left out; raises UserError for anything that does not fit."""
    lookup(RECIPES, request.recipe)
    dataset = lookup(DATASETS, request.dataset)
    preset = dataset.preset
    sections = _sections(request.overrides)
    backbone = _backbone_spec(request.backbone, preset.size, sections["backbone"])
    family = lookup(BACKBONES, backbone.name)
    objective = request.objective or family.presets[backbone.size].get("objective", family.objective)
    lookup(OBJECTIVES, objective)
    train = _train_spec(request, preset, sections["train"])
    return RunSpec(
        dataset=request.dataset,
        backbone=backbone,
        objective=objective,
        recipe=_recipe_spec(request.recipe, sections["recipe"]),
        train=train,
        eval=_eval_spec(request, preset, objective, train.steps, sections["eval"]),
        seed=_seed(request.seed),
    )


def _seed(seed: int) -> int:
    if seed < 0:
        raise UserError(f"--seed wants a whole number of at least 0, got {seed}; for example --seed 1")
    return seed


def _sections(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {"backbone": {}, "recipe": {}, "train": {}, "eval": {}}
    for name, value in overrides.items():
        section, dot, option = name.partition(".")
        if not dot or section not in sections:
            raise UserError(
                f"unknown option '{name}': expected backbone.*, recipe.*, train.* or eval.*{suggest(section, sections)}"
            )
        sections[section][option] = value
    return sections


def _backbone_spec(name: str, default_size: str, options: dict[str, Any]) -> BackboneSpec:
    family_name, size = split_backbone(name)
    family = lookup(BACKBONES, family_name)
    size = size or (default_size if default_size in family.presets else next(iter(family.presets), "custom"))
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
    return _section(TrainSpec, base | options, "train")


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
    spec = _section(EvalSpec, base | options, "eval")
    lookup(SAMPLERS, spec.sampler)
    allowed = build_objective(objective).samplers
    if spec.sampler not in allowed:
        raise UserError(
            f"sampler '{spec.sampler}' cannot invert objective '{objective}'; it takes {', '.join(allowed)}"
        )
    if any(point <= 0 or point > steps for point in spec.points):
        raise UserError(
            f"eval.points wants steps in 1..{steps}, got {spec.points}; for example --set eval.points=[{steps}]"
        )
    if any(scale < 1.0 for scale in spec.guidance):
        raise UserError(
            f"guidance scales are at least 1.0 (none), got {spec.guidance}; for example --eval-guidance 1.0,1.5"
        )
    scales = sorted({1.0, *spec.guidance})
    return spec.model_copy(update={"guidance": scales, "points": sorted({*spec.points, steps})})


def evaluation_points(preset: Sequence[int], steps: int) -> list[int]:
    """The preset's points, doubled on beyond its last, up to and including `steps`."""
    points = list(preset)
    while points[-1] * 2 <= steps:
        points.append(points[-1] * 2)
    return sorted({p for p in points if p < steps} | {steps})


def _section(model: type[_Model], values: dict[str, Any], section: str) -> Any:
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
    hints = typing.get_type_hints(target)
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
        f"bad value for '{place}': {first['msg'].lower()}, got {first['input']!r}; change it with --set {place}=..."
    )


def revalidate(stored: Mapping[str, Any], where: Path) -> RunSpec:
    """The specification a run folder holds. Raises UserError where it does not fit this version."""
    try:
        return RunSpec(**stored)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise UserError(
            f"{where}/spec.json: bad value for '{place}': {first['msg'].lower()}; run it again from the start"
        ) from error


def fingerprint(value: Any) -> str:
    """sha256 of a plain value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Hashes:
    """8 hex digits each; docs/protocol.md lists the fields."""

    train: str
    """All that changes a weight but the length of the last stage."""
    row: str
    """`train` without the seed, with the length: what the seeds of one leaderboard row share."""
    setting: str
    """`train` without recipe, recipe options, earlier stages and seed: what the rows of one table share."""


def hashes(spec: RunSpec, earlier_steps: Sequence[int], dataset_fingerprint: str) -> Hashes:
    """The run's hashes; `earlier_steps` are the lengths of the stages before the last."""
    setting = setting_fields(spec, dataset_fingerprint)
    recipe = {
        "name": spec.recipe.name,
        "options": spec.recipe.resolved,
        "plugin": plugin_hash(lookup(RECIPES, spec.recipe.name)),
        "earlier_steps": list(earlier_steps),
    }
    return Hashes(
        train=fingerprint([setting, recipe, spec.seed])[:8],
        row=fingerprint([setting, recipe, spec.train.steps])[:8],
        setting=fingerprint(setting)[:8],
    )


def setting_fields(spec: RunSpec, dataset_fingerprint: str) -> dict[str, Any]:
    """What decides a weight besides the recipe and the seed."""
    train = spec.train.model_dump(exclude={"steps", "save_every"})
    return {
        "dataset": dataset_fingerprint,
        "backbone": spec.backbone.model_dump(),
        "backbone_preset": dict(lookup(BACKBONES, spec.backbone.name).presets[spec.backbone.size]),
        "backbone_plugin": plugin_hash(lookup(BACKBONES, spec.backbone.name)),
        "objective": spec.objective,
        "train": train,
    }
