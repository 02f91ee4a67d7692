"""What is inspected: the networks of a run along its training, its teacher, or an official checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stbench.config.build import build_objective
from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.core.recipe import Artifact, Supervision
from stbench.core.text import print_line
from stbench.data.dataset import Dataset
from stbench.evaluate.past_run import PastRun, open_run
from stbench.evaluate.run_plugins import PluginChoice
from stbench.models.encoders import EncoderSpec
from stbench.models.official import OfficialModel
from stbench.runs.records import row_label


@dataclass(frozen=True)
class Teacher:
    """A frozen earlier stage that taught the last one."""

    name: str
    """Name of the stage."""
    block: int | None
    """0-based block whose features were used; None if the supervision does not say."""
    guidance: float | None
    """Scale of the guided features; None if there is none."""
    load: Callable[[], Backbone] = field(repr=False)


@dataclass(frozen=True)
class Subject:
    """One run or checkpoint to inspect."""

    path: Path
    name: str
    """Run id, or name of the file."""
    label: str
    """Name of the row: recipe and options, or the checkpoint."""
    backbone: str
    seed: int | None
    info: BackboneInfo
    objective: Objective
    dataset: Dataset
    points: Mapping[int, Callable[[], Backbone]]
    """Steps of the last stage -> loader of its EMA weights; step 0 for an official checkpoint."""
    images_per_step: int
    teacher: Teacher | None = None
    encoders: tuple[EncoderSpec, ...] = ()
    """Encoders that taught the last stage."""


def open_subject(path: Path, plugins: PluginChoice) -> Subject:
    """Open a run.

    Raises:
        UserError: If it is not a run folder, is damaged, or has no EMA weights.
    """
    run = open_run(path, plugins)
    files = run.point_files()
    if not files:
        raise UserError(f"{path} has no ema weights; train it with `stbench run` first")
    spec, supervision = run.prepared.spec, run.last_stage.supervision
    return Subject(
        path=path,
        name=run.prepared.run_id,
        label=row_label(spec.recipe.name, spec.recipe.options),
        backbone=f"{spec.backbone.name}-{spec.backbone.size_name}",
        seed=spec.seed,
        info=run.prepared.info,
        objective=build_objective(spec.objective, spec.objective_options),
        dataset=run.prepared.dataset,
        points={step: _loader(run, file) for step, file in files.items()},
        images_per_step=spec.train.batch,
        teacher=_teacher(run, supervision),
        encoders=tuple(_values(supervision, EncoderSpec)),
    )


def official_subject(path: Path, model: OfficialModel, dataset: Dataset) -> Subject:
    """Official weights on a data set.

    Raises:
        UserError: If the network does not fit the data set.
    """
    info = model.backbone.info
    found = (info.channels, info.input_size, info.classes)
    expected = (dataset.channels, dataset.input_size, dataset.classes)
    if found != expected:
        c, size, classes = expected
        raise UserError(
            f"{path} takes {found[0]}x{found[1]}x{found[1]} latents of {found[2]} classes, {dataset.name} "
            f"has {c}x{size}x{size} of {classes}; give its data with --dataset and --data"
        )
    return Subject(
        path=path,
        name=path.name,
        label=path.name,
        backbone=f"{model.family}-{model.size}",
        seed=None,
        info=info,
        objective=build_objective(model.objective),
        dataset=dataset,
        points={0: lambda: model.backbone},
        images_per_step=0,
    )


def _teacher(run: PastRun, supervision: Supervision) -> Teacher | None:
    """The first artifact among the fields of a supervision, with the block and scale that it names."""
    artifact = next(_values(supervision, Artifact), None)
    if artifact is None:
        return None
    stage = next(stage for stage in run.prepared.stages if stage.fingerprint == artifact.fingerprint)
    kind = getattr(supervision, "weights", "ema")
    folder = run.folder.stage(stage.index, stage.name)
    file = folder.weight_files(kind).get(stage.steps)
    if file is None:
        missing = folder.weights(kind, stage.steps)
        print_line(f"{missing} is missing; {run.folder.path} is inspected without its teacher", error=True)
        return None
    block, guidance = getattr(supervision, "teacher_block", None), getattr(supervision, "guidance", None)
    return Teacher(
        name=stage.name,
        block=block if isinstance(block, int) else None,
        guidance=float(guidance) if isinstance(guidance, (int, float)) else None,
        load=_loader(run, file),
    )


def _values(supervision: Supervision, kind: type) -> Iterator[Any]:
    """The values of one type in the fields of a supervision, also in lists."""
    for each in dataclasses.fields(supervision):  # type: ignore[arg-type]
        value = getattr(supervision, each.name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, kind):
                yield item


def _loader(run: PastRun, file: Path) -> Callable[[], Backbone]:
    return lambda: run.load(file)
