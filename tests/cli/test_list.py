"""`stbench list recipes`: one line per recipe, and a page on one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import pytest

from stbench.cli.list import Kind, list_registry
from stbench.cli.recipe_cost import extra_cost, relative_cost
from stbench.cli.recipe_page import print_page, read_page
from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.ranges import Block, Guidance, NonNegativeReal
from stbench.core.recipe import NoSupervision, Stage
from stbench.core.registry import RECIPES, load_builtins, lookup, names

load_builtins()
BUILT_IN = sorted(
    name for name in names(RECIPES) if lookup(RECIPES, name).__module__.startswith("stbench.recipes")
)


def bracketed(
    info: BackboneInfo,
    *,
    pairs: list[list[int]] = [[1, 2]],  # noqa: B006
    block: Block = 2,
    weight: NonNegativeReal | None = None,
    scale: Guidance = 2.0,
    mode: Literal["a", "b"] = "a",
) -> Sequence[Stage]:
    """Uses [bold] and [[weak, strong], ...] in brackets (InfoNCE, say). A second sentence.

    A second paragraph with [/red].

    pairs: list of [weak, strong], such as
      [[1, 3]].
    block, weight: both of them.
    """
    return [Stage("bracketed", lambda earlier: NoSupervision())]


def test_recipes_have_one_line_each_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    list_registry(Kind.recipes)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for name in BUILT_IN:
        assert sum(line.startswith(f"{name} ") for line in lines) == 1
    assert len(lines) == 2 + len(names(RECIPES)) + 2
    costs = {line.split()[0]: line.split()[1] for line in lines[2:-2]}
    assert costs["vanilla"] == "0%" and int(costs["repa"].rstrip("%")) == 45


def test_a_recipe_that_cannot_be_counted_has_no_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(info: BackboneInfo) -> Sequence[Stage]:
        raise RuntimeError("not on the meta device")

    monkeypatch.setitem(RECIPES.module_dict, "broken", broken)
    assert (extra_cost("broken"), relative_cost("broken")) == ("-", "not counted")


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_built_in_recipe_has_a_complete_page(name: str) -> None:
    page = read_page(name, lookup(RECIPES, name))
    assert page.summary and "\n" not in page.summary
    assert name == "vanilla" or "repository" in page.source
    assert [option.name for option in page.options if not option.help] == []


def test_a_page_is_read_from_docstring_and_signature() -> None:
    page = read_page("bracketed", bracketed)
    assert page.summary == "Uses [bold] and [[weak, strong], ...] in brackets"
    assert page.text.endswith("A second paragraph with [/red].")
    options = {option.name: option for option in page.options}
    assert options["pairs"].help == "list of [weak, strong], such as [[1, 3]]."
    assert options["block"].help == options["weight"].help == "both of them."
    values = {name: option.values for name, option in options.items()}
    expected = {"pairs": "", "block": ">= 0", "weight": ">= 0 | none", "scale": ">= 1", "mode": "a | b"}
    assert values == expected


def test_a_recipe_without_a_docstring_has_a_page() -> None:
    def bare(info: BackboneInfo, *, x: int = 1) -> Sequence[Stage]:
        return []

    bare.__doc__ = None
    page = read_page("bare", bare)
    assert (page.summary, page.text) == ("", "") and page.options[0].values == "integer"


def test_square_brackets_are_printed_literally(capsys: pytest.CaptureFixture[str]) -> None:
    defaults = {"sit-ti/2": {"pairs": [(1, 2)], "weight": None, "scale": 2.0, "mode": "a"}}
    print_page(read_page("bracketed", bracketed), "1.00", defaults)
    printed = capsys.readouterr().out
    for expected in ("[bold]", "[[weak, strong], ...]", "[/red]", "[weak, strong]", "[[1, 2]]", "[[1, 3]]"):
        assert expected in printed
    assert max(map(len, printed.splitlines())) <= 100


def test_other_kinds_show_one_entry_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    list_registry(Kind.samplers, "euler", as_json=True)
    (row,) = json.loads(capsys.readouterr().out)
    assert row["sampler"] == "euler"
    with pytest.raises(UserError, match="nothing is named eulr; did you mean 'euler'"):
        list_registry(Kind.samplers, "eulr")


@pytest.mark.slow
def test_the_page_of_a_recipe_has_defaults_cost_and_published_values(
    capsys: pytest.CaptureFixture[str],
) -> None:
    list_registry(Kind.recipes, "layersync")
    printed = capsys.readouterr().out
    for expected in (
        "vita-epfl/LayerSync",
        "[[1, 2]]",
        "[[2, 6]]",
        "FLOPs   1.00",
        "not measured here",
        "8.75",
    ):
        assert expected in printed
