"""The words are as true as the code: the README's tree, the names in the docs, the help of the commands."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import typer

from stbench.cli import app as cli
from stbench.core.registry import BACKBONES, DATASETS, OBJECTIVES, RECIPES, SAMPLERS, load_builtins, names
from stbench.evaluate.metrics import METRICS

load_builtins()
ROOT = Path(__file__).parents[1]


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """Every command by what is typed after `stbench`, those of a group after the group itself."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        found[prefix + name] = command
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix}{name} ")
    return found


COMMANDS = commands(typer.main.get_command(cli.app))
REGISTRIES = {"backbone": BACKBONES, "recipe": RECIPES, "dataset": DATASETS, "objective": OBJECTIVES}
ONE_LINE_EACH = ("stbench", "backbones", "recipes", "examples")
"""Folders whose files the README lists one by one; a folder inside them is one line."""


def builtin(registry: Any) -> set[str]:
    """Names that this repository registers, not a plug-in."""
    return {n for n in names(registry) if registry.module_dict[n].__module__.startswith("stbench.")}


def documents() -> str:
    """README and docs in one text."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *ROOT.glob("*/README.md")]
    return "\n".join(file.read_text() for file in files)


def code() -> str:
    """What stands in backticks or in a fenced block of the documents."""
    return "\n".join(re.findall(r"```.*?```|`[^`\n]+`", documents(), re.DOTALL))


def tree(text: str) -> Iterator[str]:
    """Paths of a tree in a fenced block: a line is names, then words, all two spaces apart.

    A line that is not indented names a folder (or files of the root), indented lines name what is in it.
    """
    (block,) = (b for b in text.split("```")[1::2] if re.search(r"^stbench/\s", b, re.MULTILINE))
    folder = ""
    for line in block.splitlines():
        fields = re.split(r"\s{2,}", line.strip())
        listed = list(takewhile(lambda field: re.fullmatch(r"(?=.*[./])[\w./-]+|[A-Z]\w+", field), fields))
        if line[:1] != " ":
            folder = listed[0] if listed and listed[0].endswith("/") else ""
            yield from listed
        else:
            yield from (folder + name for name in listed)


README = (ROOT / "README.md").read_text()


def test_a_tree_is_read() -> None:
    block = "stbench/  the program\n  a.py  what a.py does\n  b/  more\nMakefile  x.y  z\n"
    text = f"```\na/  words\n```\n\n```\n{block}```\n"
    assert list(tree(text)) == ["stbench/", "stbench/a.py", "stbench/b/", "Makefile", "x.y"]


def test_every_path_of_the_readme_tree_exists() -> None:
    assert [path for path in tree(README) if not (ROOT / path).exists()] == []


def test_the_readme_tree_is_complete() -> None:
    expected = set()
    for folder in ONE_LINE_EACH:
        expected.add(f"{folder}/")
        files = (f for f in (ROOT / folder).glob("*.py") if not f.stem.startswith("__"))
        expected |= {f"{folder}/{file.name}" for file in files}
        packages = (f.parent for f in (ROOT / folder).glob("*/__init__.py") if not f.parent.is_symlink())
        expected |= {f"{folder}/{package.name}/" for package in packages}
    assert expected - set(tree(README)) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_documented(name: str) -> None:
    assert re.search(rf"stbench {name}\b", code())


@pytest.mark.parametrize("registry", [*REGISTRIES.values(), SAMPLERS], ids=lambda r: str(r.name))
def test_every_registered_name_is_documented(registry: Any) -> None:
    words = set(re.findall(r"[\w-]+", code()))
    assert builtin(registry) - words == set()


def test_every_metric_is_documented() -> None:
    assert METRICS.keys() - set(re.findall(r"\w+", code())) == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert [p.name for p in command.params if not getattr(p, "help", None)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_page_of_the_command_line_is_current(name: str) -> None:
    page = html.unescape((ROOT / "docs" / "cli.md").read_text())
    section = re.split(rf"\n##+ `stbench {name}`\n", page)[1].split("\n##")[0]
    told = [COMMANDS[name].help, *(p.help for p in COMMANDS[name].params if p.name != "help")]
    assert [text for text in told if text not in section] == [], "run `make docs`"


@pytest.mark.parametrize("kind", REGISTRIES)
def test_completion_knows_the_registered_names(kind: str) -> None:
    assert set(cli.registered(kind)) == builtin(REGISTRIES[kind])
