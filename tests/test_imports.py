"""The import rules of pyproject.toml: they hold, and import-linter reports an import that breaks one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"

FORBIDDEN = {
    "stbench/core/bad.py": ("import stbench.train.engine", "Packages import downwards only"),
    "stbench/models/bad.py": ("import mmengine", "mmengine: the registry, config files and tracking"),
    "stbench/recipes/bad.py": (
        "import stbench.diffusion.flow",
        "Backbones and recipes see what a plug-in sees; data sees core and models",
    ),
    "stbench/compare/bad.py": ("import torch", "Comparing needs no torch"),
}


@pytest.fixture()
def tree(tmp_path: Path) -> Path:
    """A copy of the checkout with all packages under stbench/, as in a wheel; its files are links."""
    (tmp_path / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    ignored = shutil.ignore_patterns("__pycache__", "backbones", "recipes")
    shutil.copytree(ROOT / "stbench", tmp_path / "stbench", ignore=ignored, copy_function=os.symlink)
    for package in ("backbones", "recipes"):
        target = tmp_path / "stbench" / package
        shutil.copytree(ROOT / package, target, ignore=ignored, copy_function=os.symlink)
    return tmp_path


def lint(tree: Path) -> tuple[int, str]:
    """Run import-linter in `tree`; returns exit code and report."""
    done = subprocess.run([sys.executable, "-c", LINT], cwd=tree, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_packages_keep_the_import_rules(tree: Path) -> None:
    code, report = lint(tree)
    assert code == 0 and " 0 broken" in report, report


@pytest.mark.parametrize("file", FORBIDDEN)
def test_a_forbidden_import_breaks_its_rule(tree: Path, file: str) -> None:
    statement, contract = FORBIDDEN[file]
    (tree / file).write_text(f"{statement}\n")
    code, report = lint(tree)
    assert code == 1 and f"{contract} BROKEN" in report, report
