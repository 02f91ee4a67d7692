"""Every option of every recipe, backbone and section at odd values: accepted, or refused in one line."""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Iterator
from typing import Any

import pytest

from stbench.config.overrides import DECIDED_BY_DATA
from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve, resolve_options
from stbench.config.spec import EvalSpec, TrainSpec
from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, RECIPES, load_builtins, lookup

pytestmark = pytest.mark.slow

load_builtins()
RECIPE_NAMES = (
    "delta-fm",
    "dispersive",
    "haste",
    "irepa",
    "layersync",
    "repa",
    "sara",
    "self-flow",
    "self-transcendence",
    "sra",
    "vae-align",
    "reg",
    "tread",
)
BACKBONE_NAMES = ("dit", "sit", "uvit")

BAD = (
    -1,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    -1e308,
    10**26,
    -(10**26),
    "",
    "x",
    [],
    [[]],
    {},
    {"a": 1},
    True,
)
"""No numeric option accepts these."""
ZERO = {
    "recipe.block", "recipe.student_block", "recipe.teacher_block", "recipe.align_block", "recipe.weight",
    "recipe.alpha", "recipe.coefficient", "recipe.guidance_stop", "recipe.structure", "recipe.stop",
    "recipe.t_max", "recipe.attention_weight",
    "train.weight_decay", "train.warmup", "train.ema_decay", "train.label_drop", "eval.seed",
    "backbone.label_rows", "recipe.class_weight", "recipe.class_scale",
}  # fmt: skip
"""Numeric options that may be 0."""
ZERO_WITHOUT_EFFECT = {("repa", "recipe.alpha"), ("self-flow", "recipe.t_max")}
"""Of these, those that the recipe's other defaults leave without effect, so that they are refused."""
NONE = {"recipe.class_scale", "recipe.stop", "train.clip", "eval.channels", "backbone.label_rows"}
"""Numeric options for which null means none; for an option with a computed default it means the default."""


def contains_number(annotation: Any) -> bool:
    if annotation in (int, float):
        return True
    return any(contains_number(part) for part in typing.get_args(annotation))


def scalar(annotation: Any) -> bool:
    """Whether the option is one number, rather than a list of them."""
    return (
        "list" not in str(annotation).lower()
        and "tuple" not in str(annotation).lower()
        and ("Sequence" not in str(annotation))
    )


def options_of(function: Any, section: str) -> Iterator[tuple[str, Any, bool]]:
    """(dotted name, annotation, whether null means the default) of the options of a signature."""
    from stbench.core.recipe import is_computed

    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if name != "info" and name not in DECIDED_BY_DATA:
            yield f"{section}.{name}", hints[name], is_computed(parameter.default)


def all_options() -> Iterator[tuple[str, str, str, Any, bool]]:
    """(backbone, recipe, dotted name, annotation, whether null means the default)."""
    for recipe in RECIPE_NAMES:
        for option in options_of(lookup(RECIPES, recipe), "recipe"):
            yield "sit", recipe, *option
    for backbone in BACKBONE_NAMES:
        for option in options_of(lookup(BACKBONES, backbone), "backbone"):
            yield backbone, "vanilla", *option
    for section, model in (("train", TrainSpec), ("eval", EvalSpec)):
        for name, annotation in typing.get_type_hints(model, include_extras=True).items():
            if name != "model_config":
                yield "sit", "vanilla", f"{section}.{name}", annotation, False


OPTIONS = list(all_options())
NUMBERS = [option for option in OPTIONS if contains_number(option[3]) and scalar(option[3])]
OTHERS = [option for option in OPTIONS if option not in NUMBERS]


def outcome(backbone: str, recipe: str, name: str, value: Any) -> str:
    """ "" if the value is accepted, else the message."""
    try:
        prepare(resolve(RunRequest(backbone, recipe, overrides={name: value})))
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 600, message
        assert "\x1b" not in message
        assert name.partition(".")[2] in message or value == "../.."
        return message
    return ""


def identifier(option: Any) -> str:
    return f"{option[0]}-{option[1]}-{option[2]}"


@pytest.mark.parametrize("option", NUMBERS, ids=identifier)
def test_a_number_out_of_range_is_refused(option: tuple[str, str, str, Any, bool]) -> None:
    backbone, recipe, name, _, computed = option
    for value in BAD:
        assert outcome(backbone, recipe, name, value), (name, value)
    zero = name in ZERO and (recipe, name) not in ZERO_WITHOUT_EFFECT
    assert (outcome(backbone, recipe, name, 0) == "") == zero, name
    assert (outcome(backbone, recipe, name, None) == "") == (computed or name in NONE), name


ANYTHING = (
    *BAD,
    0,
    1,
    0.5,
    None,
    False,
    ["x"],
    [1, 2, 3],
    [1],
    [0.5, 0.4],
    "all",
    "a" * 5000,
    "../..",
    "\x1b[31m",
)


@pytest.mark.parametrize("option", OTHERS, ids=identifier)
def test_any_value_of_another_option_is_accepted_or_refused_in_one_line(
    option: tuple[str, str, str, Any, bool],
) -> None:
    refused = sum(outcome(*option[:3], value) != "" for value in ANYTHING)
    assert refused >= len(ANYTHING) - 8, option[2]


def test_there_are_options_to_check() -> None:
    assert len(NUMBERS) >= 50 and len(OTHERS) >= 25
    assert {option[2] for option in NUMBERS} >= ZERO | NONE


REQUEST = (
    "backbone",
    "recipe",
    "dataset",
    "data",
    "objective",
    "precision",
    "steps",
    "seed",
    "eval_guidance",
)


@pytest.mark.parametrize("name", REQUEST)
def test_any_value_in_a_config_file_is_accepted_or_refused_in_one_line(name: str) -> None:
    given = {"backbone": "sit", "recipe": "vanilla"}
    accepted = []
    for value in (*ANYTHING, -5, 1 << 70, "nan", "1,nan", "inf", "1.0,0", [1.0, math.nan], "~", "~nouser/x"):
        try:
            resolve_options({**given, name: value}, {})
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
        else:
            accepted.append(value)
    allowed = {"steps": [1], "seed": [0, 1], "eval_guidance": [[], [1, 2, 3], [1]]}
    assert [value for value in accepted if value not in allowed.get(name, [])] == []
