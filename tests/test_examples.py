"""The example plug-ins train from the command line and pass the conformance checks."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stbench.cli.app import app
from stbench.core.registry import (
    DATASETS,
    METRICS,
    OBJECTIVES,
    SAMPLERS,
    load_builtins,
    load_plugins,
)
from stbench.runs.folder import RunFolder
from stbench.testing import check_backbone, check_recipe
from tests.conftest import Command, share_statistics

EXAMPLES = Path(__file__).parents[1] / "examples"
BACKBONE, RECIPE = EXAMPLES / "my_backbone.py", EXAMPLES / "my_recipe.py"
KINDS = {
    "patch-colours": EXAMPLES / "image_recipe.py",
    "distil": EXAMPLES / "teacher_recipe.py",
    "relations": EXAMPLES / "encoder_recipe.py",
    "cross-time": EXAMPLES / "random_recipe.py",
    "early-exit": EXAMPLES / "head_recipe.py",
    "half-clean": EXAMPLES / "token_time_recipe.py",
    "sharpen": EXAMPLES / "attention_recipe.py",
    "checkerboard": EXAMPLES / "route_recipe.py",
}
"""Recipe -> its file: one for each thing that a supervision may need."""
PARTS = {
    "objective": ("linear-huber", "--objective=linear-huber", "--set=objective.c=0.01"),
    "sampler": ("euler-shift", "--set=eval.sampler=euler-shift"),
    "metric": ("energy", "--set=eval.metrics=energy"),
    "dataset": ("digits-pixels", "--dataset=digits-pixels", "--set=backbone.patch=8"),
}
"""Kind -> its name in examples/my_KIND.py, and the options of a run that uses it."""
SLOW = ("objective", "sampler")


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
    parts = {EXAMPLES / f"my_{kind}.py" for kind in PARTS}
    assert {BACKBONE, RECIPE, *KINDS.values(), *parts} == set(EXAMPLES.glob("*.py"))


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


# --- An objective, a sampler, a metric and a data set ---


def forget_parts() -> None:
    """Unregister the examples and forget their modules, as in a new process."""
    for registry in (OBJECTIVES, SAMPLERS, METRICS, DATASETS):
        for name in (entry[0] for entry in PARTS.values()):
            registered = registry.module_dict.pop(name, None)
            sys.modules.pop(getattr(registered, "__module__", ""), None)


@pytest.fixture()
def _forget() -> Iterator[None]:
    yield
    forget_parts()


def train_part(stbench: Command, output: Path, plugin: Path, kind: str, steps: int) -> str:
    """Train with the example until `steps`; returns the output."""
    small = [
        "train.batch=8",
        "eval.samples=20",
        "eval.steps=2",
        "eval.guidance=[1.0]",
        f"eval.points=[{steps}]",
    ]
    small += ["backbone.width=24", "backbone.depth=2", "backbone.heads=2"]
    options = [*PARTS[kind][1:], *(f"--set={pair}" for pair in small), "--device=cpu", f"--steps={steps}"]
    command = ["run", "--backbone", "sit", "--recipe", "vanilla", "--plugin", plugin, *options]
    code, out, err = stbench(*command, "--output", share_statistics(output))
    forget_parts()
    assert code == 0, err
    return out + err


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in PARTS]
)
def test_a_part_of_each_kind_trains_resumes_and_is_evaluated_again(
    stbench: Command, tmp_path: Path, kind: str
) -> None:
    plugin = Path(shutil.copy(EXAMPLES / f"my_{kind}.py", tmp_path))
    train_part(stbench, tmp_path / "runs", plugin, kind, steps=2)
    train_part(stbench, tmp_path / "runs", plugin, kind, steps=3)
    (run,) = tmp_path.glob("runs/*-vanilla-s0-*")
    before = RunFolder(run).record()
    assert [point.step for point in before.curve] == [2, 3]
    assert list(before.spec["plugins"]) == [str(plugin)]

    # Only a plug-in that the command names is executed.
    evaluate = ["evaluate", run, "--set", "eval.steps=3", "--device", "cpu"]
    code, _, err = stbench(*evaluate)
    name = PARTS[kind][0]
    assert code == 2 and err.count("\n") == 1, err
    assert f"uses the {kind} '{name}', which is not registered" in err and f"add --plugin {plugin}" in err
    code, out, err = stbench(*evaluate, "--plugin", plugin)
    assert code == 0 and "2 rows added" in out, err
    forget_parts()

    # What is not part of the run's hashes is part of the protocol.
    record = RunFolder(run).record()
    plugins = {"sampler": "sampler", "metric": "metric energy"}.get(kind)
    assert {tuple(p.get("plugins", ())) for p in record.protocols.values()} == {(plugins,) if plugins else ()}
    assert all(("energy" in point.metrics) is (kind == "metric") for point in record.curve)

    # Another content of the file is another run, or is refused.
    plugin.write_text(plugin.read_text() + "\n# changed\n")
    if kind in ("objective", "dataset"):
        train_part(stbench, tmp_path / "runs", plugin, kind, steps=2)
        assert len(list(tmp_path.glob("runs/*-vanilla-s0-*"))) == 2
    else:
        with pytest.raises(
            AssertionError, match="was started with another plug-in for .*choose another --output"
        ):
            train_part(stbench, tmp_path / "runs", plugin, kind, steps=4)


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize("kind", PARTS)
def test_an_example_that_is_not_loaded_is_unknown(stbench: Command, tmp_path: Path, kind: str) -> None:
    options = [*PARTS[kind][1:], "--output", tmp_path]
    code, _, err = stbench("run", "--backbone", "sit", "--recipe", "vanilla", *options)
    assert code == 2 and err.count("\n") == 1 and f"unknown {kind} '{PARTS[kind][0]}'" in err


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize("kind", PARTS)
def test_the_list_has_the_example(stbench: Command, kind: str) -> None:
    code, out, _ = stbench("list", f"{kind}s", "--json", "--plugin", EXAMPLES / f"my_{kind}.py")
    rows = {row[kind]: row for row in json.loads(out)}
    assert code == 0 and rows[PARTS[kind][0]]["help"]
    if kind == "objective":
        assert rows["linear-huber"]["options"] == "c=0.00054, shift=1.0"


@pytest.mark.usefixtures("_forget")
def test_the_sampler_is_listed_for_the_objectives_that_it_inverts(stbench: Command) -> None:
    out = stbench("list", "objectives", "--json", "--plugin", EXAMPLES / "my_sampler.py")[1]
    inverted = {row["objective"] for row in json.loads(out) if "euler-shift" in row["samplers"]}
    assert inverted == {row["objective"] for row in json.loads(out) if row["samplers"].startswith("euler")}
