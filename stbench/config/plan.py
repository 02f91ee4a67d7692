"""From a specification to the ordered stages of a run, and to what they will cost: all that --dry-run prints.
Trains nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stbench.config.build import build_backbone, stages_of
from stbench.config.hashes import Hashes, fingerprint, hashes, setting_fields
from stbench.config.spec import RunSpec
from stbench.core.backbone import Backbone, BackboneInfo, Weights
from stbench.core.errors import UserError
from stbench.core.recipe import Artifact, Stage, Supervision
from stbench.core.registry import plugin_hash
from stbench.data.dataset import Dataset, get_dataset


def _earlier_steps(stage: Stage, spec: RunSpec) -> int:
    return round(stage.length * spec.train.steps) if stage.steps is None else stage.steps


Loader = Callable[[Weights], Backbone]


@dataclass(frozen=True)
class StageJob:
    """One stage, ready to run."""

    index: int
    name: str
    steps: int
    images: int
    last: bool
    points: tuple[int, ...]
    """Steps after which the EMA is evaluated; a stage that is not the last is evaluated once, at its end."""
    stage: Stage


def plan(spec: RunSpec, info: BackboneInfo) -> list[StageJob]:
    """The stages of a run in order. Raises UserError for a block out of range or a stage of no length."""
    stages = stages_of(spec, info)
    jobs = []
    for index, stage in enumerate(stages):
        last = index == len(stages) - 1
        steps = spec.train.steps if last else (_earlier_steps(stage, spec))
        if steps < 1:
            raise UserError(
                f"stage '{stage.name}' would have {steps} steps; give it at least one, or a larger --steps"
            )
        points = tuple(spec.eval.points) if last else (steps,)
        jobs.append(StageJob(index, stage.name, steps, steps * spec.train.batch, last, points, stage))
    for job, recipe in zip(jobs, planned_recipes(jobs), strict=True):
        for block in recipe.taps:
            info.block(f"recipe.block of stage '{job.name}'", block)
        _check_heads(job, recipe, info)
    return jobs


def _check_heads(job: StageJob, recipe: Supervision, info: BackboneInfo) -> None:
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            recipe.heads(info)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"the heads of stage '{job.name}' cannot be built: {error}; change the recipe.* options"
        ) from error


def planned_recipes(jobs: list[StageJob], loader: Loader | None = None) -> list[Supervision]:
    """Every stage's recipe, built on stand-ins for the artifacts that do not exist yet.

    `loader` gives the network of a stand-in; without one the recipes can be looked at but not set up.
    """
    earlier: dict[str, Artifact] = {}
    recipes: list[Supervision] = []
    for job in jobs:
        recipe = job.stage.supervision(dict(earlier))
        if not dataclasses.is_dataclass(recipe):
            raise UserError(
                f"recipe class {type(recipe).__name__} is no dataclass; "
                f"decorate it with @dataclass: its fields identify a stage"
            )
        recipes.append(recipe)
        earlier[job.name] = Artifact(
            job.name, "planned", "", {}, job.steps, job.images, 0.0, 0.0, loader or _unfinished
        )
    return recipes


def _unfinished(weights: Weights) -> Backbone:
    raise RuntimeError("a planned stage has no weights yet")


def describe(jobs: list[StageJob], recipes: list[Supervision]) -> list[dict[str, Any]]:
    """The stages as plain data, every option resolved: what spec.json keeps and --dry-run prints."""
    return [
        {
            "name": job.name,
            "steps": job.steps,
            "images": job.images,
            "recipe": recipe_identity(recipe)["fields"],
        }
        for job, recipe in zip(jobs, recipes, strict=True)
    ]


def stage_fingerprint(
    job: StageJob, recipe: Supervision, spec: RunSpec, dataset_fingerprint: str, previous: Artifact | None
) -> str:
    """Hash of everything that decides this stage's weights; equal fingerprints are equal weights."""
    initial = previous.fingerprint if job.stage.init == "previous" and previous else "scratch"
    return fingerprint(
        [setting_fields(spec, dataset_fingerprint), recipe_identity(recipe), spec.seed, job.steps, initial]
    )


def stage_fingerprints(jobs: list[StageJob], spec: RunSpec, dataset_fingerprint: str) -> list[str]:
    """What training these stages will call them, known before anything is trained."""
    earlier: dict[str, Artifact] = {}
    previous = None
    for job in jobs:
        recipe = job.stage.supervision(dict(earlier))
        digest = stage_fingerprint(job, recipe, spec, dataset_fingerprint, previous)
        previous = Artifact(job.name, digest, "", {}, job.steps, job.images, 0.0, 0.0, _unfinished)
        earlier[job.name] = previous
    return [artifact.fingerprint for artifact in earlier.values()]


def recipe_identity(recipe: Supervision) -> dict[str, Any]:
    """A recipe as plain data: its class, its plug-in file and its fields; a teacher is its artifact's
    fingerprint, another dataclass is its compared fields.
    """
    fields = {f.name: _plain(getattr(recipe, f.name)) for f in dataclasses.fields(recipe) if f.init}  # type: ignore[arg-type]
    return {"class": type(recipe).__qualname__, "plugin": plugin_hash(type(recipe)), "fields": fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Artifact):
        return value.fingerprint
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def run_id(spec: RunSpec, train_hash: str) -> str:
    """Folder name: dataset, backbone, recipe, seed and the train hash without the last stage's steps."""
    size = spec.backbone.size.replace("/", "-")
    return f"{spec.dataset}-{spec.backbone.name}-{size}-{spec.recipe.name}-s{spec.seed}-{train_hash}"


def prepare(spec: RunSpec) -> tuple[Dataset, list[StageJob], Hashes]:
    """The data set, the stages and the hashes of a run; raises UserError for what does not fit together."""
    dataset = get_dataset(spec.dataset, spec.data)
    info = build_backbone(spec.backbone, spec.objective, dataset, "meta").info
    _require_null_label(spec, info)
    jobs = plan(spec, info)
    contents = {name: value for recipe in planned_recipes(jobs) for name, value in recipe.contents.items()}
    return dataset, jobs, hashes(spec, [job.steps for job in jobs[:-1]], dataset.fingerprint, contents)


def _require_null_label(spec: RunSpec, info: BackboneInfo) -> None:
    if info.null_label:
        return
    for option, value, least in (
        ("train.label_drop", spec.train.label_drop, 0),
        ("eval.guidance", max(spec.eval.guidance), 1),
    ):
        if value > least:
            raise UserError(
                f"{option}={value} wants a null label, which {info.name}-{info.size} has no row for; "
                f"type --set {option}={least}, or --set backbone.label_rows={info.classes + 1}"
            )


def recipe_needs(jobs: list[StageJob]) -> str:
    """What the run's recipes need from outside the model, for the leaderboard row."""
    needs = {recipe.needs for recipe in planned_recipes(jobs)}
    return ", ".join(sorted(needs - {""}))
