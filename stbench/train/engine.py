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
from stbench.models.weights import verify_file
from stbench.runs.folder import OutputFolder, RunFolder
from stbench.runs.records import RunRecord
from stbench.runs.stage_folder import CHECKPOINTS
from stbench.train.environment import environment
from stbench.train.hooks import Hook
from stbench.train.interrupt import Interrupt
from stbench.train.loop import Interrupted, Keep, RunOptions, StageTrainer
from stbench.train.memory import require_training_memory

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
    if is_done(folder, prepared.spec):  # not under the lock, which cannot be taken on a read-only disk
        verify_weights(folder)
        return folder.record(), False
    require_training_memory(prepared, options.device)
    with folder.lock():
        if is_done(folder, prepared.spec):  # another process has finished it in the meantime
            return folder.record(), False
        if notice := other_environment(folder, options):
            for hook in hooks:
                hook.on_notice(notice)
        open_folder(folder, prepared, options)
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


def is_done(folder: RunFolder, spec: RunSpec) -> bool:
    """Whether the run in `folder` is finished with at least the requested steps.

    Raises:
        UserError: If it was started with other evaluation settings.
    """
    if not folder.exists() or folder.status()["state"] != "finished":
        return False
    check_evaluation(folder, spec)
    return spec.train.steps <= int(folder.spec()["train"]["steps"])


def verify_weights(folder: RunFolder) -> None:
    """Verify the stored weights of a run against their recorded sha256.

    Raises:
        UserError: If a file is damaged.
    """
    for file in sorted(folder.path.glob(f"{CHECKPOINTS}/*/*-*.safetensors")):
        if file.name.startswith(("raw-", "ema-")):
            verify_file(file, folder.weights_sha256(file))


def other_environment(folder: RunFolder, options: RunOptions) -> str:
    """One line about what differs from where the run was trained so far; "" for nothing or a new run."""
    if not has_results(folder):
        return ""
    before, now = folder.environment(), asdict(environment(options.device, options.plugins))
    pairs = [(str(before.get(name)), str(now[name])) for name in ("device", "hardware")]
    versions = before.get("versions")
    torch_before = versions.get("torch") if isinstance(versions, dict) else None
    pairs.append((f"torch {torch_before}", f"torch {now['versions']['torch']}"))
    changes = [f"{was} (now {new})" for was, new in pairs if was != new]
    if not changes:
        return ""
    return (
        f"{folder.path} was trained so far with {', '.join(changes)}: the result may differ in the last bits "
        f"from an uninterrupted run"
    )


def has_results(folder: RunFolder) -> bool:
    """Whether anything of the run in `folder` was saved: a training state, a stage or an evaluation."""
    states = folder.path.glob(f"{CHECKPOINTS}/*/*.json")
    return folder.exists() and bool(folder.points() or folder.stages() or any(states))


def open_folder(folder: RunFolder, prepared: PreparedRun, options: RunOptions) -> None:
    """Create the run folder, or check that this run, which is not done, may continue in it.

    A run that failed before anything was saved does not restrict the settings.

    Raises:
        UserError: If the folder was created with more steps or with other evaluation settings.
    """
    if has_results(folder):
        folder.record()  # raises if a line or a file is missing
        done, steps = int(folder.spec()["train"]["steps"]), prepared.spec.train.steps
        check_evaluation(folder, prepared.spec)
        if steps < done:
            raise UserError(
                f"run {folder.path} was started with --steps {done}, got --steps {steps}; "
                f"use --steps {done} to finish it"
            )
    # The status comes before the larger --steps: after a crash in between, the run must not look finished.
    if folder.exists():
        folder.write_status("running", pid=os.getpid())
    content = _spec_content(folder.path.name, prepared, options)
    folder.create(content, asdict(environment(options.device, options.plugins)))


def check_evaluation(folder: RunFolder, spec: RunSpec) -> None:
    """Check that the run in `folder` was started with the evaluation settings of `spec`.

    Evaluation points may differ, because a continued run has more of them. A run of which nothing was saved
    may be started with other settings.

    Raises:
        UserError: If any other setting differs.
    """
    if not has_results(folder):
        return
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
