"""What a user installs: a whole wheel, packages under one name, commands that answer without torch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.fake_runs import write_run

ROOT = Path(__file__).parents[1]
FOLDERS = {"stbench": "stbench", "stbench.backbones": "backbones", "stbench.recipes": "recipes"}
HEAVY = ("torch", "torchvision", "timm", "mmengine", "diffusers", "torch_fidelity", "sklearn", "scipy")


def python(code: str, *arguments: str, cwd: Path = ROOT, path: Path | None = None) -> str:
    """Run code in a fresh interpreter and return what it printed; `path` goes before everything installed."""
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def loaded(code: str, *arguments: str) -> set[str]:
    """Heavy packages that the code has imported when it ends."""
    tail = f"\nimport sys; print('LOADED', *[m for m in {HEAVY} if m in sys.modules])"
    return set(python(code + tail, *arguments).rpartition("LOADED")[2].split())


COMMAND = """
import sys
from stbench.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy that holds what git would carry."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    links = shutil.ignore_patterns("__pycache__", "backbones", "recipes")
    for name in FOLDERS.values():
        shutil.copytree(ROOT / name, source / name, ignore=links)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(target)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = target.glob("*.whl")
    return found


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in FOLDERS.items():
        files = [
            f for f in (ROOT / folder).rglob("*") if f.suffix in (".py", ".json", ".safetensors", ".yaml")
        ]
        for file in files:
            inside = file.relative_to(ROOT / folder).as_posix()
            if folder != "stbench" or not inside.startswith(("backbones/", "recipes/")):
                assert f"{package.replace('.', '/')}/{inside}" in held


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    held = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    assert {Path(name).suffix for name in held} - {".yaml"} == {".py", ".json", ".safetensors"}
    assert all(name.startswith("stbench/recipes/suites/") for name in held if name.endswith(".yaml"))
    assert all(name.startswith("stbench/") for name in held)


def test_the_wheel_runs_on_its_own(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import stbench, json; from stbench.core.registry import *; from stbench.core import registry as r;"
        "r.load_builtins(); from stbench.models.autoencoder import digits_autoencoder; digits_autoencoder();"
        "print(json.dumps([stbench.__file__, r.names(r.BACKBONES), r.names(r.RECIPES)]))"
    )
    file, backbones, recipes = json.loads(python(code, cwd=tmp_path, path=tmp_path))
    assert Path(file).is_relative_to(tmp_path)
    assert {"dit", "sit", "uvit"} <= set(backbones)
    assert {"vanilla", "vae-align", "self-transcendence"} <= set(recipes)


@pytest.mark.parametrize("folder", ["backbones", "recipes"])
def test_the_folders_are_no_packages_of_their_own(folder: str) -> None:
    code = f"try:\n    import {folder}\nexcept ImportError as error:\n    print(error)"
    assert python(code).startswith(f"import stbench.{folder}, not {folder}")


def test_importing_the_package_is_light() -> None:
    assert loaded("import stbench") == set()


@pytest.mark.parametrize(
    "command", ["--help", "run --help", "compare --help", "list --help", "show --help", "data prepare --help"]
)
def test_help_is_light(command: str) -> None:
    assert loaded(COMMAND, *command.split()) == set()


def test_compare_is_light(tmp_path: Path) -> None:
    write_run(tmp_path, "vanilla", 0, (10.0, 3.0, 1.0))
    write_run(tmp_path, "vae-align", 0, (9.0, 2.0, 0.9))
    assert loaded(COMMAND, "compare", str(tmp_path)) == set()


def test_show_is_light(tmp_path: Path) -> None:
    record = write_run(tmp_path, "vanilla", 0, (10.0, 3.0, 1.0))
    assert loaded(COMMAND, "show", record.path) == set()
