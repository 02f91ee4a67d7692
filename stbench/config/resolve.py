"""From what the user typed to a run specification: presets, defaults and validation."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from stbench.config.build import build_backbone, build_objective
from stbench.config.evaluation import evaluation_points, evaluation_spec
from stbench.config.init_from import read_start, require_fit
from stbench.config.overrides import (
    DECIDED_BY_DATA,
    split_backbone,
    split_sections,
    validate_section,
)
from stbench.config.spec import BackboneSpec, EvalSpec, RecipeSpec, RunSpec, TrainSpec
from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.limits import MAX_NAME, MAX_SEED
from stbench.core.objective import Objective
from stbench.core.option_values import validate_options
from stbench.core.recipe import effective_options, is_computed
from stbench.core.registry import BACKBONES, DATASETS, OBJECTIVES, RECIPES, lookup, suggest
from stbench.core.safe_load import shorten, shown
from stbench.data.dataset import Preset, get_dataset
from stbench.data.spec import DataSpec, data_fields


@dataclass(frozen=True)
class RunRequest:
    """What the user typed, before presets and defaults fill in the rest."""

    backbone: str
    """Family, or family and size, such as "sit" or "sit-b/2"."""
    recipe: str
    dataset: str = "digits"
    data: str | None = None
    """Path of the data, for data sets that are read from a path."""
    objective: str | None = None
    steps: int | None = None
    seed: int = 0
    precision: str | None = None
    eval_guidance: Sequence[float] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Values of the options of `--set` by dotted name, such as "train.lr"."""


