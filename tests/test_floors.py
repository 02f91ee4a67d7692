"""Who may import whom: floors, fences, and no cycles. Every import counts, also one inside a function."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PLUGINS = ("backbones", "recipes", "examples")
FLOORS = (
    "errors rng flops contracts records assets",
    "layers adaln objectives samplers align teachers latents data checkpoints official registry config "
    "resolve initial results schema journal environment images sources vae latent_store store_writer "
    "encoding prepare tokens repa collection prefetch prepared presets data_options outputs imagesets parts "
    "precision",
    "backbones recipes examples",
    "stage evaluate store",
    "hooks plan testing bench probe",
    "engine trainer revisit painter sampling asked board budgets compare groups leaderboard reported "
    "standing stats report sections summary tables figures specify suite executor sweep monitor export",
    "options cli cli_data cli_samples cli_sweep cli_export commands listing data_commands scoring sweeping "
    "child __main__",
)
"""Rooms by floor, the lowest first; a room is a module of stbench or a folder of that name."""
PRINT = {
    *("asked", "board", "budgets", "compare", "groups", "leaderboard", "reported", "standing", "stats"),
    *("report", "sections", "summary", "tables", "figures"),
}
PRINT_SEES = {*PRINT, "records", "results", "errors", "schema", "journal"}
PLUGINS_DO_NOT_SEE = {"config", "resolve", "results"}
FENCES = {
    "mmengine.registry": {"registry"},
    "mmengine.config": {"resolve"},
    "mmengine": {"registry", "resolve", "hooks"},
    "diffusers": {"latents"},
    "torch_fidelity": {"evaluate"},
    "typer": {"cli", "cli_data", "cli_export", "cli_samples", "cli_sweep", "options"},
}
"""Package -> the rooms that may import it; the longest name that fits decides."""
HEAVY = ("torch", "torchvision", "timm", "diffusers", "mmengine", "torch_fidelity", "sklearn", "scipy")

Imports = Mapping[str, set[str]]
"""Module -> everything it imports, by full name."""
Rule = Callable[[Imports], Iterator[str]]
"""Yields a line for each import that it forbids."""


def room(module: str) -> str:
    """ "stbench.evaluate.drawing" -> "evaluate", "stbench.backbones.sit" -> "backbones", "stbench" -> ""."""
    return module.removeprefix("stbench").lstrip(".").partition(".")[0]


def floor(module: str) -> int:
    """The floor of a module of ours; LookupError for one that has none."""
    if module == "stbench":
        return 0
    for number, rooms in enumerate(FLOORS):
        if room(module) in rooms.split():
            return number
    raise LookupError(f"{module} has no floor: give it one in {Path(__file__).name}")


def sources() -> dict[str, Path]:
    """Every module of ours by its full name; the checkers' links inside stbench/ are not followed twice."""
    found = {}
    for top in ("stbench", *PLUGINS):
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in (("stbench", "backbones"), ("stbench", "recipes")):
                continue
            parts = parts if top == "stbench" else ("stbench", *parts)
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imported(tree: ast.AST, modules: set[str]) -> set[str]:
    """Full names of what a file imports; `from package import module` counts as the module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write the whole name, not a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & modules) or {str(node.module)}
    return found


def upward(imports: Imports) -> Iterator[str]:
    """Imports of a higher floor."""
    for module, targets in imports.items():
        for target in targets & imports.keys():
            if floor(target) > floor(module):
                yield f"{module} (floor {floor(module)}) imports {target} (floor {floor(target)})"


def beyond_the_plugin_floor(imports: Imports) -> Iterator[str]:
    """Plug-ins see floors 0 and 1 without config and results; a recipe sees no backbone, no other recipe."""
    for module, targets in imports.items():
        if room(module) not in PLUGINS:
            continue
        for target in targets & imports.keys():
            family = room(module) == room(target) == "backbones"
            if (floor(target) > 1 and not family) or room(target) in PLUGINS_DO_NOT_SEE:
                yield f"{module} imports {target}"


def beyond_the_print_group(imports: Imports) -> Iterator[str]:
    """What prints and compares sees records, results and itself."""
    for module, targets in imports.items():
        if room(module) in PRINT:
            unseen = {t for t in targets & imports.keys() if room(t) not in PRINT_SEES}
            yield from (f"{module} imports {target}" for target in unseen)


def over_a_fence(imports: Imports) -> Iterator[str]:
    """Packages imported outside the rooms that own them."""
    for module, targets in imports.items():
        for target in targets:
            fences = [f for f in FENCES if target == f or target.startswith(f"{f}.")]
            if fences and room(module) not in FENCES[max(fences, key=len)]:
                yield f"{module} imports {target}"


def heavy_behind_print(imports: Imports) -> Iterator[str]:
    """Heavy packages anywhere behind what `compare` imports."""
    for module in reached(imports, {m for m in imports if room(m) in PRINT_SEES}):
        yield from (f"{module} imports {t}" for t in imports[module] if t.partition(".")[0] in HEAVY)


def reached(imports: Imports, start: set[str]) -> set[str]:
    """`start` and all modules of ours behind it."""
    seen, todo = set(), set(start)
    while todo:
        seen |= todo
        todo = {t for module in todo for t in imports[module] & imports.keys()} - seen
    return seen


def cycles(imports: Imports) -> Iterator[str]:
    """Modules that are reached from what they import themselves."""
    for module in imports:
        if module in reached(imports, imports[module] & imports.keys()):
            yield module


RULES = (
    upward,
    beyond_the_plugin_floor,
    beyond_the_print_group,
    over_a_fence,
    heavy_behind_print,
    cycles,
)


@pytest.fixture(scope="module")
def tree() -> Imports:
    files = sources()
    return {module: imported(ast.parse(file.read_text()), set(files)) for module, file in files.items()}


def test_every_file_has_a_floor(tree: Imports) -> None:
    assert {"stbench.cli", "stbench.backbones.sit", "stbench.recipes.vanilla"} <= tree.keys()
    assert [floor(module) for module in tree]


@pytest.mark.parametrize("rule", RULES)
def test_the_tree_keeps_the_rule(rule: Rule, tree: Imports) -> None:
    assert list(rule(tree)) == []


PLANTED = [
    (upward, {"stbench.layers": {"stbench.stage"}}),
    (beyond_the_plugin_floor, {"stbench.recipes.vanilla": {"stbench.config"}}),
    (beyond_the_plugin_floor, {"stbench.recipes.vanilla": {"stbench.backbones.sit"}}),
    (beyond_the_plugin_floor, {"stbench.recipes.vanilla": {"stbench.recipes.vae_align"}}),
    (beyond_the_plugin_floor, {"stbench.backbones.sit": {"stbench.stage"}}),
    (beyond_the_print_group, {"stbench.compare": {"stbench.engine"}}),
    (over_a_fence, {"stbench.hooks": {"mmengine.registry"}}),
    (over_a_fence, {"stbench.data": {"diffusers"}}),
    (over_a_fence, {"stbench.commands": {"typer"}}),
    (heavy_behind_print, {"stbench.compare": {"stbench.schema"}, "stbench.schema": {"torch.nn"}}),
    (cycles, {"stbench.layers": {"stbench.align"}, "stbench.align": {"stbench.layers"}}),
]


@pytest.mark.parametrize(("rule", "planted"), PLANTED)
def test_a_planted_import_is_found(rule: Rule, planted: dict[str, set[str]]) -> None:
    names = planted.keys() | {t for targets in planted.values() for t in targets if t.startswith("stbench")}
    assert list(rule({name: planted.get(name, set()) for name in names}))


def test_a_new_file_needs_a_floor() -> None:
    with pytest.raises(LookupError, match=r"stbench\.novelty has no floor"):
        floor("stbench.novelty")


def test_imports_inside_functions_count() -> None:
    code = "def f():\n    from stbench import stage\n    import mmengine.dist\n"
    assert imported(ast.parse(code), {"stbench.stage"}) == {"stbench.stage", "mmengine.dist"}
