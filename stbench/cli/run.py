"""What the command line's heavier commands do: turn arguments into a request, call the engine, print what
came out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stbench.compare import terminal
from stbench.config.init_from import describe_start
from stbench.config.overrides import parse_set, read_config
from stbench.config.plan import PreparedRun, prepare
from stbench.config.resolve import resolve_options
from stbench.core.device import default_precision, pick_device
from stbench.core.recipe import Artifact
from stbench.core.registry import load_builtins, load_plugins
from stbench.runs.folder import OutputFolder
from stbench.train import engine
from stbench.train.cost import disk_bytes, expected_cost
from stbench.train.progress import Hook, progress_hook
from stbench.train.tracking import Tracker


@dataclass(frozen=True)
class Invocation:
    """The arguments of `stbench run`."""

    given: Mapping[str, Any]
    """Options that were typed."""
    overrides: Sequence[str]
    config: Path | None
    plugins: Sequence[Path]
    device: str
    output: Path
    keep: engine.Keep
    reuse: bool
    track: bool


def prepare_run(call: Invocation) -> tuple[PreparedRun, engine.RunOptions]:
    """Combine config file, command line and presets into a prepared run and where to run it."""
    load_builtins()
    plugins = load_plugins(call.plugins)
    device = pick_device(call.device)
    values: dict[str, Any] = {"precision": default_precision(device)}
    values |= read_config(call.config) if call.config else {}
    overrides = values.pop("set", {}) | parse_set(call.overrides)
    prepared = prepare(resolve_options({**values, **call.given}, overrides))
    return prepared, engine.RunOptions(call.output, device, call.keep, call.reuse, plugins)


def run(call: Invocation) -> None:
    """Train a run, or what is left of it; print its curve and where its pictures are."""
    prepared, options = prepare_run(call)
    _print_start(prepared)
    folder = OutputFolder(options.output).run(prepared.run_id)
    hooks: list[Hook] = [progress_hook(prepared.spec.train.batch)]
    if call.track:
        hooks.append(Tracker(folder.tensorboard))
    try:
        record, trained = engine.run(prepared, options, hooks)
    except engine.Interrupted as stopped:
        raise KeyboardInterrupt from stopped  # main() prints the command that resumes
    finally:
        for hook in hooks:
            hook.close()
    if not trained:
        print(
            f"{record.path} is already finished at {record.steps} steps; nothing to do. "
            f"Use a larger --steps to continue it"
        )
    terminal.print_curve(record)
    pictures = folder.sample_files(record.final_stage)
    if pictures:
        print(f"samples: {pictures[-1].parent}")
    print(f"run folder: {record.path}")


def _print_start(prepared: PreparedRun) -> None:
    if prepared.spec.init is not None:
        print(describe_start(prepared.spec.init, prepared.dataset.classes))


def dry_run(call: Invocation) -> None:
    """Print the plan: stages, steps, images, tapped blocks, teachers, FLOPs, disk space, all settings."""
    prepared, options = prepare_run(call)
    _print_start(prepared)
    table = Table(
        "stage", "steps", "images", "taps", "teachers", "evaluated at", "TFLOPs", "disk MiB", title="plan"
    )
    for stage in prepared.stages:
        cost = expected_cost(prepared, stage)
        disk = disk_bytes(prepared, stage, options.keep) / 2**20
        table.add_row(
            stage.name,
            str(stage.steps),
            str(stage.images),
            ", ".join(map(str, stage.supervision.taps)) or "-",
            _teachers(stage.supervision),
            ", ".join(map(str, stage.points)),
            f"{cost.total / 1e12:.2f}",
            f"{disk:.0f}",
        )
    Console().print(table)
    settings = prepared.spec.model_dump(mode="json") | {"stages": prepared.description()}
    print(json.dumps(settings, indent=1))
    print(f"run folder: {options.output / prepared.run_id}")


def _teachers(supervision: Any) -> str:
    values = (getattr(supervision, field.name) for field in fields(supervision))
    named = [value.name for value in values if isinstance(value, Artifact)]
    return ", ".join([*named, *filter(None, [supervision.needs])]) or "-"
