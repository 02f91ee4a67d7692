"""The example plug-ins train from the command line and pass the conformance checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stbench.cli.app import app
from stbench.core.registry import load_builtins, load_plugins
from stbench.testing import check_backbone, check_recipe

EXAMPLES = Path(__file__).parents[1] / "examples"
BACKBONE, RECIPE = EXAMPLES / "my_backbone.py", EXAMPLES / "my_recipe.py"
KINDS = {
    "patch-colours": EXAMPLES / "image_recipe.py",
    "distil": EXAMPLES / "teacher_recipe.py",
    "relations": EXAMPLES / "encoder_recipe.py",
    "cross-time": EXAMPLES / "random_recipe.py",
}
"""Recipe -> its file: one for each thing that a supervision may need."""


@pytest.fixture(scope="module")
def _plugins() -> None:
    load_builtins()
    load_plugins([BACKBONE, RECIPE, *KINDS.values()])


def test_both_are_trained_from_the_command_line(tmp_path: Path) -> None:
    small = ["train.batch=8", "eval.samples=20", "eval.steps=2", "eval.guidance=[1.0]"]
    command = ["run", "--backbone", "mixer", "--recipe", "ema-pull", "--steps", "3", "--device", "cpu"]
    command += ["--plugin", str(BACKBONE), "--plugin", str(RECIPE), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, *(f"--set={pair}" for pair in small)])
    assert result.exit_code == 0, result.output
    (folder,) = tmp_path.glob("digits-mixer-ti-2-ema-pull-s0-*")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
    assert set(json.loads((folder / "spec.json").read_text())["plugins"]) == {str(BACKBONE), str(RECIPE)}


@pytest.mark.usefixtures("_plugins")
def test_the_backbone_conforms() -> None:
    check_backbone("mixer")


@pytest.mark.usefixtures("_plugins")
def test_the_recipe_conforms_on_the_backbone() -> None:
    check_recipe("ema-pull", backbone="mixer")


def test_every_example_is_tested() -> None:
    assert {BACKBONE, RECIPE, *KINDS.values()} == set(EXAMPLES.glob("*.py"))


@pytest.mark.usefixtures("_plugins")
@pytest.mark.parametrize("recipe", KINDS)
def test_a_recipe_of_each_kind_conforms(recipe: str) -> None:
    check_recipe(recipe)


@pytest.mark.parametrize("recipe", KINDS)
def test_a_recipe_of_each_kind_is_trained_from_the_command_line(tmp_path: Path, recipe: str) -> None:
    small = ["train.batch=8", "eval.samples=20", "eval.steps=2", "eval.guidance=[1.0]"]
    command = ["run", "--backbone", "sit", "--recipe", recipe, "--steps", "2", "--device", "cpu"]
    command += ["--plugin", str(KINDS[recipe]), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, [*command, *(f"--set={pair}" for pair in small)])
    assert result.exit_code == 0, result.output
    (folder,) = tmp_path.glob(f"digits-sit-ti-2-{recipe}-s0-*")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"
