"""Which runs a sweep is asked for: suite files, lists of names, and one line for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from stbench.core.errors import UserError
from stbench.sweep import suite
from tests.conftest import BLOCKS, TINY, Runner


def write(file: Path, text: str) -> Path:
    """A file with this text."""
    file.write_text(text)
    return file


WHOLE = """
defaults:
  {dataset: digits, steps: 400, seeds: [0, 1], precision: fp32, set: {eval.points: [200], train.lr: 1.0e-3}}
groups:
  - with: {backbone: dit, objective: iddpm, set: {train.lr: 4.0e-3, eval: {sampler: ddim}}}
    runs:
      - {recipe: vanilla, steps: 800, set: {eval.points: [200, 800]}}
      - {recipe: self-transcendence, seeds: [7], set: {recipe.guidance: 1}}
  - runs:
      - {recipe: vanilla, backbone: sit, seed: 3}
"""


def test_a_run_is_defaults_then_its_group_then_itself(tmp_path: Path) -> None:
    first, second, third, fourth = suite.read_suite(write(tmp_path / "suite.yaml", WHOLE))
    assert first.values == {
        "dataset": "digits",
        "steps": 800,
        "precision": "fp32",
        "backbone": "dit",
        "objective": "iddpm",
        "recipe": "vanilla",
        "seed": 0,
    }
    assert first.overrides == {"eval.points": [200, 800], "train.lr": 4e-3, "eval.sampler": "ddim"}
    assert second.values == {**first.values, "seed": 1}
    assert third.values["seed"] == 7 and third.values["steps"] == 400
    assert third.overrides == {**first.overrides, "eval.points": [200], "recipe.guidance": 1}
    assert fourth.values["seed"] == 3 and fourth.overrides == {"eval.points": [200], "train.lr": 1e-3}


def test_every_run_is_resolved_as_run_resolves_it(tmp_path: Path) -> None:
    first, _, third, _ = suite.expand(suite.read_suite(write(tmp_path / "suite.yaml", WHOLE)))
    assert first.entry.run_id.startswith("digits-dit-ti-2-vanilla-s0-") and first.entry.steps == 800
    assert third.entry.label == "self-transcendence (guidance=1.0)" and third.entry.objective == "iddpm"
    assert len(first.stages) == 1 and len(third.stages) == 2


def test_seeds_and_teachers_decide_what_is_shared() -> None:
    recipes = ["self-transcendence", "vae-align"]
    runs = suite.expand(suite.grid(["sit"], recipes, [0, 1], {"steps": 20}, {}))
    taught, other, teacher, _ = (run.stages for run in runs)
    assert taught[0] == teacher[0] and taught[0] != other[0] and taught[1] != teacher[0]
    options = {"recipe.guidance": 3}
    (weaker,) = suite.expand(suite.grid(["sit"], recipes[:1], [0], {"steps": 20}, options))
    assert weaker.stages[0] == taught[0] and weaker.stages[1] != taught[1]


def test_the_stages_are_named_as_training_names_them(tiny: Runner) -> None:
    record = tiny("self-transcendence")
    overrides = TINY | BLOCKS
    (run,) = suite.expand(suite.grid(["sit"], [record.recipe], [0], {"steps": record.steps}, overrides))
    assert run.entry.run_id == record.run_id
    assert list(run.stages) == [stage.fingerprint for stage in record.stages]
    assert run.entry.setting_hash == record.setting_hash and run.entry.options == record.options
    assert run.entry.row_hash == record.spec["row_hash"] and run.entry.backbone == record.backbone


def test_a_bare_name_is_a_shipped_suite(tmp_path: Path) -> None:
    shipped = write(tmp_path / "quick.yaml", WHOLE)
    assert suite.find_suite("quick", tmp_path) == shipped
    assert suite.find_suite("mine/quick.yaml", tmp_path) == Path("mine/quick.yaml")
    with pytest.raises(UserError, match="unknown suite 'quik': expected .*; did you mean 'quick'"):
        suite.find_suite("quik", tmp_path)


def test_the_shipped_suites_resolve() -> None:
    for file in suite.SHIPPED.glob("*.yaml"):
        assert suite.expand(suite.read_suite(file))


RUN = "{recipe: vanilla, backbone: sit}"
WRONG = {
    "key": (
        "default: {}\ngroups: [{runs: [" + RUN + "]}]",
        "unknown key 'default'; did you mean 'defaults'?",
    ),
    "group key": ("groups: [{wiht: {}, runs: [" + RUN + "]}]", "group 1: unknown key 'wiht'"),
    "option": (
        "groups: [{runs: [" + RUN + ", {recipe: vanilla, stepz: 3}]}]",
        "group 1, run 2: unknown option 'stepz'; did you mean 'steps'?",
    ),
    "no groups": ("defaults: {steps: 3}", "expected a list of groups, got None"),
    "no runs": ("groups: [{with: {steps: 3}}]", "group 1: expected a list of runs, got None"),
    "empty": ("groups: []", "expected a list of groups, got []"),
    "group": ("groups: [sit]", "group 1: expected 'with' and 'runs', got 'sit'"),
    "run": ("groups: [{runs: [vanilla]}]", "group 1, run 1: expected options, got 'vanilla'"),
    "set": ("groups: [{with: {set: 5}, runs: [" + RUN + "]}]", "group 1, with: 'set' wants options"),
    "seeds": ("defaults: {seeds: 3}\ngroups: [{runs: [" + RUN + "]}]", "seeds wants a list of whole numbers"),
    "two": (
        "groups: [{runs: [{recipe: vanilla, seed: 1, seeds: [2]}]}]",
        "expected seed or seeds, found both",
    ),
    "value": (
        "groups: [{runs: [" + RUN + ", {recipe: vanilla, backbone: sit, set: {train.lr: -1}}]}]",
        "group 1, run 2: invalid value for 'train.lr'",
    ),
    "recipe": ("groups: [{runs: [{recipe: vanila, backbone: sit}]}]", "did you mean 'vanilla'?"),
    "no backbone": ("groups: [{runs: [{recipe: vanilla}]}]", "group 1, run 1: expected --backbone"),
    "twice": (
        "groups: [{runs: [" + RUN + "]}, {runs: [{recipe: vanilla, backbone: sit-ti/2, steps: 9}]}]",
        "group 1, run 1; ",
    ),
    "no list": ("- sit", "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_in_a_suite_names_its_place(tmp_path: Path, name: str) -> None:
    text, message = WRONG[name]
    with pytest.raises(UserError) as caught:
        suite.expand(suite.read_suite(write(tmp_path / "suite.yaml", text)))
    assert message in str(caught.value) and "suite.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
