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
from stbench.core.world import World, describe_lost_rank, is_lost_rank
from stbench.evaluate.posthoc_ema import POSTHOC
from stbench.evaluate.run_plugins import changed_plugins
from stbench.models.weights import verify_file
from stbench.runs.folder import OutputFolder, RunFolder
from stbench.runs.records import RunRecord
from stbench.runs.stage_folder import CHECKPOINTS
from stbench.train.environment import environment
from stbench.train.hooks import Hook
from stbench.train.interrupt import Interrupt
from stbench.train.loop import Interrupted, StageTrainer
from stbench.train.memory import require_training_memory
from stbench.train.options import Keep, RunOptions

__all__ = ["Interrupted", "Keep", "RunOptions", "check_evaluation", "run"]


def run(prepared: PreparedRun, options: RunOptions, hooks: Sequence[Hook] = ()) -> tuple[RunRecord, bool]:
    """Train and evaluate a run, or what is left of it.

    Returns:
        The record of the run, and whether anything was done.

    Raises:
        UserError: If the folder is in use or was created with other settings, or if training diverges.
        Interrupted: After Ctrl-C or SIGTERM, with everything saved.
    """
    folder, world = OutputFolder(options.output).run(prepared.run_id), options.world
    check_batch(prepared.spec, world)
    done = world.from_main(lambda: _finished(folder, prepared.spec))
    if done is not None:  # not under the lock, which cannot be taken on a read-only disk
        return done, False
    require_training_memory(prepared, options.device, ranks=world.size, shard=options.shard)
    with contextlib.ExitStack() as stack:
        # Rank 0 opens the folder for all ranks, which see the same one.
        done = world.from_main(lambda: _open(folder, prepared, options, hooks, stack))
        if done is not None:
            return done, False
        if world.any(not folder.exists()):
            raise UserError(
                f"{folder.path} must be on a file system that all ranks share; choose another --output"
            )
        with _status(folder, world), Interrupt(patient=world.size > 1) as interrupt:
            dataset = prepared.dataset.to(options.device)
            artifacts: dict[str, Artifact] = {}
            for stage in prepared.stages:
                trainer = StageTrainer(
                    prepared,
                    stage,
                    dataset=dataset,
                    folder=folder,
                    options=options,
                    hooks=hooks if world.is_main else (),
                    interrupt=interrupt,
                    earlier=artifacts,
                )
                artifacts[stage.name] = trainer.execute()
        return world.from_main(folder.record), True


def check_batch(spec: RunSpec, world: World) -> None:
    """Raise UserError if a micro-batch has fewer images than there are ranks."""
    images = spec.train.batch // spec.train.accumulate
    if images < world.size:
        raise UserError(
            f"expected at least one image per rank, got {world.size} ranks and {images} images at a time "
            f"(train.batch={spec.train.batch}, train.accumulate={spec.train.accumulate}); use fewer ranks"
        )


def _finished(folder: RunFolder, spec: RunSpec) -> RunRecord | None:
    """The record of a finished run, with its weights verified; None if it is not finished."""
    if not is_done(folder, spec):
        return None
    verify_weights(folder)
    return folder.record()


def _open(
    folder: RunFolder,
    prepared: PreparedRun,
    options: RunOptions,
    hooks: Sequence[Hook],
    stack: contextlib.ExitStack,
) -> RunRecord | None:
    """Lock the folder until `stack` is closed, and open it.

    Returns the record if another process has finished the run in the meantime, otherwise None.
    """
    stack.enter_context(folder.lock())
    if is_done(folder, prepared.spec):
        return folder.record()
    if notice := other_environment(folder, options):
        for hook in hooks:
            hook.on_notice(notice)
    for hook in hooks:
        hook.on_start()
    open_folder(folder, prepared, options)
    return None


@contextlib.contextmanager
def _status(folder: RunFolder, world: World) -> Iterator[None]:
    """Keep status.json up to date while the run is trained."""
    if not world.is_main:
        yield
        return
    folder.write_status("running", pid=os.getpid())
    try:
        yield
    except Interrupted:
        folder.write_status("stopped")
        raise
    except Exception as error:
        lost = is_lost_rank(error)
        reason = (
            f"a rank was lost: {describe_lost_rank(error)}" if lost else f"{type(error).__name__}: {error}"
        )
        folder.write_status("failed", error=reason)
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
    check_averages(folder, spec)
    return spec.train.steps <= int(folder.spec()["train"]["steps"])


def verify_weights(folder: RunFolder) -> None:
    """Verify the stored weights of a run against their recorded sha256.

    Raises:
        UserError: If a file is damaged.
    """
    for file in sorted(folder.path.glob(f"{CHECKPOINTS}/*/*-*.safetensors")):
        if file.name.startswith(("raw-", "ema-", f"{POSTHOC}-")):
            verify_file(file, folder.weights_sha256(file))


def other_environment(folder: RunFolder, options: RunOptions) -> str:
    """One line about what differs from where the run was trained so far; "" for nothing or a new run."""
    if not has_results(folder):
        return ""
    before, now = (
        folder.environment(),
        asdict(environment(options.device, options.plugins, options.world.size)),
    )
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
        check_plugins(folder, prepared)
        check_averages(folder, prepared.spec)
        if steps < done:
            raise UserError(
                f"run {folder.path} was started with --steps {done}, got --steps {steps}; "
                f"use --steps {done} to finish it"
            )
    # The status comes before the larger --steps: after a crash in between, the run must not look finished.
    if folder.exists():
        folder.write_status("running", pid=os.getpid())
    content = _spec_content(folder.path.name, prepared, options)
    folder.create(content, asdict(environment(options.device, options.plugins, options.world.size)))


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
    free = {"points", "extras", "extractor_file", "extractor_sha256", "extractor_batch", "fdr_files"}
    before = {name: value for name, value in stored.get("eval", {}).items() if name not in free}
    # Earlier versions recorded the extractor with the data, or not at all if the data set decides it.
    recorded = (stored.get("data") or {}).get("extractor") or lookup(DATASETS, spec.dataset).extractor
    unset: dict[str, Any] = {"fdr": [], "metrics": [], "guides": ""}
    before = {**unset, **before, "extractor": before.get("extractor") or recorded}
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


def check_plugins(folder: RunFolder, prepared: PreparedRun) -> None:
    """Raise UserError if the run in `folder` was evaluated with another sampler or metric of a plug-in."""
    stored = folder.spec()
    changed = changed_plugins(prepared, stored)
    kinds = [kind for kind in changed if kind.startswith(("sampler", "metric "))]  # hashes cover the others
    if kinds:
        before = ", ".join(map(str, stored["plugins"].values())) or "none"
        raise UserError(
            f"run {folder.path} was started with another plug-in for {', '.join(kinds)}: expected sha256 "
            f"{before}, found {changed[kinds[0]]}; give the original file, or choose another --output"
        )


def check_averages(folder: RunFolder, spec: RunSpec) -> None:
    """Raise UserError if the run in `folder` was started with another train.posthoc_ema, in no hash."""
    if not has_results(folder):
        return
    before = bool(folder.spec()["train"].get("posthoc_ema", False))
    if before != spec.train.posthoc_ema:
        word = str(before).lower()
        raise UserError(
            f"run {folder.path} was started with train.posthoc_ema={word}; add "
            f"--set train.posthoc_ema={word}, or choose another --output"
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
