"""What a user installs: a complete wheel, packages under one name, commands that answer without torch."""

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


def python(code: str, *arguments: str, cwd: Path = ROOT, path: Path | None = None, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it printed; `path` precedes what is installed."""
    variables = {**os.environ, **environment, **({"PYTHONPATH": str(path)} if path else {})}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def run_and_report(code: str, *arguments: str, **environment: str) -> tuple[str, set[str]]:
    """Run code in a fresh interpreter; returns what it printed and the heavy packages it has imported."""
    report = f"\nimport sys; print('LOADED', *[m for m in {HEAVY} if m in sys.modules])"
    printed, _, loaded = python(code + report, *arguments, **environment).rpartition("LOADED")
    return printed, set(loaded.split())


COMMAND = """
import sys
from stbench.cli.app import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""

EVERY_HELP = f"""
import sys
import typer
from stbench.cli.app import app, main

def walk(group, words=()):
    yield words
    for name, command in getattr(group, "commands", {{}}).items():
        yield from walk(command, (*words, name))

for words in list(walk(typer.main.get_command(app))):
    sys.argv = ["stbench", *words, "--help"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, words
    loaded = [m for m in {HEAVY} if m in sys.modules]
    assert not loaded, (words, loaded)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without a network from a copy of what git tracks."""
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


def test_the_wheel_contains_every_file(wheel: Path) -> None:
    contents = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in FOLDERS.items():
        suffixes = (".py", ".json", ".safetensors", ".yaml", ".html", ".css", ".js", ".txt")
        for file in (f for f in (ROOT / folder).rglob("*") if f.suffix in suffixes):
            inside = file.relative_to(ROOT / folder).as_posix()
            if folder != "stbench" or not inside.startswith(("backbones/", "recipes/")):
                assert f"{package.replace('.', '/')}/{inside}" in contents


def test_the_wheel_contains_nothing_else(wheel: Path) -> None:
    contents = [n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n]
    page = [name for name in contents if name.startswith("stbench/report/assets/")]
    others = {Path(name).suffix for name in contents if name not in page}
    assert others - {".yaml"} == {".py", ".json", ".safetensors"}
    assert all(name.startswith("stbench/recipes/suites/") for name in contents if name.endswith(".yaml"))
    assert all(name.startswith("stbench/") for name in contents)


def test_the_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
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
def test_a_top_level_folder_cannot_be_imported_under_its_own_name(folder: str) -> None:
    code = f"try:\n    import {folder}\nexcept ImportError as error:\n    print(error)"
    assert python(code).startswith(f"import stbench.{folder} instead of {folder}")


def test_importing_the_package_is_light() -> None:
    assert run_and_report("import stbench")[1] == set()


def test_help_is_light() -> None:
    printed = python(EVERY_HELP)
    for command in ("", " run", " sample", " evaluate", " sweep", " export", " data prepare"):
        assert f"Usage: stbench{command} [OPTIONS]" in printed


def test_completion_is_light() -> None:
    words = {
        "_STBENCH_COMPLETE": "complete_bash",
        "COMP_WORDS": "stbench run --backbone s",
        "COMP_CWORD": "3",
    }
    printed, loaded = run_and_report(COMMAND, **words)
    assert printed.split() == ["sit"] and loaded == set()


def test_compare_is_light(tmp_path: Path) -> None:
    write_run(tmp_path, "vanilla", 0, (10.0, 3.0, 1.0))
    write_run(tmp_path, "vae-align", 0, (9.0, 2.0, 0.9))
    assert run_and_report(COMMAND, "compare", str(tmp_path))[1] == set()


def test_report_is_light(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "vanilla", 0, (10.0, 3.0, 1.0))
    output = tmp_path / "report.html"
    loaded = run_and_report(COMMAND, "report", str(tmp_path / "runs"), "--output", str(output))[1]
    assert loaded == set() and output.exists()


def test_show_is_light(tmp_path: Path) -> None:
    record = write_run(tmp_path, "vanilla", 0, (10.0, 3.0, 1.0))
    assert run_and_report(COMMAND, "show", record.path)[1] == set()
