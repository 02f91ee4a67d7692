"""What the command line's heavier commands do: turn arguments into a request, call the engine, print what
came out.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stbench import engine, report, revisit
from stbench.config import RunSpec, build_backbone, build_objective
from stbench.contracts import Artifact, Backbone
from stbench.environment import pick_device
from stbench.errors import UserError
from stbench.evaluate import METRICS
from stbench.hooks import Hook, Tracker, point_line, progress_hook
from stbench.initial import note
from stbench.plan import describe, disk_bytes, meta_loader, planned_recipes, rehearse
from stbench.registry import (
    BACKBONES,
    DATASETS,
    OBJECTIVES,
    RECIPES,
    SAMPLERS,
    load_builtins,
    load_plugins,
    lookup,
    names,
)
from stbench.resolve import evaluation, parse_set, read_config
from stbench.specify import completed, scales, specify

IMAGENET = {"channels": 4, "input_size": 32, "classes": 1000}
"""Latents of 256x256 images: what published sizes are counted at."""


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
        print(note(spec.init, engine.prepare(spec)[0].classes))
    hooks: list[Hook] = [progress_hook(spec.train.batch)]
    if call.track:
        _, _, hashed = engine.prepare(spec)
        hooks.append(Tracker(options.output / engine.run_id(spec, hashed.train) / "tensorboard"))
    try:
        record, trained = engine.run(spec, options, hooks)
    except engine.Interrupted as stopped:
        raise KeyboardInterrupt from stopped  # main() prints the command that goes on
    finally:
        for hook in hooks:
            hook.close()
    if not trained:
        print(f"{record.path} is finished at {record.steps} steps: left alone; a larger --steps continues it")
    report.print_curve(record)
    pictures = sorted(Path(record.path).glob(f"samples/{record.final_stage}-*.png"))
    if pictures:
        print(f"samples: {pictures[-1].parent}")
    print(f"run folder: {record.path}")


def dry_run(call: Invocation) -> None:
    """Print the resolved plan: stages, steps, images, tapped blocks, teachers, FLOPs, disk."""
    spec, options = request_of(call)
    dataset, jobs, hashed = engine.prepare(spec)
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
    print(f"run folder: {options.output / engine.run_id(spec, hashed.train)}")


def _teachers(recipe: Any) -> str:
    held = (getattr(recipe, field.name) for field in fields(recipe))
    named = [value.name for value in held if isinstance(value, Artifact)]
    return ", ".join([*named, *filter(None, [recipe.needs])]) or "-"


def list_registered(kind: str, as_json: bool, plugins: Sequence[Path]) -> None:
    """Print one registry."""
    load_builtins()
    load_plugins(plugins)
    rows = _LISTERS[kind]()
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table(*rows[0]) if rows else Table(kind)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console().print(table)


def _backbone_rows() -> list[dict[str, Any]]:
    rows = []
    for name in names(BACKBONES):
        family = lookup(BACKBONES, name)
        for size in family.presets:
            network = _published(family, size)
            info = network.info
            rows.append(
                {
                    "backbone": f"{name}-{size}",
                    "objective": family.presets[size].get("objective", family.objective),
                    "blocks": info.depth,
                    "width": info.width,
                    "tokens": info.tokens,
                    "parameters": sum(p.numel() for p in network.parameters()),
                    "GMACs": round(network.flops() / 2e9, 2),
                    "counted at": f"{info.channels}x{info.input_size}x{info.input_size}",
                }
            )
    return rows


def _published(family: Any, size: str) -> Backbone:
    """A preset on the meta device at its published latent size: the embedded digits' for ti, 256x256 latents
    else.
    """
    import torch

    preset = {k: v for k, v in family.presets[size].items() if k != "objective"}
    digits = lookup(DATASETS, "digits")
    facts = IMAGENET
    if size.startswith("ti"):
        facts = {"channels": digits.channels, "input_size": digits.input_size, "classes": digits.classes}
    out = build_objective(family.presets[size].get("objective", family.objective)).out_channels(
        facts["channels"]
    )
    with torch.device("meta"):
        return family(**facts, out_channels=out, size=size, **preset)


def _recipe_rows() -> list[dict[str, Any]]:
    rows = []
    for name in sorted(names(RECIPES)):
        method = lookup(RECIPES, name)
        parameters = list(inspect.signature(method).parameters.values())[1:]
        options = ", ".join(f"{p.name}={p.default}" for p in parameters)
        rows.append({"recipe": name, "help": inspect.getdoc(method) or "", "options": options or "none"})
    return rows


def _dataset_rows() -> list[dict[str, Any]]:
    rows = []
    for name in names(DATASETS):
        cls = lookup(DATASETS, name)
        latents = f"{cls.channels}x{cls.input_size}x{cls.input_size}"
        help_text = (inspect.getdoc(cls) or "").split("\n\n")[0]
        rows.append(
            {
                "dataset": name,
                "images": cls.size,
                "latents": latents,
                "classes": cls.classes,
                "help": help_text,
            }
        )
    return rows


def _objective_rows() -> list[dict[str, Any]]:
    return [
        {
            "objective": name,
            "samplers": ", ".join(lookup(OBJECTIVES, name).samplers),
            "help": _first(OBJECTIVES, name),
        }
        for name in sorted(names(OBJECTIVES))
    ]


def _sampler_rows() -> list[dict[str, Any]]:
    return [{"sampler": name, "help": _first(SAMPLERS, name)} for name in sorted(names(SAMPLERS))]


def _metric_rows() -> list[dict[str, Any]]:
    return [{"metric": name, "help": text} for name, text in METRICS.items()]


def _first(registry: Any, name: str) -> str:
    return (inspect.getdoc(lookup(registry, name)) or "").split("\n\n")[0].replace("\n", " ")


_LISTERS = {
    "backbones": _backbone_rows,
    "recipes": _recipe_rows,
    "datasets": _dataset_rows,
    "objectives": _objective_rows,
    "samplers": _sampler_rows,
    "metrics": _metric_rows,
}


def sample(path: Path, count: int, output: Path, guidance: float, seed: int, device: str) -> None:
    """Draw images from a finished run to an npz."""
    if output.suffix != ".npz":
        raise UserError(
            f"--output wants a file that ends in .npz, got {output}; try {output.with_suffix('.npz')}"
        )
    load_builtins()
    revisit.sample_to_npz(revisit.open_run(path), count, output, guidance, seed, pick_device(device))
    print(f"{count} images: {output}")


def evaluate(
    path: Path, guidance: str | None, samples: int | None, overrides: Sequence[str], device: str
) -> None:
    """Add evaluation rows to a run under another protocol."""
    load_builtins()
    run = revisit.open_run(path)
    settings = _evaluation_settings(overrides)
    if guidance is not None:
        settings["guidance"] = scales(guidance)
    if samples is not None:
        settings["samples"] = samples
    checked = evaluation(run.spec.eval.model_dump() | settings, run.spec.objective, run.spec.train.steps)
    added = revisit.evaluate_again(run, checked, pick_device(device))
    for point in added:
        print(point_line(run.jobs[-1], point))
    print(f"{len(added)} rows added to {path}")


def _evaluation_settings(overrides: Sequence[str]) -> dict[str, Any]:
    settings = parse_set(overrides)
    for name in settings:
        if not name.startswith("eval.") or name == "eval.points":
            raise UserError(
                f"evaluate changes how the kept points are evaluated: expected eval.*, got '{name}'; "
                f"for example --set eval.steps=50"
            )
    return {name.removeprefix("eval."): value for name, value in settings.items()}
