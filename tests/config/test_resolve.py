"""From a request to a prepared run: effective values, hashes and labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from stbench.config.hashes import setting_fields
from stbench.config.overrides import split_sections
from stbench.config.plan import PreparedRun, prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.recipe import NoSupervision, Stage, computed, effective_options
from stbench.core.registry import BACKBONES, RECIPES, load_builtins, lookup, names
from stbench.sweep.suite import SuiteRun, prepare_runs

load_builtins()


def prepared(recipe: str, backbone: str = "sit", steps: int = 40, **overrides: Any) -> PreparedRun:
    options = {name.replace("__", "."): value for name, value in overrides.items()}
    return prepare(resolve(RunRequest(backbone, recipe, steps=steps, overrides=options)))


@pytest.mark.parametrize("recipe", names(RECIPES))
def test_every_recipe_option_has_an_effective_value(recipe: str) -> None:
    """Only options whose None means "none" may be None, never a default that is decided later."""
    effective = prepared(recipe).spec.recipe.effective
    none = {name for name, value in effective.items() if value is None}
    assert none <= {"checkpoint", "class_scale", "encoder", "hidden", "kernel", "alpha", "stop"}
    assert prepared(recipe).spec.recipe.options == {}


@pytest.mark.parametrize("backbone", names(BACKBONES))
def test_the_backbone_is_stored_with_all_its_options(backbone: str) -> None:
    spec = prepared("vanilla", backbone).spec.backbone
    preset = lookup(BACKBONES, backbone).presets["ti/2"]
    assert spec.effective.keys() >= preset.keys() - {"objective"} and "time_scale" in spec.effective
    assert spec.options == {}
    changed = prepared("vanilla", backbone, backbone__heads=1).spec.backbone
    assert changed.options == {"heads": 1} and changed.effective["heads"] == 1


@pytest.mark.parametrize(
    ("recipe", "option", "value"),
    [
        ("self-transcendence", "guidance", 10),
        ("self-transcendence", "teacher_steps", 40),
        ("sra", "weight", 0.2),
    ],
)
def test_an_option_that_is_set_to_its_default_is_the_same_row(recipe: str, option: str, value: float) -> None:
    plain, explicit = prepared(recipe), prepared(recipe, **{f"recipe__{option}": value})
    assert explicit.hashes == plain.hashes and explicit.run_id == plain.run_id
    assert explicit.spec.recipe == plain.spec.recipe
    assert [s.fingerprint for s in explicit.stages] == [s.fingerprint for s in plain.stages]


def test_null_is_the_default_of_a_computed_option() -> None:
    assert prepared("sra", recipe__weight=None).spec == prepared("sra").spec
    with pytest.raises(UserError, match=r"invalid value for 'recipe\.t_max'"):
        prepared("sra", recipe__t_max=None)


def test_a_default_may_depend_on_another_option() -> None:
    """SRA's weight is 0.2, but 0.5 for a cosine; only the option that was set labels the row."""
    spec = prepared("sra", recipe__distance="cosine").spec.recipe
    assert spec.options == {"distance": "cosine"} and spec.effective["weight"] == 0.5
    both = prepared("sra", recipe__distance="cosine", recipe__weight=0.5).spec.recipe
    assert both == spec
    other = prepared("sra", recipe__distance="cosine", recipe__weight=0.2).spec.recipe
    assert other.options == {"distance": "cosine", "weight": 0.2}


def test_the_hash_of_a_backbone_covers_its_effective_options() -> None:
    plain = prepared("vanilla")
    assert prepared("vanilla", backbone__heads=3).hashes == plain.hashes  # as in the preset
    assert prepared("vanilla", backbone__heads=1).hashes.setting != plain.hashes.setting


@pytest.fixture()
def counted() -> Iterator[list[dict[str, Any]]]:
    """A recipe that records its calls."""
    calls: list[dict[str, Any]] = []

    def recipe(info: BackboneInfo, *, block: int = computed(lambda c: c.info.depth - 1)) -> Sequence[Stage]:
        calls.append({"block": block})
        return [Stage("counted", lambda earlier: NoSupervision())]

    RECIPES.register_module(name="counted", module=recipe)
    yield calls
    del RECIPES.module_dict["counted"]


def test_the_recipe_function_is_called_once_per_run(counted: list[dict[str, Any]]) -> None:
    run = prepared("counted")
    assert counted == [{"block": 5}] and run.spec.recipe.effective == {"block": 5}


