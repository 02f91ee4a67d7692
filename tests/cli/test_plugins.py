"""Plug-ins with mistakes: one line that names the file, and exit code 2."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from stbench.core.registry import BACKBONES, DATASETS, METRICS, OBJECTIVES, RECIPES, SAMPLERS
from tests.cli.test_cli import tiny_options
from tests.conftest import Command

HEAD = """
from dataclasses import dataclass
import torch
from stbench.core.backbone import Backbone
from stbench.core.recipe import Stage, Supervision, Term, computed
from stbench.core.registry import BACKBONES, DATASETS, METRICS, OBJECTIVES, RECIPES, SAMPLERS
"""
SUPERVISION = """
@dataclass
class Odd(Supervision):
    def terms(self, step):
        {terms}
    def setup(self, device):
        {setup}
@RECIPES.register_module(name="odd")
def odd(info):
    return [Stage("odd", lambda earlier: Odd())]
"""
WRONG_OBJECTS = {
    "function as backbone": (
        "@BACKBONES.register_module(name='odd')\ndef f(): pass",
        "a subclass of Backbone",
    ),
    "other class as backbone": (
        "@BACKBONES.register_module(name='odd')\nclass F: pass",
        "a subclass of Backbone",
    ),
    "backbone without presets": (
        "@BACKBONES.register_module(name='odd')\nclass F(Backbone):\n presets = 5",
        "with a mapping `presets`",
    ),
    "class as recipe": (
        "@RECIPES.register_module(name='odd')\nclass F(Supervision): pass",
        "recipe 'odd' must be a function that returns stages",
    ),
    "number as recipe": (
        "RECIPES.register_module(name='odd', module=5)",
        "failed to import: TypeError: module must be",
    ),
    "function as objective": (
        "@OBJECTIVES.register_module(name='odd')\ndef f(): pass",
        "subclass of Objective",
    ),
    "function as data set": ("@DATASETS.register_module(name='odd')\ndef f(): pass", "data.dataset.Dataset"),
    "function as sampler": (
        "@SAMPLERS.register_module(name='odd')\ndef f(): pass",
        "diffusion.sampler.Sampler",
    ),
    "class as metric": (
        "@METRICS.register_module(name='odd')\nclass F: pass",
        "a function of stbench.evaluate",
    ),
    "exit": ("raise SystemExit(0)", "failed to import: SystemExit: 0"),
    "taken name": (
        "@RECIPES.register_module(name='vanilla')\ndef f(info): pass",
        "vanilla is already registered",
    ),
}
WRONG_RECIPES = {
    "no stages": ("def odd(info): return 5", "recipe 'odd' failed: TypeError"),
    "no function of info": ("def odd(): return []", "recipe 'odd'"),
    "option without default": ("def odd(info, *, block): return []", "option 'recipe.block' has no default"),
    "annotation that is not a type": (
        "def odd(info, *, block: 'Nothing' = 1): return []",
        "fix its signature",
    ),
    "unknown options": ("def odd(info, **options): return []", "at least one Stage"),
    "default that raises": (
        "def odd(info, *, block=computed(lambda c: 1 / 0)): return []",
        "8 failed: ZeroD",
    ),
    "default out of range": (
        "def odd(info, *, block: int = computed(lambda c: 'x')): return []",
        "'recipe.block'",
    ),
    "supervision that raises": (
        "def odd(info): return [Stage('odd', lambda earlier: 1 / 0)]",
        "8 failed: ZeroD",
    ),
    "supervision of another class": ("def odd(info): return [Stage('odd', lambda earlier: 5)]", "must be a"),
    "exit": ("def odd(info): raise SystemExit(0)", "failed: SystemExit: 0"),
}
WRONG_TERMS = {
    "raises": ("return 1 / 0", "pass", "failed: ZeroDivisionError: division by zero"),
    "exits": ("raise SystemExit(0)", "pass", "failed: SystemExit: 0"),
    "returns nothing": ("return None", "pass", "Odd.terms must return a mapping"),
    "returns numbers": ("return {'odd': 5}", "pass", "Odd.terms must return a mapping"),
    "setup raises": ("return {}", "return 1 / 0", "failed: ZeroDivisionError: division by zero"),
}


@pytest.fixture(autouse=True)
def _unregister() -> Iterator[None]:
    yield
    for registry in (BACKBONES, DATASETS, METRICS, OBJECTIVES, RECIPES, SAMPLERS):
        registry.module_dict.pop("odd", None)


def failure(stbench: Command, folder: Path, code: str, *options: str) -> str:
    plugin = folder / "odd.py"
    plugin.write_text(HEAD + code)
    exit_code, out, err = stbench(*options, "--plugin", plugin, "--output", folder / "runs")
    last = err.splitlines()[-1]
    assert exit_code == 2 and last.startswith("error: ") and "Traceback" not in out + err, err
    return last


@pytest.mark.parametrize("name", WRONG_OBJECTS)
def test_an_object_of_another_kind_is_refused(stbench: Command, tmp_path: Path, name: str) -> None:
    code, message = WRONG_OBJECTS[name]
    assert message in failure(stbench, tmp_path, code, *tiny_options())


@pytest.mark.parametrize("name", WRONG_RECIPES)
def test_a_recipe_with_a_mistake_is_named(stbench: Command, tmp_path: Path, name: str) -> None:
    code, message = WRONG_RECIPES[name]
    line = failure(stbench, tmp_path, f'@RECIPES.register_module(name="odd")\n{code}', *tiny_options("odd"))
    assert message in line and not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", WRONG_TERMS)
def test_a_mistake_in_a_supervision_names_the_plugin(stbench: Command, tmp_path: Path, name: str) -> None:
    terms, setup, message = WRONG_TERMS[name]
    line = failure(stbench, tmp_path, SUPERVISION.format(terms=terms, setup=setup), *tiny_options("odd"))
    assert message in line
    if "failed" in message:
        assert "odd.py line " in line and "details in" in line
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


WRONG_METRICS = {
    "raises": ("odd", "1 / 0", "metric 'odd' failed: ZeroDivisionError"),
    "returns no number": ("odd", "None", "metric 'odd' failed: TypeError"),
    "has the name of a built-in one": ("fid", "0.0", "metric 'fid' exists already"),
    "has the name of a ratio": ("fdr6", "0.0", "metric 'fdr6' exists already"),
}


@pytest.mark.parametrize("name", WRONG_METRICS)
def test_a_wrong_metric_is_refused_before_training(stbench: Command, tmp_path: Path, name: str) -> None:
    metric, value, message = WRONG_METRICS[name]
    code = f"@METRICS.register_module(name='{metric}')\ndef f(samples): return {value}"
    try:
        line = failure(stbench, tmp_path, code, *tiny_options(), f"--set=eval.metrics={metric}")
    finally:
        METRICS.module_dict.pop("fid", None)
    assert message in line
    assert not list(tmp_path.glob("runs/*/curve.jsonl"))
