"""`PreparedRun`: everything that is known about a run before it trains, built once and passed down."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from stbench.config.build import build_backbone, build_objective, recipe_stages
from stbench.config.guides import complete_guides
from stbench.config.hashes import Hashes, fingerprint, hashes, setting_fields
from stbench.config.spec import RunSpec
from stbench.core.backbone import Backbone, BackboneInfo, Weights
from stbench.core.errors import UserError
from stbench.core.recipe import Artifact, Stage, Supervision, unset_fields
from stbench.core.registry import plugin_hash
from stbench.core.text import check_name
from stbench.data.dataset import Dataset, get_dataset


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a run with everything the plan decides about it."""

    index: int
    """0-based position in the recipe."""
    name: str
    steps: int
    images: int
    """Training images: steps times batch."""
    is_last: bool
    points: tuple[int, ...]
    """Steps after which the EMA weights are evaluated. Earlier stages are evaluated once, at their end."""
    definition: Stage
    supervision: Supervision
    """The supervision built on planned artifacts of the earlier stages. Its teachers load as networks on the
    meta device, so it can be costed but not trained with."""
    fingerprint: str
    """Hash of everything that decides the stage's weights."""

    def artifact(self, loader: Callable[[Weights], Backbone], *, flops: float = 0.0) -> Artifact:
        """The artifact of the stage without files: its networks come from `loader`."""
        return Artifact(
            name=self.name,
            fingerprint=self.fingerprint,
            checkpoint="",
            sha256={},
            steps=self.steps,
            images_seen=self.images,
            seconds=0.0,
            flops=flops,
            loader=loader,
        )


@dataclass(frozen=True)
class PreparedRun:
    """A run that is ready to train: the specification and everything built from it."""

    spec: RunSpec
    dataset: Dataset
    info: BackboneInfo
    stages: tuple[PlannedStage, ...]
    hashes: Hashes

    @property
    def run_id(self) -> str:
        """Name of the run folder: data set, backbone, recipe, seed and train hash."""
        spec = self.spec
        size = spec.backbone.size_name.replace("/", "-")
        name = f"{spec.dataset}-{spec.backbone.name}-{size}-{spec.recipe.name}"
        return f"{name}-s{spec.seed}-{self.hashes.train}"

    def description(self) -> list[dict[str, Any]]:
        """The stages as plain data, with the effective fields of their supervision."""
        return [
            {
                "name": stage.name,
                "steps": stage.steps,
                "images": stage.images,
                "supervision": supervision_identity(stage.supervision)["fields"],
            }
            for stage in self.stages
        ]


def prepare(spec: RunSpec) -> PreparedRun:
    """Build everything a run needs before it trains.

    Raises:
        UserError: If the settings do not fit together: a block out of range, a stage without steps, guidance
            on a network without a null label, data that have changed, a name that cannot be part of a path.
    """
    _check_names(spec)
    dataset = get_dataset(spec.dataset, spec.data)
    network = build_backbone(spec.backbone, spec.objective, dataset, "meta")
    info = network.info
    _require_null_label(spec, info)
    if spec.train.checkpointing and not network.repeated_blocks():
        raise UserError(
            f"train.checkpointing recomputes blocks, and backbone '{info.name}' has no repeated block; use "
            f"--set train.checkpointing=false"
        )
    stages = _plan_stages(spec, info, dataset)
    declared = stages[-1].definition.guides
    guides = complete_guides(spec.eval.guides, declared, "--set eval.guides=")

    # What the recipe needs from outside the model is named in its row.
    needs = {stage.supervision.needs for stage in stages} - {""}
    outside = [*sorted(needs), *(["initial weights"] if spec.init else [])]
    recipe = spec.recipe.model_copy(update={"needs": ", ".join(outside)})

    contents = {name: value for stage in stages for name, value in stage.supervision.contents.items()}
    unset = unset_in_all([stage.supervision for stage in stages])
    earlier_steps = [stage.steps for stage in stages[:-1]]
    return PreparedRun(
        spec=spec.model_copy(
            update={"recipe": recipe, "eval": spec.eval.model_copy(update={"guides": guides})}
        ),
        dataset=dataset,
        info=info,
        stages=tuple(stages),
        hashes=hashes(spec, earlier_steps, dataset.fingerprint, contents, unset),
    )


def _check_names(spec: RunSpec) -> None:
    """Raise UserError for a name that cannot be part of a path, and for text that records cannot store."""
    check_name(spec.dataset, "the name of the data set")
    check_name(spec.backbone.name, "the name of the backbone")
    check_name(spec.backbone.size, "the size of the backbone", parts=2)
    check_name(spec.recipe.name, "the name of the recipe")
    for section in (spec.backbone, spec.recipe):
        for option in (*section.options, *section.effective):
            check_name(option, f"the name of an option of {section.name}")
    text = json.dumps(spec.model_dump(), ensure_ascii=False, default=str)
    if "\\u0000" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(
            "a path or option contains a NUL character or bytes that are not UTF-8, which the records of a "
            "run cannot store; rename it"
        )


