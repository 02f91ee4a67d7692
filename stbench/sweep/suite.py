"""The runs of a sweep: from a suite file, or from lists of names, to prepared runs. Trains nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from stbench.config.files import read_file
from stbench.config.overrides import OPTIONS, checked_options
from stbench.config.plan import PreparedRun, prepare
from stbench.config.resolve import resolve_options
from stbench.core.errors import UnsupportedError, UserError
from stbench.core.limits import MAX_RUNS, MAX_SEEDS
from stbench.core.registry import suggest
from stbench.core.safe_load import shorten, shown
from stbench.runs.journal import JournalEntry
from stbench.runs.records import network_name, row_label

LEVEL_OPTIONS = (*OPTIONS, "seeds")
"""Options that each level of a suite file may contain: those of a config file of `run`, and `seeds`."""
SHIPPED_SUITES = Path(str(files("stbench.recipes"))) / "suites"


@dataclass(frozen=True)
class SuiteRun:
    """One run as it was requested, by a suite file or on the command line."""

    place: str
    """Where in the suite file, for error messages; "" for a run of the command line."""
    values: Mapping[str, Any]
    """Values of the options of a config file, without `set`."""
    overrides: Mapping[str, Any]
    """Values of `set`, by dotted name."""


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep, resolved and checked."""

    requested: SuiteRun
    prepared: PreparedRun
    entry: JournalEntry

    @property
    def stages(self) -> tuple[str, ...]:
        """Fingerprints of its stages, in order."""
        return tuple(stage.fingerprint for stage in self.prepared.stages)


# --- Requested runs ---


def find_suite(name: str, shipped: Path = SHIPPED_SUITES) -> Path:
    """Return the file of a suite: `name` is a path, or the bare name of a shipped suite.

    Raises:
        UserError: No suite of that name is shipped.
    """
    if Path(name).suffix:
        return Path(name)
    file = shipped / f"{name}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in shipped.glob("*.yaml"))
        hint = suggest(name, known) if known else "; no suites are shipped"
        raise UserError(f"unknown suite '{name}': expected a shipped suite or a .yaml file{hint}")
    return file


def read_suite(file: Path) -> list[SuiteRun]:
    """Read the runs of a suite file.

    A suite has `defaults` and `groups`; a group has `with` and `runs`. The options of a run override those of
    its group's `with`, which override `defaults`; `set` is merged key by key. Each run is made once per seed.

    Raises:
        UserError: The file is missing or malformed, or contains an unknown option; names the place.
    """
    content = read_file(file, "suite", "--suite")
    _require_known_keys(content, ("defaults", "groups"), str(file))
    defaults = _read_level(content.get("defaults", {}), f"{file}: defaults")
    suite_runs: list[SuiteRun] = []
    for number, group in enumerate(_require_list(content, "groups", str(file)), start=1):
        place = f"{file}: group {number}"
        if not isinstance(group, Mapping):
            raise UserError(f"{place}: expected 'with' and 'runs', got {shown(group)}")
        _require_known_keys(group, ("with", "runs"), place)
        shared = _merge(defaults, _read_level(group.get("with", {}), f"{place}, with"))
        for index, run in enumerate(_require_list(group, "runs", place), start=1):
            run_place = f"{place}, run {index}"
            suite_runs += _one_per_seed(_merge(shared, _read_level(run, run_place)), run_place)
    return suite_runs


def grid(
    *,
    backbones: Sequence[str],
    recipes: Sequence[str],
    seeds: Sequence[int],
    values: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> list[SuiteRun]:
    """Return every combination of backbone, recipe and seed; `values` and `overrides` apply to all."""
    return [
        SuiteRun("", {**values, "backbone": backbone, "recipe": recipe, "seed": seed}, overrides)
        for backbone, recipe, seed in itertools.product(backbones, recipes, seeds)
    ]


def _require_known_keys(content: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for name in content:
        if name not in known:
            raise UserError(f"{place}: unknown key {shorten(name)}{suggest(name, known)}")


def _require_list(content: Mapping[str, Any], name: str, place: str) -> list[Any]:
    value = content.get(name)
    if not isinstance(value, list) or not value:
        raise UserError(f"{place}: {name} must be a non-empty list, got {shown(value)}")
    return value


def _read_level(options: Any, place: str) -> dict[str, Any]:
    """Check the options of one level; flattens `set` and turns `seed: 3` into `seeds: [3]`."""
    if not isinstance(options, Mapping):
        raise UserError(f"{place}: expected options, got {shown(options)}; for example {{recipe: vanilla}}")
    level = checked_options(options, LEVEL_OPTIONS, place)
    if "seed" in level:
        if "seeds" in level:
            raise UserError(f"{place}: found both seed and seeds; use only one of them")
        level["seeds"] = [level.pop("seed")]
    seeds = level.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or any(type(seed) is not int for seed in seeds):
        raise UserError(
            f"{place}: seeds must be a list of integers, got {shown(seeds)}; for example [0, 1, 2]"
        )
    if len(seeds) > MAX_SEEDS:
        raise UserError(f"{place}: expected at most {MAX_SEEDS} seeds, got {len(seeds)}; list fewer")
    return level


def _merge(outer: Mapping[str, Any], inner: Mapping[str, Any]) -> dict[str, Any]:
    return {**outer, **inner, "set": {**outer["set"], **inner["set"]}}


def _one_per_seed(options: Mapping[str, Any], place: str) -> Iterator[SuiteRun]:
    values = {name: value for name, value in options.items() if name not in ("set", "seeds")}
    for seed in options.get("seeds", [0]):
        yield SuiteRun(place, {**values, "seed": seed}, options["set"])


# --- Prepared runs ---


def prepare_runs(
    suite_runs: Iterable[SuiteRun], skip: Callable[[UnsupportedError], None] | None = None
) -> list[SweepRun]:
    """Resolve and check every run.

    With `skip`, a run whose recipe does not work with its backbone or objective is left out, and `skip` is
    called with the error.

    Raises:
        UserError: A run is invalid, or two runs are the same; names the place in the suite file.
    """
    suite_runs = list(itertools.islice(suite_runs, MAX_RUNS + 1))
    if len(suite_runs) > MAX_RUNS:
        raise UserError(f"a sweep can have at most {MAX_RUNS} runs; split it")
    by_id: dict[str, SweepRun] = {}
    for requested in suite_runs:
        try:
            prepared = prepare(resolve_options(requested.values, requested.overrides))
        except UserError as error:
            if skip is not None and isinstance(error, UnsupportedError):
                skip(error)
                continue
            raise UserError(f"{requested.place}: {error}" if requested.place else str(error)) from error
        run_id = prepared.run_id
        if run_id in by_id:
            first = by_id[run_id].requested.place
            places = f" ({first}; {requested.place})" if first else ""
            raise UserError(f"run {run_id} is requested twice{places}; remove one of them")
        by_id[run_id] = SweepRun(requested, prepared, _journal_entry(prepared))
    return list(by_id.values())


def _journal_entry(prepared: PreparedRun) -> JournalEntry:
    spec = prepared.spec
    return JournalEntry(
        run_id=prepared.run_id,
        dataset=spec.dataset,
        backbone=network_name(spec.backbone.model_dump()),
        objective=row_label(spec.objective, spec.objective_options),
        recipe=spec.recipe.name,
        options=spec.model_dump(mode="json")["recipe"]["options"],
        seed=spec.seed,
        steps=spec.train.steps,
        setting_hash=prepared.hashes.setting,
        row_hash=prepared.hashes.row,
    )
