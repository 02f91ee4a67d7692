"""Registries of everything that a plug-in can add, lookup by name, and plug-in loading.

The only module that uses mmengine's Registry.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from mmengine.registry import Registry as MMEngineRegistry

from stbench.core.backbone import Backbone
from stbench.core.errors import UserError
from stbench.core.files import hash_file
from stbench.core.objective import Objective
from stbench.core.renamed import renamed_imports
from stbench.core.safe_load import shorten, shown
from stbench.core.text import check_name


class Registry(MMEngineRegistry):
    """A registry of one kind of object. Its names can be part of a path and are readable in every output."""

    def __init__(
        self, name: str, expected: str = "a class or function", accepts: Callable[[Any], bool] = callable
    ) -> None:
        super().__init__(name)
        self.expected, self.accepts = expected, accepts

    def _register_module(
        self, module: Any, module_name: str | list[str] | None = None, force: bool = False
    ) -> None:
        """Check object and names before mmengine registers them. Raises UserError if one is not allowed."""
        if not self.accepts(module):
            raise UserError(
                f"{self.name} {shorten(str(module_name or module.__name__))} must be {self.expected}, found "
                f"{shown(module)}; register it elsewhere"
            )
        given = module_name if isinstance(module_name, list) else [module_name or module.__name__]
        for name in given:
            check_name(name, f"the name of a {self.name}")
        super()._register_module(module, module_name, force)


def _is_backbone(module: Any) -> bool:
    if not isinstance(module, type) or not issubclass(module, Backbone):
        return False
    presets = module.presets
    return isinstance(presets, Mapping) and all(isinstance(preset, Mapping) for preset in presets.values())


BACKBONES = Registry("backbone", "a subclass of Backbone with a mapping `presets`", _is_backbone)
RECIPES = Registry("recipe", "a function that returns stages", lambda module: not isinstance(module, type))
OBJECTIVES = Registry(
    "objective",
    "a subclass of Objective",
    lambda module: isinstance(module, type) and issubclass(module, Objective),
)
SAMPLERS = Registry(
    "sampler",
    "a subclass of stbench.diffusion.sampler.Sampler",
    lambda module: isinstance(module, type) and hasattr(module, "inverts"),
)
METRICS = Registry(
    "metric",
    "a function of stbench.evaluate.registered_metrics.Samples",
    lambda module: not isinstance(module, type),
)
DATASETS = Registry(
    "dataset",
    "a subclass of stbench.data.dataset.Dataset",
    lambda module: isinstance(module, type) and hasattr(module, "preset_for"),
)
EXTRACTORS = Registry(
    "extractor",
    "a subclass of torch.nn.Module",
    lambda module: isinstance(module, type) and hasattr(module, "forward"),
)

plugin_modules: set[str] = set()
"""Names of the modules that `load_plugins` has imported."""

BUILTINS = (
    "diffusion.noise_prediction",
    "diffusion.flow",
    "diffusion.ddpm_samplers",
    "diffusion.dpm_solver",
    "diffusion.flow_samplers",
    "data.digits",
    "data.path_sets",
)
"""Modules of stbench that register objectives, samplers and data sets."""


def names(registry: Registry) -> list[str]:
    """Return the registered names in order of registration."""
    return list(registry.module_dict)


def suggest(name: str, known: Iterable[str], *, prefix: str = "") -> str:
    """Return the end of an error message about an unknown name: the closest known name, or all of them.

    `prefix` is put before each known name, such as "train." for options of a section.
    """
    known = list(known)
    closest = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.5)  # quadratic in the length
    if closest:
        return f"; did you mean '{prefix}{closest[0]}'?"
    return f"; known: {', '.join(prefix + name for name in known)}" if known else "; none is known"


def lookup(registry: Registry, name: str) -> Any:
    """Return the registered object. Raises UserError with the closest name if there is none."""
    found = registry.module_dict.get(name)
    if found is None:
        raise UserError(f"unknown {registry.name} {shorten(name)}{suggest(name, names(registry))}")
    return found


def name_of(registry: Registry, registered: type) -> str:
    """The name under which a class is registered, otherwise its own name."""
    found = (name for name, cls in registry.module_dict.items() if cls is registered)
    return next(found, registered.__name__)


def load_builtins() -> None:
    """Import every file of backbones/ and recipes/, and the modules in `BUILTINS`."""
    for module in BUILTINS:
        importlib.import_module(f"stbench.{module}")
    for package_name in ("stbench.backbones", "stbench.recipes"):
        package = importlib.import_module(package_name)
        for module_info in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module_info.name}")


def load_plugins(files: Iterable[Path] = (), group: str = "stbench.plugins") -> dict[str, str]:
    """Import plug-in files and installed entry points; return {file or entry point: sha256 of its file}.

    Raises UserError if a file is missing or cannot be imported.
    """
    hashes = {}
    for point in entry_points(group=group):
        plugin_modules.add(point.module)
        loaded = _load_plugin(point.value, point.load)
        source = getattr(loaded, "__file__", None) or getattr(sys.modules.get(point.module), "__file__", None)
        hashes[point.value] = hash_file(Path(source)) if source else ""
    for file in files:
        if not file.is_file():
            raise UserError(f"plug-in file not found: {file}; expected a Python file after --plugin")
        _load_plugin(str(file), functools.partial(_import_file, file))
        hashes[str(file)] = hash_file(file)
    return hashes


def plugin_hash(registered: Any) -> str:
    """Return the sha256 of the plug-in file that defines a registered object; "" for a built-in one."""
    module = sys.modules.get(registered.__module__)
    source = getattr(module, "__file__", None)
    return "" if source is None or registered.__module__.startswith("stbench.") else hash_file(Path(source))


def _load_plugin(plugin: str, load: Callable[[], Any]) -> Any:
    """Call `load`; turn whatever it raises into a UserError that names the plug-in."""
    try:
        return load()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        renamed = _renamed_imports_behind(error) if isinstance(error, ImportError) else {}
        if renamed:
            changes = ", ".join(f"{old} is now {new}" for old, new in renamed.items())
            raise UserError(
                f"plug-in {plugin} imports old names: {changes}; rename them and run again"
            ) from error
        raise UserError(f"plug-in {plugin} failed to import: {type(error).__name__}: {error}") from error


def _renamed_imports_behind(error: ImportError) -> dict[str, str]:
    """Renamed names, old -> new, that the file with the failed import statement imports from stbench."""
    # The innermost frames belong to importlib; the file is that of the last frame which has source code.
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames if Path(frame.filename).is_file()]
    return renamed_imports(files[-1].read_text()) if files else {}


def _import_file(file: Path) -> ModuleType:
    """Import a Python file under a name made from its content, once per content."""
    name = f"stbench_plugin_{hash_file(file)[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise UserError(f"plug-in {file} is not a Python file; expected a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up in sys.modules while it is executed.
    sys.modules[name] = module
    plugin_modules.add(name)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
