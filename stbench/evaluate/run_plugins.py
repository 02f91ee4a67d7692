"""The plug-ins of a past run: a run folder is data, so only files that the user names are executed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from stbench.config.plan import PreparedRun
from stbench.config.spec import RunSpec
from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.core.registry import (
    BACKBONES,
    DATASETS,
    METRICS,
    OBJECTIVES,
    RECIPES,
    SAMPLERS,
    load_plugins,
    lookup,
    names,
    plugin_hash,
)

FILE_MODULE = "stbench_plugin_"
"""Start of the module name of a plug-in file; an installed plug-in has its package's name."""
DIGITS = 16
"""Hexadecimal digits of a sha256 that a message or a protocol shows."""


@dataclass(frozen=True)
class PluginChoice:
    """The plug-ins that the user named for a past run. Picklable."""

    files: tuple[Path, ...] = ()
    allow_changed: bool = False
    """Whether a plug-in may differ from the one that the run was trained with."""


def load_run_plugins(run: Path, recorded: Mapping[str, str], spec: RunSpec, chosen: PluginChoice) -> None:
    """Load the installed plug-ins and the files that the user named, but none that only the record names.

    Args:
        run: The run folder, for messages.
        recorded: Plug-ins that the run was trained with -> sha256.
        spec: The specification of the run.
        chosen: What the user named.

    Raises:
        UserError: If a file differs from the recorded one, or if something the run uses is not registered.
    """
    if not chosen.allow_changed:
        for file in chosen.files:
            _require_recorded(run, file, recorded)
    load_plugins(chosen.files)
    for registry, name in _names(spec):
        if name not in names(registry) and recorded:
            raise UserError(_missing(run, f"{registry.name} '{name}'", recorded))


def changed_plugins(prepared: PreparedRun, stored: Mapping[str, Any]) -> dict[str, str]:
    """What a run uses from plug-ins that differ from the recorded ones: kind -> sha256 now."""
    recorded = set(stored["plugins"].values())
    current = {point.value: _source_hash(point.module) for point in entry_points(group="stbench.plugins")}
    changed = {}
    for kind, registered in _registered(prepared).items():
        found = plugin_hash(registered)
        if not found or found in recorded:
            continue
        if not registered.__module__.startswith(FILE_MODULE):
            # An installed plug-in: its entry point is recorded, which may be another file of the package.
            points = [key for key in stored["plugins"] if _is_inside(registered.__module__, key)]
            if points and all(current.get(key) == stored["plugins"][key] for key in points):
                continue
        changed[kind] = found[:DIGITS]
    return changed


def require_unchanged(run: Path, changed: Mapping[str, str], recorded: Mapping[str, str]) -> None:
    """Raise UserError, with the hashes before and after, unless nothing has changed."""
    if changed:
        kinds = ", ".join(f"{kind} {sha256}" for kind, sha256 in changed.items())
        expected = ", ".join(f"{file} {sha256[:DIGITS]}" for file, sha256 in recorded.items()) or "none"
        raise UserError(
            f"the plug-ins of {run} have changed: expected sha256 {expected}, found {kinds}; "
            f"give the original file, or add --allow-changed-plugin"
        )


def _require_recorded(run: Path, file: Path, recorded: Mapping[str, str]) -> None:
    """Refuse a changed file before it is executed; a file of another name may be a further plug-in."""
    before = [sha256 for name, sha256 in recorded.items() if Path(name).name == file.name]
    if not file.is_file() or not before:
        return
    found = hash_file(file)
    if found not in recorded.values():
        raise UserError(
            f"plug-in {file} has changed since {run} was trained: expected sha256 {before[0]}, found {found}"
            f"; give the original file, or add --allow-changed-plugin"
        )


def _missing(run: Path, what: str, recorded: Mapping[str, str]) -> str:
    files = [name for name in recorded if name.endswith(".py")]
    start = f"{run} uses the {what}, which is not registered"
    if not files:
        return f"{start}; install the package that provides {', '.join(recorded)}"
    named = ", ".join(f"{file} (sha256 {recorded[file][:DIGITS]})" for file in files)
    options = " ".join(f"--plugin {file}" for file in files)
    return (
        f"{start}; it was trained with {named}, and a run folder's plug-ins run only if named: add {options}"
    )


def _names(spec: RunSpec) -> list[tuple[Any, str]]:
    """What the run looks up: registry and name."""
    return [
        (BACKBONES, spec.backbone.name),
        (RECIPES, spec.recipe.name),
        (OBJECTIVES, spec.objective),
        (SAMPLERS, spec.eval.sampler),
        (DATASETS, spec.dataset),
        *((METRICS, name) for name in spec.eval.metrics),
    ]


def _registered(prepared: PreparedRun) -> dict[str, Any]:
    found = {
        f"metric {name}" if registry is METRICS else registry.name: lookup(registry, name)
        for registry, name in _names(prepared.spec)
    }
    stages = {f"stage {stage.name}": type(stage.supervision) for stage in prepared.stages}
    return found | stages


def _is_inside(module: str, entry_point: str) -> bool:
    package = entry_point.partition(":")[0].partition(".")[0]
    return module == package or module.startswith(f"{package}.")


def _source_hash(module: str) -> str:
    source = getattr(sys.modules.get(module), "__file__", None)
    return hash_file(Path(source)) if source else ""
