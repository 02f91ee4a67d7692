"""The registries, names with did-you-mean errors, and plug-in loading. The only file that knows mmengine's
Registry.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from mmengine.registry import Registry

from stbench.core.errors import UserError
from stbench.core.files import hash_file

__all__ = ["BACKBONES", "DATASETS", "OBJECTIVES", "RECIPES", "SAMPLERS", "UserError"]


BACKBONES = Registry("backbone")
RECIPES = Registry("recipe")
OBJECTIVES = Registry("objective")
SAMPLERS = Registry("sampler")
DATASETS = Registry("dataset")

BUILTINS = (
    "diffusion.noise_prediction",
    "diffusion.flow",
    "diffusion.ddpm_samplers",
    "diffusion.dpm_solver",
    "diffusion.flow_samplers",
    "data.digits",
    "data.prepared",
)
"""Modules of stbench that register objectives, samplers and data sets, in the order they are listed."""


def names(registry: Registry) -> list[str]:
    """Registered names, in order of registration."""
    return list(registry.module_dict)


def suggest(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error message: "; did you mean 'x'?", or the known names if none is similar.

    `prefix` is put before the names in the message, such as "train." before options of a section.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{prefix}{near[0]}'?"
    return f"; known: {', '.join(prefix + one for one in known) or 'none'}"


def lookup(registry: Registry, name: str) -> Any:
    """The registered object, or a UserError that names the nearest one."""
    found = registry.module_dict.get(name)
    if found is None:
        raise UserError(f"unknown {registry.name} '{name}'{suggest(name, names(registry))}")
    return found


def load_builtins() -> None:
    """Import every file of backbones/ and recipes/, and the registering modules of stbench."""
    for module in BUILTINS:
        importlib.import_module(f"stbench.{module}")
    for package_name in ("stbench.backbones", "stbench.recipes"):
        package = importlib.import_module(package_name)
        for module_info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module_info.name}")


def load_plugins(files: Iterable[Path] = (), group: str = "stbench.plugins") -> dict[str, str]:
    """Import plug-in files and installed entry points; returns {file or entry point: sha256 of the file}.

    Raises UserError for a file that is missing or that fails to import.
    """
    hashes = {}
    for point in entry_points(group=group):
        module = _guarded(point.value, point.load)
        source = getattr(module, "__file__", None) or getattr(sys.modules.get(point.module), "__file__", None)
        hashes[point.value] = hash_file(Path(source)) if source else ""
    for file in files:
        if not file.is_file():
            raise UserError(
                f"plug-in file not found: {file}; expected a Python file, give its path after --plugin"
            )
        _guarded(str(file), functools.partial(_import_file, file))
        hashes[str(file)] = hash_file(file)
    return hashes


def plugin_hash(registered: Any) -> str:
    """The sha256 of the plug-in file that registered this object; "" for a built-in."""
    module = sys.modules.get(registered.__module__)
    source = getattr(module, "__file__", None)
    return "" if source is None or registered.__module__.startswith("stbench.") else hash_file(Path(source))


def _guarded(what: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except UserError:
        raise
    except (
        Exception,
        SystemExit,
    ) as error:  # whatever a plug-in raises, the user needs its name and the reason
        raise UserError(f"plug-in {what} failed to import: {type(error).__name__}: {error}") from error


def _import_file(file: Path) -> Any:
    name = f"stbench_plugin_{hash_file(file)[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"plug-in {file} is not a Python file; expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
