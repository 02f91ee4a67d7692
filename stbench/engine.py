"""A run from its folder to its record: open or resume it, run its stages in order. Names no recipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from stbench.config import Hashes, RunSpec, build_backbone, hashes
from stbench.contracts import Artifact, BackboneInfo
from stbench.data import Dataset, get_dataset
from stbench.environment import environment
from stbench.errors import UserError
from stbench.hooks import Hook, Interrupt
from stbench.plan import StageJob, describe, plan, planned_recipes
from stbench.records import RunRecord
from stbench.results import RunFolder
from stbench.trainer import Interrupted, Keep, Options, StageRun

__all__ = ["Interrupted", "Keep", "Options", "prepare", "recipe_needs", "run", "run_id"]


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


def run(spec: RunSpec, options: Options, hooks: Sequence[Hook] = ()) -> tuple[RunRecord, bool]:
    """Train and evaluate one run, or what is left of it; returns its record and whether anything was done.

    Raises UserError for bad input or a folder in use, Interrupted after Ctrl-C with everything saved.
    """
    dataset, jobs, hashed = prepare(spec)
    folder = RunFolder(options.output / run_id(spec, hashed.train))
    with folder.lock():
        if not _open(folder, spec, jobs, hashed, options):
            return folder.record(), False
        with _status(folder), Interrupt() as interrupt:
            dataset = dataset.to(options.device)
            earlier: dict[str, Artifact] = {}
            for job in jobs:
                runner = StageRun(job, spec, dataset, folder, options, hooks, interrupt, earlier)
                earlier[job.name] = runner.execute()
        return folder.record(), True


@contextlib.contextmanager
def _status(folder: RunFolder) -> Iterator[None]:
    folder.write_status("running", pid=os.getpid())
    try:
        yield
    except Interrupted:
        folder.write_status("stopped")
        raise
    except Exception as error:
        folder.write_status("failed", error=f"{type(error).__name__}: {error}")
        raise
    folder.write_status("finished")


def _open(folder: RunFolder, spec: RunSpec, jobs: list[StageJob], hashed: Hashes, options: Options) -> bool:
    """Create the folder, or check that it can be gone on with; False if there is nothing left to do."""
    content = _spec_file(folder.path.name, spec, jobs, hashed, options)
    if not folder.exists():
        folder.create(content, asdict(environment(options.device, options.plugins)))
        return True
    known = folder.spec()
    done, asked = int(known["train"]["steps"]), spec.train.steps
    finished = folder.status().get("state") == "finished"
    check_evaluation(folder, spec)
    if finished and asked <= done:
        return False
    if asked < done:
        raise UserError(
            f"run {folder.path} was begun with --steps {done}, found --steps {asked}; "
            f"type --steps {done} to finish it"
        )
    folder.write_status(
        "running", pid=os.getpid()
    )  # before the longer --steps, or a kill here would look finished
    folder.create(content, asdict(environment(options.device, options.plugins)))
    return True


def check_evaluation(folder: RunFolder, spec: RunSpec) -> None:
    """UserError if the run in `folder` was begun under other evaluation settings than `spec` asks for.

    Its points may differ: a continued run has more of them, and what a point measures is the rest.
    """
    where = {"points", "extras"}
    begun = {k: v for k, v in folder.spec().get("eval", {}).items() if k not in where}
    if begun != spec.eval.model_dump(mode="json", exclude=where):
        raise UserError(
            f"run {folder.path} was begun under other evaluation settings; use the same ones, choose another "
            f"--output, or evaluate it again with `stbench evaluate` once it is finished"
        )


def _spec_file(
    name: str, spec: RunSpec, jobs: list[StageJob], hashed: Hashes, options: Options
) -> dict[str, Any]:
    content: dict[str, Any] = spec.model_dump(mode="json")
    return content | {
        "run_id": name,
        "stage_count": len(jobs),
        "stages": describe(jobs, planned_recipes(jobs)),
        "train_hash": hashed.train,
        "row_hash": hashed.row,
        "setting_hash": hashed.setting,
        "plugins": dict(options.plugins),
    }


def recipe_needs(jobs: list[StageJob]) -> str:
    """What the run's recipes need from outside the model, for the leaderboard row."""
    needs = {recipe.needs for recipe in planned_recipes(jobs)}
    return ", ".join(sorted(needs - {""}))