def resolve_options(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> RunSpec:
    """Resolve option values, as read from the command line, a config file or a suite, into a specification.

    Args:
        values: Values of the options of `stbench run`, by name.
        overrides: Values of `--set`, by dotted name.

    Raises:
        UserError: If an option is missing, unknown or invalid, or the options do not fit together.
    """
    for required in ("backbone", "recipe"):
        if required not in values:
            raise UserError(f"--{required} is missing; for example --backbone sit --recipe vanilla")
    _require_names(values, ("backbone", "init_from", "original", "init_weights"))
    values, overrides, start = read_start(values, overrides)
    spec = resolve(_request(values, overrides))
    if start is None:
        return spec
    require_fit(start, spec, get_dataset(spec.dataset, spec.data))
    return spec.model_copy(update={"init": start.spec})


def _request(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> RunRequest:
    """Check the types of option values; those of a config file may be anything."""
    values = dict(values)
    for name in ("steps", "seed"):
        if type(values.get(name, 0)) is not int:
            raise UserError(f"{name} must be an integer, got {shown(values[name])}; for example --{name} 100")
    _require_names(values, ("backbone", "recipe", "dataset", "data", "objective", "precision"))
    if isinstance(values.get("eval_guidance"), str):
        values["eval_guidance"] = parse_scales(values["eval_guidance"])
    if not isinstance(values.get("eval_guidance", []), list):
        raise UserError(
            f"eval_guidance must be a list of scales, got {shown(values['eval_guidance'])}; "
            f"for example [1.0, 1.5]"
        )
    if "data" in values:
        values = {"dataset": "custom", **values}
    return RunRequest(**values, overrides=overrides)


def _require_names(values: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise UserError unless each of these options that is given is a text of a sensible length."""
    for name in names:
        value = values.get(name, "-")
        if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
            what = "a path" if name in ("data", "init_from") else "a name"
            raise UserError(f"{name} must be {what}, got {shown(value)}; see `stbench list`")


def parse_scales(text: str) -> list[float]:
    """Parse "1.0,1.5" into [1.0, 1.5].

    Raises:
        UserError: If the text is anything else.
    """
    try:
        return [float(part.encode("ascii")) for part in text.split(",")]
    except ValueError as error:
        raise UserError(
            f"--eval-guidance must be comma-separated numbers, got {shown(text)}; for example 1.0,1.5,2.0"
        ) from error


def resolve(request: RunRequest) -> RunSpec:
    """Fill in everything that the user left out.

    Raises:
        UserError: If a name is unknown or a value is invalid.
    """
    lookup(RECIPES, request.recipe)
    if not 0 <= request.seed <= MAX_SEED:
        raise UserError(
            f"--seed must be an integer in 0..{MAX_SEED}, got {shown(request.seed)}; for example --seed 1"
        )
    sections = split_sections(request.overrides)

    # Data set and backbone; the preset of the data set depends on the backbone.
    dataset = lookup(DATASETS, request.dataset)
    fields = data_fields(request.data, sections["data"])
    data = None if fields is None else validate_section(DataSpec, fields, "data")
    if data is not None or dataset.from_path:
        dataset = get_dataset(request.dataset, data)
    default_size = dataset.preset_for(split_backbone(request.backbone)[0]).size
    backbone = _backbone_spec(request.backbone, default_size, sections["backbone"])
    preset = dataset.preset_for(backbone.name, backbone.size)

    # Objective, training and evaluation.
    family = lookup(BACKBONES, backbone.name)
    objective = request.objective
    if objective is None:
        objective = family.presets[backbone.size].get("objective", family.objective)
    objective_options = _objective_options(objective, sections["objective"])
    train = _train_spec(request, preset, sections["train"])
    process = build_objective(objective, objective_options)
    evaluation = _eval_spec(request, preset, process, train.steps, sections["eval"])
    evaluation = evaluation.model_copy(update={"extractor": evaluation.extractor or dataset.extractor})
    if (evaluation.channels or 1) > dataset.channels:
        raise UserError(
            f"eval.channels must be in 1..{dataset.channels} (latent channels), got {evaluation.channels}; "
            f"for example --set eval.channels=3"
        )

    # Recipe; defaults of its options may depend on the network.
    info = build_backbone(backbone, objective, dataset, "meta").info
    return RunSpec(
        dataset=request.dataset,
        data=data and dataset.effective(data).model_copy(update={"fingerprint": dataset.fingerprint}),
        backbone=backbone,
        objective=objective,
        objective_options=objective_options,
        recipe=_recipe_spec(request.recipe, info, train.steps, sections["recipe"]),
        train=train,
        eval=evaluation,
        seed=request.seed,
    )


def _backbone_spec(name: str, default_size: str, options: dict[str, Any]) -> BackboneSpec:
    family_name, size = split_backbone(name)
    family = lookup(BACKBONES, family_name)
    if size is None:
        size = default_size if default_size in family.presets else next(iter(family.presets), "custom")
    if size not in family.presets:
        raise UserError(
            f"unknown size {shorten(size)} of backbone '{family_name}'{suggest(size, family.presets)}"
        )
    preset = family.presets[size]
    skip = DECIDED_BY_DATA | {"objective"}
    default = validate_options(family, preset, "backbone", skip=skip) if _is_complete(family, preset) else {}
    for option in options:
        if option in DECIDED_BY_DATA:
            raise UserError(
                f"option 'backbone.{option}' is decided by the data set and the size; leave it out"
            )
    effective = validate_options(family, {**preset, **options}, "backbone", skip=skip)
    changed = {k: effective[k] for k in options if k not in default or default[k] != effective[k]}
    return BackboneSpec(name=family_name, size=size, options=changed, effective=effective)


def _is_complete(family: Any, preset: Mapping[str, Any]) -> bool:
    """Whether a preset gives every option that the constructor requires."""
    parameters = inspect.signature(family).parameters.values()
    required = {p.name for p in parameters if p.default is inspect.Parameter.empty} - DECIDED_BY_DATA
    return required <= preset.keys()


def _objective_options(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options of an objective that differ from its defaults, after the objective was built with them."""
    family = lookup(OBJECTIVES, name)
    default = validate_options(family, {}, "objective")
    effective = validate_options(family, options, "objective")
    changed = {option: effective[option] for option in options if effective[option] != default[option]}
    build_objective(name, changed)
    return changed


def _recipe_spec(name: str, info: BackboneInfo, steps: int, options: dict[str, Any]) -> RecipeSpec:
    recipe = lookup(RECIPES, name)
    given = _given_options(recipe, options)
    effective = _effective(recipe, info, steps, given)
    changed = {}
    for option in given:
        rest = {k: v for k, v in given.items() if k != option}
        if _effective(recipe, info, steps, rest)[option] != effective[option]:
            changed[option] = effective[option]
    return RecipeSpec(name=name, options=changed, effective=effective)


def _given_options(recipe: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user set. None means the default where that default is computed."""
    computed = {k for k, p in inspect.signature(recipe).parameters.items() if is_computed(p.default)}
    options = {k: v for k, v in options.items() if v is not None or k not in computed}
    checked = validate_options(recipe, options, "recipe", skip={"info"})
    return {k: checked[k] for k in options}


def _effective(recipe: Any, info: BackboneInfo, steps: int, given: dict[str, Any]) -> dict[str, Any]:
    options = effective_options(recipe, info, given, steps=steps)
    return validate_options(recipe, options, "recipe", skip={"info"})


def _train_spec(request: RunRequest, preset: Preset, options: dict[str, Any]) -> TrainSpec:
    values = {name: value for name, value in asdict(preset).items() if name in TrainSpec.model_fields}
    if request.steps is not None:
        values["steps"] = request.steps
    values["precision"] = "fp32" if request.precision is None else request.precision
    steps = options.get("steps", values["steps"])
    if preset.warmup_share is not None and type(steps) is int:
        values["warmup"] = min(preset.warmup, int(preset.warmup_share * max(steps, 0)))
    values |= options
    values.setdefault("teacher_precision", "bf16" if values["precision"] == "bf16" else "fp32")
    spec = validate_section(TrainSpec, values, "train")
    if spec.teacher_precision == "bf16" and spec.precision != "bf16":
        raise UserError(
            f"train.teacher_precision=bf16 needs --precision bf16, got {spec.precision}; leave it out"
        )
    if spec.accumulate > spec.batch:
        raise UserError(
            f"train.accumulate must be at most train.batch={spec.batch}, got {spec.accumulate}; "
            f"use --set train.accumulate={spec.batch} or less"
        )
    return spec


def _eval_spec(
    request: RunRequest, preset: Preset, objective: Objective, steps: int, options: dict[str, Any]
) -> EvalSpec:
    guidance = preset.eval_guidance if request.eval_guidance is None else request.eval_guidance
    values: dict[str, Any] = {
        "points": evaluation_points(preset.eval_points, steps),
        "samples": preset.eval_samples,
        "labels": preset.eval_labels,
        "steps": preset.eval_steps,
        "guidance": list(guidance),
        "sampler": objective.samplers[0],
    }
    return evaluation_spec(values | options, objective, steps)