def test_a_recipe_may_call_an_option_steps() -> None:
    def recipe(
        info: BackboneInfo, *, steps: int = 3, block: int = computed(lambda c: c.steps)
    ) -> Sequence[Stage]:
        return []

    info = prepared("vanilla").info
    assert effective_options(recipe, info, {"steps": 5}, steps=40) == {"steps": 5, "block": 40}


def test_an_earlier_stage_is_relative_to_steps_or_absolute() -> None:
    assert [stage.steps for stage in prepared("self-transcendence").stages] == [40, 40]
    fixed = prepared("self-transcendence", recipe__teacher_steps=7)
    assert [stage.steps for stage in fixed.stages] == [7, 40]
    longer = prepared("self-transcendence", steps=80, recipe__teacher_steps=7)
    assert longer.run_id == fixed.run_id  # it continues the shorter run


@pytest.mark.parametrize(
    ("options", "name", "size"),
    [
        ({}, "sit-ti/2", "ti-2"),
        ({"depth": 6}, "sit-ti/2", "ti-2"),  # the preset's own depth
        ({"qk_norm": True}, "sit-ti/2", "ti-2"),  # the size does not stand for it
        ({"depth": 3}, "sit-custom (depth 3, width 96, heads 3, patch 2)", "custom"),
        ({"patch": 4, "qk_norm": True}, "sit-custom (depth 6, width 96, heads 3, patch 4)", "custom"),
        ({"width": 48}, "sit-custom (depth 6, width 48, heads 3, patch 2)", "custom"),
        ({"heads": 1}, "sit-custom (depth 6, width 96, heads 1, patch 2)", "custom"),
    ],
)
def test_a_network_of_another_shape_is_not_called_by_the_name_of_a_size(
    options: dict[str, Any], name: str, size: str
) -> None:
    overrides = {f"backbone.{option}": value for option, value in options.items()}
    (run,) = prepare_runs([SuiteRun("", {"backbone": "sit-ti/2", "recipe": "repa"}, overrides)])
    assert run.entry.backbone == name
    assert run.prepared.run_id.startswith(f"digits-sit-{size}-repa-s0-")
    assert run.prepared.info.size == size.replace("-", "/")
    # The defaults of the recipe are still those of the preset that the options start from.
    assert run.prepared.spec.recipe.effective["encoder"] == "digits"


# --- Options of the objective ---


def test_options_of_the_objective_that_are_its_defaults_change_no_hash() -> None:
    plain, same = prepared("vanilla"), prepared("vanilla", objective__shift=1.0)
    assert "objective_options" not in setting_fields(plain.spec, "")
    assert same.hashes == plain.hashes and same.spec.objective_options == {}


def test_other_options_of_the_objective_are_another_setting() -> None:
    plain, shifted = prepared("vanilla"), prepared("vanilla", objective__shift=3)
    assert shifted.spec.objective_options == {"shift": 3.0}
    assert shifted.hashes.setting != plain.hashes.setting
    assert shifted.stages[0].fingerprint != plain.stages[0].fingerprint
    (run,) = prepare_runs([SuiteRun("", {"backbone": "sit", "recipe": "vanilla"}, {"objective.shift": 3})])
    assert run.entry.objective == "linear (shift=3.0)"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("objective__shfit", 2.0, "unknown option 'objective.shfit'; did you mean 'objective.shift'"),
        ("objective__shift", 0.0, "invalid value for 'objective.shift': .* greater than 0"),
        ("objective__shift", True, "invalid value for 'objective.shift': input should be a number"),
        ("objective__location", 0.5, "unknown option 'objective.location'"),
    ],
)
def test_bad_options_of_the_objective_are_refused(option: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepared("vanilla", **{option: value})


def test_a_second_dot_names_an_entry_of_an_option() -> None:
    found = split_sections({"recipe.on_options.weight": 0.1, "recipe.on_options.block": 2, "train.lr": 1e-3})
    assert found["recipe"] == {"on_options": {"weight": 0.1, "block": 2}}
    with pytest.raises(UserError, match=r"option 'train\.lr' is given twice, as 0\.001 and by entries"):
        split_sections({"train.lr": 1e-3, "train.lr.x": 1})
    with pytest.raises(UserError, match=r"invalid value for 'train\.lr'"):
        prepared("vanilla", train__lr__x=1)