def _require_null_label(spec: RunSpec, info: BackboneInfo) -> None:
    """Label dropping and guidance need a null label."""
    if info.null_label:
        return
    for option, value, least in (
        ("train.label_drop", spec.train.label_drop, 0),
        ("eval.guidance", max(spec.eval.guidance), 1),
    ):
        if value > least:
            raise UserError(
                f"{option}={value} needs a null label, which {info.name}-{info.size} does not have; "
                f"use --set {option}={least}, or --set backbone.label_rows={info.classes + 1}"
            )


def _plan_stages(spec: RunSpec, info: BackboneInfo, dataset: Dataset) -> list[PlannedStage]:
    definitions = recipe_stages(spec, info)
    earlier: dict[str, Artifact] = {}
    previous: Artifact | None = None
    planned = []
    for index, definition in enumerate(definitions):
        # Length: --steps is the last stage's; earlier stages are relative to it or absolute.
        is_last = index == len(definitions) - 1
        steps = spec.train.steps if is_last else definition.length_at(spec.train.steps)
        if steps < 1:
            raise UserError(
                f"stage '{definition.name}' would have {steps} steps; increase --steps, or give the stage "
                f"at least one step"
            )
        images = steps * spec.train.batch

        # Supervision: built on what the earlier stages will leave.
        supervision = definition.supervision(dict(earlier))
        _check_supervision(definition.name, supervision, info)
        supervision.require(build_objective(spec.objective, spec.objective_options))
        if definition.heads is not None:
            _on_meta(spec, dataset, definition, "raw")  # raises if the heads cannot be built
        digest = stage_fingerprint(
            definition, supervision, spec, dataset.fingerprint, steps=steps, previous=previous
        )
        stage = PlannedStage(
            index=index,
            name=definition.name,
            steps=steps,
            images=images,
            is_last=is_last,
            points=tuple(spec.eval.points) if is_last else (steps,),
            definition=definition,
            supervision=supervision,
            fingerprint=digest,
        )
        planned.append(stage)
        previous = earlier[stage.name] = stage.artifact(partial(_on_meta, spec, dataset, definition))
    return planned


def _on_meta(spec: RunSpec, dataset: Dataset, definition: Stage, weights: Weights) -> Backbone:
    """The network that a stage leaves, on the meta device."""
    return build_backbone(spec.backbone, spec.objective, dataset, "meta", heads=definition.heads)


def _check_supervision(stage: str, supervision: Supervision, info: BackboneInfo) -> None:
    if not dataclasses.is_dataclass(supervision):
        raise UserError(
            f"supervision class {type(supervision).__name__} must be a dataclass, because its fields "
            f"identify the stage; decorate it with @dataclass"
        )
    for block in supervision.taps:
        info.block(f"recipe.block of stage '{stage}'", block)
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            supervision.heads(info)
    except (ArithmeticError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"the heads of stage '{stage}' cannot be built: {error}; change the recipe.* options"
        ) from error


def stage_fingerprint(
    definition: Stage,
    supervision: Supervision,
    spec: RunSpec,
    dataset_fingerprint: str,
    *,
    steps: int,
    previous: Artifact | None,
) -> str:
    """Hash everything that decides a stage's weights; equal fingerprints mean equal weights."""
    initial = previous.fingerprint if definition.init == "previous" and previous else "scratch"
    setting = setting_fields(spec, dataset_fingerprint)
    return fingerprint([setting, supervision_identity(supervision), spec.seed, steps, initial])


def supervision_identity(supervision: Supervision) -> dict[str, Any]:
    """A supervision as plain data: its class, its plug-in file and its fields.

    A teacher is represented by the fingerprint of its artifact, a nested supervision likewise, another
    dataclass by its compared fields.
    """
    unset = unset_fields(supervision)
    own = [f.name for f in dataclasses.fields(supervision) if f.init and f.name not in unset]  # type: ignore[arg-type]
    fields = {name: _plain(getattr(supervision, name)) for name in own}
    kind = type(supervision)
    return {"class": kind.__qualname__, "plugin": plugin_hash(kind), "fields": fields}


def unset_in_all(supervisions: Sequence[Supervision]) -> set[str]:
    """The names that `unset_fields` returns for a supervision, unless another one has another value."""
    unset = {name for supervision in supervisions for name in unset_fields(supervision)}
    changed = {name for s in supervisions for name in unset - unset_fields(s) if hasattr(s, name)}
    return unset - changed


def _plain(value: Any) -> Any:
    if isinstance(value, Artifact):
        return value.fingerprint
    if isinstance(value, Supervision):
        return supervision_identity(value)
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare}
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value
