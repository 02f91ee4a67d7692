"""Which runs a sweep is asked for, from a suite file or from lists of names, and what each of them comes to:
its journal entry and the fingerprints of its stages. It trains nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from stbench.config.overrides import OPTIONS, checked_options, read_file
from stbench.config.plan import PreparedRun, prepare
from stbench.config.resolve import resolve_options
from stbench.core.errors import UserError
from stbench.core.registry import suggest
from stbench.runs.journal import JournalEntry

KEYS = (*OPTIONS, "seeds")
SHIPPED = Path(str(files("stbench.recipes"))) / "suites"


@dataclass(frozen=True)
class Wanted:
    """One run, as it was asked for."""

    where: str
    """Its place in the suite file, for errors; "" for a run of the command line."""
    values: Mapping[str, Any]
    """Options of a config file, without `set`."""
    overrides: Mapping[str, Any]
    """Dotted key -> value."""


@dataclass(frozen=True)
class Expanded:
    """One run, resolved and checked."""

    wanted: Wanted
    entry: JournalEntry
    prepared: PreparedRun

    @property
    def stages(self) -> tuple[str, ...]:
        """Fingerprints of its stages, in order."""
        return tuple(stage.fingerprint for stage in self.prepared.stages)


def find_suite(name: str, shipped: Path = SHIPPED) -> Path:
    """The suite file: a path, or the bare name of a shipped one. UserError for neither."""
    if Path(name).suffix:
        return Path(name)
    file = shipped / f"{name}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in shipped.glob("*.yaml"))
        near = suggest(name, known) if known else "; none is shipped"
        raise UserError(f"unknown suite '{name}': expected a shipped name or a .yaml file{near}")
    return file


def read_suite(file: Path) -> list[Wanted]:
    """The runs of a suite file: `defaults` < a group's `with` < a run, `set` key by key, one a seed."""
    content = read_file(file, "suite", "--suite")
    _only(content, ("defaults", "groups"), str(file))
    defaults = _level(content.get("defaults", {}), f"{file}: defaults")
    wanted: list[Wanted] = []
    for number, group in enumerate(_listed(content, "groups", str(file)), start=1):
        where = f"{file}: group {number}"
        if not isinstance(group, Mapping):
            raise UserError(f"{where}: expected 'with' and 'runs', got {group!r}")
        _only(group, ("with", "runs"), where)
        shared = _merged(defaults, _level(group.get("with", {}), f"{where}, with"))
        for index, run in enumerate(_listed(group, "runs", where), start=1):
            place = f"{where}, run {index}"
            wanted += _by_seed(_merged(shared, _level(run, place)), place)
    return wanted


def grid(
    backbones: Sequence[str],
    recipes: Sequence[str],
    seeds: Sequence[int],
    values: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> list[Wanted]:
    """Every backbone under every recipe at every seed, all else equal."""
    triples = itertools.product(backbones, recipes, seeds)
    return [
        Wanted("", {**values, "backbone": backbone, "recipe": recipe, "seed": seed}, overrides)
        for backbone, recipe, seed in triples
    ]


def expand(wanted: Iterable[Wanted]) -> list[Expanded]:
    """Resolve and check every run; UserError that names the first that does not fit, or that comes twice."""
    expanded: dict[str, Expanded] = {}
    for run in wanted:
        try:
            found = _expand(run)
        except UserError as error:
            raise UserError(f"{run.where}: {error}" if run.where else str(error)) from error
        run_id = found.entry.run_id
        if run_id in expanded:
            first = expanded[run_id].wanted.where
            places = f" ({first}; {run.where})" if first else ""
            raise UserError(f"run {run_id} is named twice{places}; name it once")
        expanded[run_id] = found
    return list(expanded.values())


def _expand(run: Wanted) -> Expanded:
    prepared = prepare(resolve_options(run.values, run.overrides))
    return Expanded(run, _entry(prepared), prepared)


def _entry(prepared: PreparedRun) -> JournalEntry:
    spec = prepared.spec
    return JournalEntry(
        run_id=prepared.run_id,
        dataset=spec.dataset,
        backbone=f"{spec.backbone.name}-{spec.backbone.size}",
        objective=spec.objective,
        recipe=spec.recipe.name,
        options=spec.model_dump(mode="json")["recipe"]["options"],
        seed=spec.seed,
        steps=spec.train.steps,
        setting_hash=prepared.hashes.setting,
        row_hash=prepared.hashes.row,
    )


def _only(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in content:
        if name not in known:
            raise UserError(f"{where}: unknown key '{name}'{suggest(str(name), known)}")


def _listed(content: Mapping[str, Any], name: str, where: str) -> list[Any]:
    found = content.get(name)
    if not isinstance(found, list) or not found:
        raise UserError(f"{where}: expected a list of {name}, got {found!r}; name at least one")
    return found


def _level(options: Any, where: str) -> dict[str, Any]:
    """The options of one level, checked: `set` flattened, `seed: 3` as `seeds: [3]`."""
    if not isinstance(options, Mapping):
        raise UserError(f"{where}: expected options, got {options!r}; for example {{recipe: vanilla}}")
    level = checked_options(options, KEYS, where)
    if "seed" in level:
        if "seeds" in level:
            raise UserError(f"{where}: expected seed or seeds, found both; name one of them")
        level["seeds"] = [level.pop("seed")]
    seeds = level.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise UserError(f"{where}: seeds wants a list of whole numbers, got {seeds!r}; for example [0, 1, 2]")
    return level


def _merged(outer: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    return {**outer, **inner, "set": {**outer["set"], **inner["set"]}}


def _by_seed(options: Mapping[str, Any], where: str) -> Iterator[Wanted]:
    values = {name: value for name, value in options.items() if name not in ("set", "seeds")}
    for seed in options.get("seeds", [0]):
        yield Wanted(where, {**values, "seed": seed}, options["set"])
