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
from stbench.config import plan
from stbench.config.build import build_backbone
from stbench.config.init_from import note
from stbench.config.overrides import parse_set, read_config
from stbench.config.plan import describe, planned_recipes
from stbench.config.resolve import completed, specify
from stbench.config.spec import RunSpec
from stbench.core.device import pick_device
from stbench.core.recipe import Artifact
from stbench.core.registry import load_builtins, load_plugins
from stbench.train import engine
from stbench.train.cost import disk_bytes, meta_loader, rehearse
from stbench.train.progress import Hook, Tracker, progress_hook


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


def request_of(call: Invocation) -> tuple[RunSpec, engine.Options]:
    """Config file, then command line, then presets: the resolved specification and where to run it."""
    load_builtins()
    plugins = load_plugins(call.plugins)
    device = pick_device(call.device)
    values: dict[str, Any] = read_config(call.config) if call.config else {}
    overrides = values.pop("set", {}) | parse_set(call.overrides)
    values |= call.given
    spec = specify(completed(values, device), overrides)
    return spec, engine.Options(call.output, device, call.keep, call.reuse, plugins)


def run(call: Invocation) -> None:
    """Train, or go on with, or leave alone a run; print its curve and where the pictures are."""
    spec, options = request_of(call)
    if spec.init is not None:
        print(note(spec.init, plan.prepare(spec)[0].classes))
    hooks: list[Hook] = [progress_hook(spec.train.batch)]
    if call.track:
        _, _, hashed = plan.prepare(spec)
        hooks.append(Tracker(options.output / plan.run_id(spec, hashed.train) / "tensorboard"))
    try:
        record, trained = engine.run(spec, options, hooks)
    except engine.Interrupted as stopped:
        raise KeyboardInterrupt from stopped  # main() prints the command that goes on
    finally:
        for hook in hooks:
            hook.close()
    if not trained:
        print(f"{record.path} is finished at {record.steps} steps: left alone; a larger --steps continues it")
    terminal.print_curve(record)
    pictures = sorted(Path(record.path).glob(f"samples/{record.final_stage}-*.png"))
    if pictures:
        print(f"samples: {pictures[-1].parent}")
    print(f"run folder: {record.path}")


def dry_run(call: Invocation) -> None:
    """Print the resolved plan: stages, steps, images, tapped blocks, teachers, FLOPs, disk."""
    spec, options = request_of(call)
    dataset, jobs, hashed = plan.prepare(spec)
    if spec.init is not None:
        print(note(spec.init, dataset.classes))
    network = build_backbone(spec.backbone, spec.objective, dataset, "meta")
    table = Table(
        "stage", "steps", "images", "taps", "teachers", "evaluated at", "TFLOPs", "disk MiB", title="plan"
    )
    recipes = planned_recipes(jobs, meta_loader(spec, dataset))
    for job, recipe in zip(jobs, recipes, strict=True):
        cost = rehearse(job, recipe, spec, dataset)
        disk = disk_bytes(job, network, options.keep) / 2**20
        table.add_row(
            job.name,
            str(job.steps),
            str(job.images),
            ", ".join(map(str, recipe.taps)) or "-",
            _teachers(recipe),
            ", ".join(map(str, job.points)),
            f"{cost.total / 1e12:.2f}",
            f"{disk:.0f}",
        )
    Console().print(table)
    resolved = spec.model_dump(mode="json") | {"stages": describe(jobs, recipes)}
    print(json.dumps(resolved, indent=1))
    print(f"run folder: {options.output / plan.run_id(spec, hashed.train)}")


def _teachers(recipe: Any) -> str:
    held = (getattr(recipe, field.name) for field in fields(recipe))
    named = [value.name for value in held if isinstance(value, Artifact)]
    return ", ".join([*named, *filter(None, [recipe.needs])]) or "-"
