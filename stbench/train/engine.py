"""A run from its folder to its record: open or resume it, run its stages in order. Names no recipe."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from stbench.config.hashes import Hashes
from stbench.config.plan import StageJob, describe, planned_recipes, prepare, run_id
from stbench.config.spec import RunSpec
from stbench.core.errors import UserError
from stbench.core.recipe import Artifact
from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord
from stbench.train.environment import environment
from stbench.train.interrupt import Interrupt
from stbench.train.loop import Interrupted, Options, StageRun
from stbench.train.progress import Hook


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
