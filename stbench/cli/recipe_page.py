"""What `stbench list recipes` prints: a line per recipe, or a page on one of them."""

from __future__ import annotations

import inspect
import json
import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SMALL, PUBLISHED = "sit-ti/2", "sit-b/2"
"""Backbones for which a page shows the defaults: that of the digits, and one that papers report."""
PUBLISHED_STEPS = 400_000
COMPARISONS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
LARGE = 1000
"""Upper bounds from here on are not shown."""
NOT_FOUND = "-"


@dataclass(frozen=True)
class Option:
    """An option of a recipe."""

    name: str
    default: Any
    """As in the signature; see `core.recipe.computed`."""
    values: str
    """Choices or range."""
    help: str


@dataclass(frozen=True)
class Page:
    """The documentation of a recipe, from its docstring and its signature."""

    name: str
    summary: str
    """First sentence, without its full stop and what is in brackets."""
    text: str
    """Paragraphs before the options."""
    source: str
    """First paragraph of the module: the publication and its repository."""
    options: tuple[Option, ...]


def read_page(name: str, recipe: Any) -> Page:
    """Return the page of a registered recipe."""
    text, _, described = (inspect.getdoc(recipe) or "").partition("\n\n")
    paragraphs = described.split("\n\n")
    help_texts = _option_texts(paragraphs[-1]) if described else {}
    if not help_texts:
        text = "\n\n".join(filter(None, [text, described]))
    elif len(paragraphs) > 1:
        text = "\n\n".join([text, *paragraphs[:-1]])
    module = sys.modules.get(recipe.__module__)
    source = (inspect.getdoc(module) or "") if module else ""
    joined = _one_line(text)
    without_brackets = re.sub(r" \([^()]*\)", "", joined)
    return Page(
        name=name,
        summary=re.split(r"(?<=\w)[.:] |[.:]?$", without_brackets, maxsplit=1)[0],
        text=joined,
        source=_one_line(source.partition("\n\n")[0]),
        options=_options(recipe, help_texts),
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _option_texts(paragraph: str) -> dict[str, str]:
    """Return the descriptions "name: text" or "name, name: text"; continuation lines are indented."""
    texts: dict[str, str] = {}
    for line in re.sub(r"\n +", " ", paragraph).splitlines():
        named, colon, text = line.partition(": ")
        names = named.split(", ")
        if colon and all(name.isidentifier() for name in names):
            texts |= dict.fromkeys(names, text)
    return texts


def _options(recipe: Any, help_texts: Mapping[str, str]) -> tuple[Option, ...]:
    from stbench.core.ranges import option_parameters

    function = inspect.unwrap(recipe)
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = list(option_parameters(recipe).values())[1:]  # the first is the backbone info
    return tuple(
        Option(p.name, p.default, _values(hints.get(p.name, Any)), help_texts.get(p.name, ""))
        for p in parameters
    )


def _values(hint: Any) -> str:
    """Describe the values that a type allows: choices, or a range."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, arguments))
    if hasattr(hint, "__metadata__"):
        bounds = []
        for item in hint.__metadata__:
            for part in getattr(item, "metadata", [item]):
                found = {sign: getattr(part, name, None) for name, sign in COMPARISONS.items()}
                bounds += [f"{sign} {bound:g}" for sign, bound in found.items() if _is_shown(sign, bound)]
        return ", ".join(bounds) or _values(arguments[0])
    if any(argument is type(None) for argument in arguments):
        parts = [_values(argument) for argument in arguments if argument is not type(None)]
        return " | ".join([*filter(None, parts), "none"])
    return {int: "integer", float: "number", bool: "true | false", str: "text"}.get(hint, "")


def _is_shown(sign: str, bound: Any) -> bool:
    """Whether a bound says something: large upper ones only guard against mistakes."""
    return isinstance(bound, (int, float)) and not (sign.startswith("<") and bound >= LARGE)


# --- Printing ---


def print_page(page: Page, cost: str, defaults: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the page of a recipe.

    Args:
        page: The recipe.
        cost: Its training FLOPs, relative to vanilla.
        defaults: Backbone -> option -> default.
    """
    from stbench.compare.format import Section
    from stbench.compare.terminal import print_section, print_text

    print_text(page.name, style="bold")
    print_text(page.text)
    print_text("")
    if page.source:
        print_text(f"source  {page.source}")
    print_text(f"FLOPs   {cost}, relative to vanilla on {SMALL} and the digits")
    if not page.options:
        print_text("options none")
        return
    columns = list(defaults) or ["default"]
    header = ("option", "values", *columns, "")
    rows = []
    for option in page.options:
        shown = [_default(option, defaults.get(column, {})) for column in columns]
        rows.append((option.name, option.values, *shown, option.help))
    left = frozenset(range(len(header)))
    print_section(
        Section("Options, set with --set recipe.NAME=VALUE, and their defaults", header, tuple(rows), left)
    )


def _default(option: Option, effective: Mapping[str, Any]) -> str:
    if option.name in effective:
        value = effective[option.name]
        return "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return NOT_FOUND if option.default is inspect.Parameter.empty else str(option.default)


def print_published(name: str) -> None:
    """Print the values that papers and repositories report for a recipe, if the file with them is there."""
    from stbench.compare.published import TITLE, published_section, read_published
    from stbench.compare.terminal import print_section, print_text
    from stbench.core.errors import UserError

    try:
        values = [value for value in read_published() if value.recipe == name]
    except UserError:
        return  # only a clone of stbench has the file
    if values:
        section, notes = published_section(values)
        print_section(section)
        for note in notes:
            print_text(note)
    else:
        print_text("")
        print_text(f"{TITLE}: none")
