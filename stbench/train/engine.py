"""A run from its folder to its record: create or resume the folder, train the stages in order."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from stbench.config.plan import PreparedRun
from stbench.config.spec import RunSpec
from stbench.core.errors import UserError
from stbench.core.recipe import Artifact
from stbench.core.registry import DATASETS, lookup
from stbench.runs.folder import OutputFolder, RunFolder
from stbench.runs.records import RunRecord
from stbench.train.environment import environment
from stbench.train.hooks import Hook
from stbench.train.interrupt import Interrupt
from stbench.train.loop import Interrupted, Keep, RunOptions, StageTrainer

__all__ = ["Interrupted", "Keep", "RunOptions", "check_evaluation", "run"]


def run(prepared: PreparedRun, options: RunOptions, hooks: Sequence[Hook] = ()) -> tuple[RunRecord, bool]:
    """Train and evaluate a run, or what is left of it.

    Returns:
        The record of the run, and whether anything was done.

    Raises:
        UserError: If the folder is in use or was created with other settings, or if training diverges.
        Interrupted: After Ctrl-C or SIGTERM, with everything saved.
    """
    folder = OutputFolder(options.output).run(prepared.run_id)
    with folder.lock():
        if not open_folder(folder, prepared, options):
            return folder.record(), False
        with _status(folder), Interrupt() as interrupt:
            dataset = prepared.dataset.to(options.device)
            artifacts: dict[str, Artifact] = {}
            for stage in prepared.stages:
                trainer = StageTrainer(
                    prepared,
                    stage,
                    dataset=dataset,
                    folder=folder,
                    options=options,
                    hooks=hooks,
                    interrupt=interrupt,
                    earlier=artifacts,
                )
                artifacts[stage.name] = trainer.execute()
        return folder.record(), True


@contextlib.contextmanager
def _status(folder: RunFolder) -> Iterator[None]:
    """Keep status.json up to date while the run is trained."""
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


def open_folder(folder: RunFolder, prepared: PreparedRun, options: RunOptions) -> bool:
    """Create the run folder, or check that this run may continue in it; False if nothing is left to do.

    Raises:
        UserError: If the folder was created with more steps or with other evaluation settings.
    """
    content = _spec_content(folder.path.name, prepared, options)
    if not folder.exists():
        folder.create(content, asdict(environment(options.device, options.plugins)))
        return True
    done, steps = int(folder.spec()["train"]["steps"]), prepared.spec.train.steps
    finished = folder.status().get("state") == "finished"
    check_evaluation(folder, prepared.spec)
    if finished and steps <= done:
        return False
    if steps < done:
        raise UserError(
            f"run {folder.path} was started with --steps {done}, got --steps {steps}; "
            f"use --steps {done} to finish it"
        )
    # The status comes before the larger --steps: after a crash in between, the run must not look finished.
    folder.write_status("running", pid=os.getpid())
    folder.create(content, asdict(environment(options.device, options.plugins)))
    return True


def check_evaluation(folder: RunFolder, spec: RunSpec) -> None:
    """Check that the run in `folder` was started with the evaluation settings of `spec`.

    Evaluation points may differ, because a continued run has more of them.

    Raises:
        UserError: If any other setting differs.
    """
    stored = folder.spec()
    free = {"points", "extras", "extractor_file", "extractor_sha256", "extractor_batch"}
    before = {name: value for name, value in stored.get("eval", {}).items() if name not in free}
    # Earlier versions recorded the extractor with the data, or not at all if the data set decides it.
    recorded = (stored.get("data") or {}).get("extractor") or lookup(DATASETS, spec.dataset).extractor
    before["extractor"] = before.get("extractor") or recorded
    if before != spec.eval.model_dump(mode="json", exclude=free):
        raise UserError(
            f"run {folder.path} was started with other evaluation settings; use the same ones, choose "
            f"another --output, or change them with `stbench evaluate` after it has finished"
        )
    decoder = (stored.get("data") or {}).get("vae_sha256", "")
    if spec.data is not None and decoder not in ("", spec.data.vae_sha256):
        raise UserError(
            f"run {folder.path} was started with another autoencoder: expected sha256 {decoder[:12]}, found "
            f"{spec.data.vae_sha256[:12] or 'none'}; restore it, or choose another --output"
        )


def _spec_content(name: str, prepared: PreparedRun, options: RunOptions) -> dict[str, Any]:
    """The content of spec.json."""
    content: dict[str, Any] = prepared.spec.model_dump(mode="json")
    return content | {
        "run_id": name,
        "stage_count": len(prepared.stages),
        "stages": prepared.description(),
        "train_hash": prepared.hashes.train,
        "row_hash": prepared.hashes.row,
        "setting_hash": prepared.hashes.setting,
        "plugins": dict(options.plugins),
    }
