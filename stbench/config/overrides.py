"""Option values from `--set a.b=c` and config files, and their validation against models and signatures."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from stbench.config.files import read_file
from stbench.core.errors import UserError
from stbench.core.ranges import option_parameters
from stbench.core.recipe import is_computed
from stbench.core.registry import BACKBONES, lookup, names, suggest
from stbench.core.safe_load import MalformedError, parse_json, shorten, shown

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
            raise UserError(f"--set must be KEY=VALUE, got {shown(pair)}; for example --set train.lr=1e-3")
        parsed[name.strip()] = _value(text.strip())
    return parsed


def _value(text: str) -> Any:
    try:
        return parse_json(text)
    except MalformedError:
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

    Raises:
        UserError: If an option belongs to no section.
    """
    sections: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    for name, value in overrides.items():
        section, dot, option = name.partition(".")
        if not dot or section not in sections:
            raise UserError(
                f"unknown option {shorten(name)}: expected backbone.*, recipe.*, train.*, eval.* or data.*"
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
        found = model(**values)
    except ValidationError as error:
        raise _one_line(error, section) from error
    _refuse_booleans(values, found.model_dump(), section)
    return found


def validate_options(
    function: Any, values: dict[str, Any], section: str, *, skip: Collection[str] = ()
) -> dict[str, Any]:
    """Check option values against the annotations of a function's signature.

    Returns every option that has a value, defaults included, as plain data. Options in `skip` are ignored.
    Options whose default is computed are left out unless they are given.

    Raises:
        UserError: If an option is unknown or has an invalid value.
    """
    values = {name: value for name, value in values.items() if name not in skip}
    parameters = {k: p for k, p in option_parameters(function).items() if k not in skip}
    _require_known(values, parameters, section)
    try:
        model = _options_model(function, parameters, values)
    except Exception as error:  # the annotations of a plug-in may be anything
        raise UserError(
            f"the options of {section} '{function.__name__}' cannot be read: {type(error).__name__}: "
            f"{error}; fix its signature"
        ) from error
    try:
        found: dict[str, Any] = model(**values).model_dump()
    except ValidationError as error:
        raise _one_line(error, section) from error
    _refuse_booleans(values, found, section)
    return found


def _options_model(
    function: Any, parameters: Mapping[str, inspect.Parameter], values: Mapping[str, Any]
) -> type[BaseModel]:
    """A model of the parameters; those with a value, and those without a default, are required."""
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if name in values or parameter.default is inspect.Parameter.empty:
            fields[name] = (hints.get(name, Any), ...)
        elif not is_computed(parameter.default):
            fields[name] = (hints.get(name, Any), parameter.default)
    return create_model("Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)


def _refuse_booleans(given: Mapping[str, Any], found: Mapping[str, Any], section: str) -> None:
    """Refuse true and false where a number is expected; pydantic takes them for 1 and 0."""
    for name, value in given.items():
        if _has_converted_boolean(value, found[name]):
            raise UserError(
                f"invalid value for '{section}.{name}': input should be a number, got {shown(value)}; "
                f"change it with --set {section}.{name}=..."
            )


def _has_converted_boolean(given: Any, found: Any) -> bool:
    if isinstance(given, (list, tuple)) and isinstance(found, (list, tuple)):
        return any(map(_has_converted_boolean, given, found))
    return isinstance(given, bool) and not isinstance(found, bool)


def _require_known(values: Mapping[str, Any], known: Collection[str], section: str) -> None:
    for name in values:
        if name not in known:
            raise UserError(
                f"unknown option {shorten(f'{section}.{name}')}{suggest(name, known, prefix=f'{section}.')}"
            )


def _one_line(error: ValidationError, section: str) -> UserError:
    first = error.errors()[0]
    place = ".".join([section, *(str(part) for part in first["loc"][:1])])
    if first["type"] == "missing":
        return UserError(f"option '{place}' has no default; give it with --set {place}=...")
    return UserError(
        f"invalid value for '{place}': {first['msg'].lower()}, got {shown(first['input'])}; "
        f"change it with --set {place}=..."
    )
