"""Shell completion of registered names. It reads source files, because importing them would load torch."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

LOCATIONS = {
    "backbone": ("stbench.backbones", "."),
    "recipe": ("stbench.recipes", "."),
    "dataset": ("stbench", "data"),
    "objective": ("stbench", "diffusion"),
}
"""Package, and folder in it, of the files that register the built-in names of each kind."""


def registered_names(kind: str) -> list[str]:
    """Built-in names of a kind of LOCATIONS, in alphabetical order."""
    package, folder = LOCATIONS[kind]
    sources = (file.read_text() for file in (Path(str(files(package))) / folder).glob("*.py"))
    pattern = rf'^@{kind.upper()}S\.register_module\(name="([^"]+)"'
    return sorted(name for source in sources for name in re.findall(pattern, source, re.MULTILINE))


def complete(kind: str) -> Callable[[str], list[str]]:
    """Completion function of an option that takes a name of this kind."""
    return lambda incomplete: [name for name in registered_names(kind) if name.startswith(incomplete)]
