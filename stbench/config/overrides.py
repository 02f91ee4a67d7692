"""Option values from `--set a.b=c` and config files, and their validation against models and signatures."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from stbench.config.files import read_file
from stbench.core.errors import UserError
from stbench.core.recipe import is_computed
from stbench.core.registry import BACKBONES, lookup, names, suggest

SECTIONS = ("backbone", "recipe", "train", "eval", "data")
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
            raise UserError(f"--set must be KEY=VALUE, got '{pair}'; for example --set train.lr=1e-3")
        parsed[name.strip()] = _value(text.strip())
    return parsed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"true": True, "True": True, "False": False, "None": None, "none": None}.get(text, text)


def read_config(file: Path) -> dict[str, Any]:
    """Read a config file of `stbench run` as {option: value}, with `set` flattened to dotted names.

    Raises:
        UserError: If the file is missing or malformed, or contains an unknown option.
    """
    return checked_options(read_file(file, "config", "--config"), OPTIONS, str(file))


def checked_options(content: Mapping[str, Any], known: Sequence[str], where: str) -> dict[str, Any]:
    """Check the option names of a config file and flatten its `set`. `where` names the place in messages.

    Raises:
        UserError: If an option is unknown, or `set` is not a mapping.
    """
    for name in content:
        if name not in known:
            raise UserError(f"{where}: unknown option '{name}'{suggest(name, sorted(known))}")
    if not isinstance(content.get("set", {}), Mapping):
        raise UserError(
            f"{where}: 'set' must be a mapping of options to values, got {content['set']!r}; "
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

    Raises:
        UserError: If an option belongs to no section.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in overrides.items():
        section, dot, option = name.partition(".")
        if not dot or section not in sections:
            raise UserError(
                f"unknown option '{name}': expected backbone.*, recipe.*, train.*, eval.* or data.*"
                f"{suggest(section, sections)}"
            )
        sections[section][option] = value
    return sections


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
    _require_known(values, model.model_fields, section)
    try:
        return model(**values)
    except ValidationError as error:
        raise _one_line(error, section) from error


def validate_options(
    function: Any, values: dict[str, Any], section: str, *, skip: Collection[str] = ()
) -> dict[str, Any]:
    """Check option values against the annotations of a function's signature.

    Returns every option that has a value, defaults included, as plain data. Options in `skip` are ignored.
    Options whose default is computed are left out unless they are given.

    Raises:
        UserError: If an option is unknown or has an invalid value.
    """
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target, include_extras=True)
    values = {name: value for name, value in values.items() if name not in skip}
    parameters = {k: p for k, p in inspect.signature(function).parameters.items() if k not in skip}
    _require_known(values, parameters, section)

    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in values or parameter.default is inspect.Parameter.empty:
            fields[name] = (hints.get(name, Any), ...)
        elif not is_computed(parameter.default):
            fields[name] = (hints.get(name, Any), parameter.default)
    model = create_model("Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    try:
        return model(**values).model_dump()
    except ValidationError as error:
        raise _one_line(error, section) from error


def _require_known(values: Mapping[str, Any], known: Collection[str], section: str) -> None:
    for name in values:
        if name not in known:
            raise UserError(f"unknown option '{section}.{name}'{suggest(name, known, prefix=f'{section}.')}")


def _one_line(error: ValidationError, section: str) -> UserError:
    first = error.errors()[0]
    place = ".".join([section, *(str(part) for part in first["loc"][:1])])
    return UserError(
        f"invalid value for '{place}': {first['msg'].lower()}, got {first['input']!r}; "
        f"change it with --set {place}=..."
    )
