"""From what the user typed to a specification: config files, `--set a.b=c`, presets, and one-line errors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from stbench.config import plan
from stbench.config.build import build_objective
from stbench.config.init_from import require_fit, take_up
from stbench.config.overrides import SECTIONS, _near, _section, _validate, split_backbone
from stbench.config.spec import BackboneSpec, EvalSpec, RecipeSpec, RunSpec, TrainSpec
from stbench.core.device import default_precision
from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, DATASETS, OBJECTIVES, RECIPES, SAMPLERS, lookup, suggest
from stbench.data.dataset import get_dataset
from stbench.data.spec import DataSpec, data_fields
from stbench.diffusion.sample import check_steps


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
    dataset, jobs, _ = plan.prepare(spec)
    needs = plan.recipe_needs(jobs)
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
