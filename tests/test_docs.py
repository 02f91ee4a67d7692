"""Documentation tests: trees, links, commands, names and code blocks agree with the code."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from stbench.cli import app as cli
from stbench.cli.completion import registered_names
from stbench.core.registry import BACKBONES, DATASETS, OBJECTIVES, RECIPES, SAMPLERS, load_builtins, names
from stbench.data.spec import FDR6
from stbench.evaluate.fdr6 import FDR_METRICS
from stbench.evaluate.metrics import METRICS
from stbench.evaluate.scores import SCORES
from tests.conftest import Command

load_builtins()
ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"
GENERATED = DOCS / "cli.md"
PAGES = sorted(
    {*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("results/*/README.md")}
)
WRITTEN = [page for page in PAGES if page != GENERATED]


def identifier(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fenced(page: Path) -> list[tuple[str, str]]:
    """The language ("" for none) and the content of every fenced code block of a page."""
    parts = re.split(r"^```(\w*)\n", page.read_text(), flags=re.MULTILINE)
    return list(zip(parts[1::4], parts[2::4], strict=True))


def section(page: Path, heading: str) -> str:
    """The text under a second-level heading."""
    return page.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]


def first_column(text: str) -> list[str]:
    """Names in backticks in the first column of all tables in `text`."""
    cells = re.findall(r"^\| ([^|]*`[^|]*?) *\|", text, re.MULTILINE)
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


# The repository tree of the README


def tree(block: str) -> Iterator[str]:
    """The folders of a tree: `name/  description`, contents indented by two spaces."""
    parent = ""
    for line in block.splitlines():
        indent, name = re.fullmatch(r"( *)(\w+/) {2,}\S.*", line).groups()  # type: ignore[union-attr]
        parent = parent if indent else name
        yield parent + name if indent else name


def test_the_readme_tree_equals_the_repository() -> None:
    (block,) = [block for _, block in fenced(README) if block.startswith("stbench/ ")]
    packages = {p.parent for p in ROOT.glob("stbench/*/__init__.py") if not p.parent.is_symlink()}
    folders = {p.parent for pattern in ("*/*.py", "*/*.md") for p in ROOT.glob(pattern)}
    folders = {folder for folder in folders if not folder.name.startswith(".")}
    assert sorted(tree(block)) == sorted(f"{path.relative_to(ROOT)}/" for path in packages | folders)


# Links and paths


@pytest.mark.parametrize("page", WRITTEN, ids=identifier)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        if file.startswith(("http://", "https://")):
            continue
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [README, DOCS / "architecture.md", ROOT / "CONTRIBUTING.md"], ids=identifier)
def test_paths_in_backticks_exist(page: Path) -> None:
    paths = re.findall(r"`([\w./-]+/[\w.-]+\.\w+)`", page.read_text())
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_index_lists_every_page() -> None:
    listed = set(re.findall(r"\]\((\w+\.md)\)", (DOCS / "index.md").read_text()))
    assert listed == {page.name for page in DOCS.glob("*.md")} - {"index.md"}


def test_the_architecture_page_lists_every_package_with_its_layer() -> None:
    rows = re.findall(r"^\| +(\d) +\| `(\w+)` ", section(DOCS / "architecture.md", "Packages"), re.MULTILINE)
    (layers,) = re.findall(
        r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    downwards = [re.findall(r"\w+", line) for line in layers.splitlines()]
    expected = [
        (str(n), package) for n, layer in enumerate(reversed(downwards), start=1) for package in layer
    ]
    assert sorted(rows) == sorted(expected)


# Commands


def commands(group: Any, prefix: str = "") -> dict[str, Any]:
    """Every command by what is typed after `stbench`; commands of a group follow the group itself."""
    found: dict[str, Any] = {}
    for name, command in group.commands.items():
        found[prefix + name] = command
        if hasattr(command, "commands"):
            found |= commands(command, f"{prefix}{name} ")
    return found


COMMANDS = commands(typer.main.get_command(cli.app))


def typed(page: Path) -> list[list[str]]:
    """The arguments after `stbench` in every code block and code span of a page."""
    text = page.read_text()
    spans = [span.replace("\n", " ") for span in re.findall(r"(?<!`)`(stbench [^`]+)`", text)]
    lines = re.findall(
        r"^(?:.*/bin/|.*&& | *)(stbench .*)$", "\n".join(block for _, block in fenced(page)), re.MULTILINE
    )
    return [shlex.split(line, comments=True)[1:] for line in [*spans, *lines]]


def command_of(arguments: list[str]) -> str | None:
    """The longest command that the arguments start with."""
    found = [name for name in COMMANDS if arguments[: len(name.split())] == name.split()]
    return max(found, key=len, default=None)


@pytest.mark.parametrize("page", WRITTEN, ids=identifier)
def test_documented_commands_and_options_exist(page: Path) -> None:
    wrong = []
    for arguments in typed(page):
        name = command_of(arguments)
        if name is None:
            wrong += [] if arguments[0].isupper() or arguments[0].startswith("-") else [arguments]
            continue
        known = {option for p in COMMANDS[name].params for option in (*p.opts, *p.secondary_opts)} | {
            "--help"
        }
        options = {word for word in arguments if re.fullmatch(r"--?[a-z][\w-]*", word)}
        wrong += [[name, option] for option in options - known]
    assert wrong == []


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "data"])
def test_every_command_is_shown_in_the_docs(name: str) -> None:
    shown = [page for page in WRITTEN if any(command_of(arguments) == name for arguments in typed(page))]
    assert shown


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name: str) -> None:
    command = COMMANDS[name]
    assert command.help
    assert [p.name for p in command.params if not getattr(p, "help", None)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_reference_is_current(name: str) -> None:
    page = html.unescape(GENERATED.read_text())
    text = re.split(rf"\n##+ `stbench {name}`\n", page)[1].split("\n##")[0]
    expected = [COMMANDS[name].help, *(p.help for p in COMMANDS[name].params if p.name != "help")]
    assert [line for line in expected if line not in text] == [], "run `make docs`"


# Registered names


def builtin(registry: Any) -> set[str]:
    """Names registered for every command: neither by a plug-in nor by `stbench bench` for itself."""
    modules = {name: registry.module_dict[name].__module__ for name in names(registry)}
    return {n for n, module in modules.items() if re.match(r"stbench\.(?!bench\.)", module)}


REGISTRIES = {"backbone": BACKBONES, "recipe": RECIPES, "dataset": DATASETS, "objective": OBJECTIVES}


def test_the_usage_page_lists_every_registered_name() -> None:
    listed = first_column(section(DOCS / "usage.md", "What is available"))
    assert sorted(listed) == sorted(name for registry in REGISTRIES.values() for name in builtin(registry))


def test_the_usage_page_lists_the_samplers_of_each_objective() -> None:
    rows = re.findall(
        r"^\| ([^|]+) \| [^|]+ \| (`[^|]+`) *\|$",
        section(DOCS / "usage.md", "What is available"),
        re.MULTILINE,
    )
    listed = {
        name: tuple(re.findall(r"`([^`]+)`", samplers))
        for objectives, samplers in rows
        for name in re.findall(r"`([^`]+)`", objectives)
        if name in builtin(OBJECTIVES)
    }
    assert listed == {name: tuple(OBJECTIVES.module_dict[name].samplers) for name in builtin(OBJECTIVES)}
    assert {sampler for samplers in listed.values() for sampler in samplers} == builtin(SAMPLERS)


def test_every_metric_has_a_row() -> None:
    assert first_column(section(DOCS / "protocol.md", "Metrics")) == [
        *(
            "fid",
            "fid_all",
            "is",
            "accuracy",
            "kid",
            "mind",
            "precision",
            "recall",
            "nn_distance",
            "nn_distance_heldout",
            "fdr",
            "fdr6",
        )
    ]
    listed = first_column(section(DOCS / "protocol.md", "Metrics"))
    assert sorted(listed) == sorted(METRICS | FDR_METRICS)


def test_the_extractors_of_fdr6_have_rows() -> None:
    assert first_column(section(DOCS / "evaluation.md", "FDr")) == list(FDR6)


def test_every_score_has_a_row() -> None:
    (text,) = [
        text for text in (DOCS / "evaluation.md").read_text().split("\n\n") if text.startswith("| metric ")
    ]
    assert sorted(first_column(text)) == sorted(SCORES)


def test_the_usage_page_lists_every_suite() -> None:
    text = section(DOCS / "usage.md", "Sweep")
    suites = {file.stem for file in ROOT.glob("recipes/suites/*.yaml")}
    assert suites <= set(re.findall(r"`([\w-]+)`", text))


@pytest.mark.parametrize("kind", REGISTRIES)
def test_completion_knows_the_registered_names(kind: str) -> None:
    assert set(registered_names(kind)) == builtin(REGISTRIES[kind])


# Plug-ins


@pytest.mark.parametrize("block", [code for language, code in fenced(DOCS / "plugins.md") if language])
def test_the_plugins_page_quotes_the_examples(block: str) -> None:
    """Or calls the check, which tests/test_examples.py runs."""
    sources = [file.read_text() for file in (ROOT / "examples").glob("*.py")]
    assert any(block in source for source in sources) or "check_recipe(" in block


def test_the_plugins_page_lists_every_example() -> None:
    listed = re.findall(r"`(examples/\w+\.py)`", (DOCS / "plugins.md").read_text())
    assert set(listed) == {f"examples/{file.name}" for file in (ROOT / "examples").glob("*.py")}


# The recipe of the README


def test_the_recipe_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stbench: Command
) -> None:
    (code,) = [block for language, block in fenced(README) if language == "python"]
    (command,) = [arguments for arguments in typed(README) if "--plugin" in arguments]
    (tmp_path / command[command.index("--plugin") + 1]).write_text(code)
    monkeypatch.chdir(tmp_path)
    small = {"backbone.width": 24, "backbone.depth": 4, "backbone.heads": 2, "train.batch": 8}
    small |= {"eval.samples": 20, "eval.steps": 2, "eval.guidance": [1.0]}
    options = [f"--set={name}={value}" for name, value in small.items()]
    exit_code, out, error = stbench(*command, "--steps", 2, "--device", "cpu", *options)
    assert exit_code == 0, error
    assert "Curve of digits-sit-custom-pull-s0-" in out
    assert "pull" in error.split("denoise")[-1]  # the term's name in the last progress line


def test_the_security_page_names_tests_that_exist() -> None:
    text = (DOCS / "security.md").read_text()
    named = re.findall(r"`((?:tests/\w+/)?test_\w+\.py)(?:::(\w+))?`", text)
    assert len(named) > 15
    folder = "tests"
    for path, function in named:
        folder = str(Path(path).parent) if "/" in path else folder
        file = ROOT / folder / Path(path).name
        assert file.is_file(), path
        assert f"def {function}" in file.read_text()
