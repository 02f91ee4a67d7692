"""Option values from `--set a.b=c` and config files, and their validation against models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stbench.config.files import read_file
from stbench.config.like_run import options_of_run
from stbench.core.errors import UserError
from stbench.core.option_values import one_line, refuse_booleans, require_known
from stbench.core.registry import BACKBONES, lookup, names, suggest
from stbench.core.safe_load import MalformedError, parse_json, shorten, shown

SECTIONS = ("backbone", "objective", "recipe", "train", "eval", "data")
"""Sections of the options that `--set` takes."""

OPTIONS = (
    "backbone",
    "recipe",
    "dataset",
    "data",
    "objective",
    "steps",
    "seed",
    "precision",
    "eval_guidance",
    "init_from",
    "original",
    "init_weights",
    "set",
)
"""Options that a config file may contain."""

DECIDED_BY_DATA = frozenset({"channels", "input_size", "classes", "out_channels", "size"})
"""Constructor options of a backbone that the data set, the objective and the size decide."""

Model = TypeVar("Model", bound=BaseModel)


def parse_set(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `["train.lr=1e-3", ...]` into {"train.lr": 0.001}. Values are JSON, or text if they are not.

    Raises:
        UserError: If an item is not of the form KEY=VALUE.
    """
    parsed = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set must be KEY=VALUE, got {shown(pair)}; for example --set train.lr=1e-3")
        parsed[name.strip()] = _value(text.strip())
    return parsed


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except MalformedError:
        return {"true": True, "True": True, "False": False, "None": None, "none": None}.get(text, text)


def read_config(file: Path, typed: Collection[str] = ()) -> dict[str, Any]:
    """Read a config file of `stbench run` as {option: value}, with `set` flattened to dotted names.

    `file` may also be a run folder, whose options are returned; `typed` names those that are replaced.

    Raises:
        UserError: If the file is missing or malformed, or contains an unknown option.
    """
    if file.is_dir():
        return options_of_run(file, typed)
    return checked_options(read_file(file, "config", "--config"), OPTIONS, str(file))


def checked_options(content: Mapping[str, Any], known: Sequence[str], where: str) -> dict[str, Any]:
    """Check the option names of a config file and flatten its `set`. `where` names the place in messages.

    Raises:
        UserError: If an option is unknown, or `set` is not a mapping.
    """
    for name in content:
        if name not in known:
            raise UserError(f"{where}: unknown option {shorten(name)}{suggest(name, sorted(known))}")
    if not isinstance(content.get("set", {}), Mapping):
        raise UserError(
            f"{where}: 'set' must be a mapping of options to values, got {shown(content['set'])}; "
            f"for example set: {{train.lr: 1e-3}}"
        )
    return {**content, "set": _flatten(content.get("set", {}))}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def split_sections(overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Split {"train.lr": 1e-3, ...} into {"train": {"lr": 1e-3}, ...}.

    A further dot names an entry of an option that is a mapping: "recipe.on_options.weight".

    Raises:
        UserError: If an option belongs to no section, or is given as a mapping and as another value.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in overrides.items():
        section, dot, option = name.partition(".")
        if not dot or section not in sections:
            raise UserError(
                f"unknown option {shorten(name)}: expected {', '.join(f'{known}.*' for known in SECTIONS)}"
                f"{suggest(section, sections)}"
            )
        option, nested, entry = option.partition(".")
        if nested:
            value = {**_mapping(sections[section].get(option, {}), f"{section}.{option}"), entry: value}
        sections[section][option] = value
    return sections


def _mapping(value: Any, option: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"option '{option}' is given twice, as {shown(value)} and by entries; use one form")
    return value


def split_backbone(name: str) -> tuple[str, str | None]:
    """Split "sit-b/2" into ("sit", "b/2"), and "sit" into ("sit", None). The longest registered family wins.

    Raises:
        UserError: If no family of that name is registered.
    """
    families = sorted(names(BACKBONES), key=len, reverse=True)
    for family in families:
        if name == family:
            return family, None
        if name.startswith(family + "-"):
            return family, name[len(family) + 1 :]
    lookup(BACKBONES, name.split("-")[0])
    raise AssertionError("unreachable: lookup raises for unknown names")


def validate_section(model: type[Model], values: dict[str, Any], section: str) -> Model:
    """Build a section of the specification from option values.

    Raises:
        UserError: If an option is unknown or has an invalid value.
    """
    require_known(values, model.model_fields, section)
    try:
        found = model(**values)
    except ValidationError as error:
        raise one_line(error, section) from error
    refuse_booleans(values, found.model_dump(), section)
    return found
