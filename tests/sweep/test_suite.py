"""The runs of a sweep: suite files, grids of names, and one-line errors that name their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stbench.core.errors import UserError
from stbench.sweep.suite import SHIPPED_SUITES, SweepRun, find_suite, grid, prepare_runs, read_suite
from tests.conftest import BLOCKS, TINY, Command, Runner


def write_suite(folder: Path, text: str) -> Path:
    """A suite file with this text."""
    file = folder / "suite.yaml"
    file.write_text(text)
    return file


def prepare_grid(
    recipes: list[str], seeds: list[int], overrides: dict[str, Any], steps: int = 20
) -> list[SweepRun]:
    """Prepare runs of SiT under these recipes."""
    return prepare_runs(
        grid(backbones=["sit"], recipes=recipes, seeds=seeds, values={"steps": steps}, overrides=overrides)
    )


SUITE = """
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


def test_a_run_overrides_its_group_which_overrides_the_defaults(tmp_path: Path) -> None:
    first, second, third, fourth = read_suite(write_suite(tmp_path, SUITE))
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


def test_every_run_gets_a_journal_entry_and_its_stages(tmp_path: Path) -> None:
    first, _, third, _ = prepare_runs(read_suite(write_suite(tmp_path, SUITE)))
    assert first.entry.run_id.startswith("digits-dit-ti-2-vanilla-s0-") and first.entry.steps == 800
    assert third.entry.label == "self-transcendence (guidance=1.0)" and third.entry.objective == "iddpm"
    assert len(first.stages) == 1 and len(third.stages) == 2


def test_runs_share_a_stage_if_its_seed_and_teacher_are_the_same() -> None:
    recipes = ["self-transcendence", "vae-align"]
    taught, other_seed, teacher, _ = (run.stages for run in prepare_grid(recipes, [0, 1], {}))
    assert taught[0] == teacher[0] and taught[0] != other_seed[0] and taught[1] != teacher[0]
    (weaker,) = prepare_grid(recipes[:1], [0], {"recipe.guidance": 3})
    assert weaker.stages[0] == taught[0] and weaker.stages[1] != taught[1]


def test_a_sweep_and_a_run_agree_on_run_id_stages_and_hashes(tiny: Runner) -> None:
    record = tiny("self-transcendence")
    (run,) = prepare_grid([record.recipe], [0], TINY | BLOCKS, steps=record.steps)
    assert run.entry.run_id == record.run_id
    assert list(run.stages) == [stage.fingerprint for stage in record.stages]
    assert run.entry.setting_hash == record.setting_hash and run.entry.options == record.options
    assert run.entry.row_hash == record.spec["row_hash"] and run.entry.backbone == record.backbone


def test_a_bare_name_is_a_shipped_suite(tmp_path: Path) -> None:
    shipped = tmp_path / "quick.yaml"
    shipped.write_text(SUITE)
    assert find_suite("quick", tmp_path) == shipped
    assert find_suite("mine/quick.yaml", tmp_path) == Path("mine/quick.yaml")
    with pytest.raises(UserError, match="unknown suite 'quik': expected .*; did you mean 'quick'"):
        find_suite("quik", tmp_path)


def test_the_smallest_shipped_suite_resolves() -> None:
    assert len(prepare_runs(read_suite(find_suite("digits-learning-rate")))) == 32


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(SHIPPED_SUITES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_shipped_suite_resolves(file: Path) -> None:
    assert prepare_runs(read_suite(file))


RUN = "{recipe: vanilla, backbone: sit}"
MISTAKES = {
    "key": (
        "default: {}\ngroups: [{runs: [" + RUN + "]}]",
        "unknown key 'default'; did you mean 'defaults'?",
    ),
    "group key": ("groups: [{wiht: {}, runs: [" + RUN + "]}]", "group 1: unknown key 'wiht'"),
    "option": (
        "groups: [{runs: [" + RUN + ", {recipe: vanilla, stepz: 3}]}]",
        "group 1, run 2: unknown option 'stepz'; did you mean 'steps'?",
    ),
    "no groups": ("defaults: {steps: 3}", "groups must be a non-empty list, got None"),
    "no runs": ("groups: [{with: {steps: 3}}]", "group 1: runs must be a non-empty list, got None"),
    "empty": ("groups: []", "groups must be a non-empty list, got []"),
    "group": ("groups: [sit]", "group 1: expected 'with' and 'runs', got 'sit'"),
    "run": ("groups: [{runs: [vanilla]}]", "group 1, run 1: expected options, got 'vanilla'"),
    "set": ("groups: [{with: {set: 5}, runs: [" + RUN + "]}]", "group 1, with: 'set' must"),
    "seeds": ("defaults: {seeds: 3}\ngroups: [{runs: [" + RUN + "]}]", "seeds must be a list of integers"),
    "two": (
        "groups: [{runs: [{recipe: vanilla, seed: 1, seeds: [2]}]}]",
        "found both seed and seeds",
    ),
    "value": (
        "groups: [{runs: [" + RUN + ", {recipe: vanilla, backbone: sit, set: {train.lr: -1}}]}]",
        "group 1, run 2: invalid value for 'train.lr'",
    ),
    "recipe": ("groups: [{runs: [{recipe: vanila, backbone: sit}]}]", "did you mean 'vanilla'?"),
    "no backbone": ("groups: [{runs: [{recipe: vanilla}]}]", "group 1, run 1: --backbone is missing"),
    "twice": (
        "groups: [{runs: [" + RUN + "]}, {runs: [{recipe: vanilla, backbone: sit-ti/2, steps: 9}]}]",
        "group 1, run 1; ",
    ),
    "no list": ("- sit", "cannot read suite file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_suite_names_its_place(tmp_path: Path, name: str) -> None:
    text, message = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        prepare_runs(read_suite(write_suite(tmp_path, text)))
    assert message in str(caught.value) and "suite.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_leaves_out_what_a_recipe_refuses(stbench: Command, tmp_path: Path) -> None:
    sweep = ("sweep", "--dry-run", "--output", tmp_path, "--backbone")
    code, out, _ = stbench(*sweep, "uvit", "--recipe", "all")
    assert code == 0
    assert "skipped: recipe 'delta-fm' contrasts velocities" in out
    assert "skipped: recipe 'self-flow' needs a backbone with the capability 'token-time'" in out
    assert "uvit-ti-2-sra-" in out and "uvit-ti-2-self-flow" not in out
    code, _, error = stbench(*sweep, "uvit", "--recipe", "vanilla,delta-fm")
    assert code == 2 and "recipe 'delta-fm' contrasts velocities" in error
