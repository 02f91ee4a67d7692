"""Validation of option values against the annotations of a signature."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from stbench.core.errors import UserError
from stbench.core.ranges import option_parameters
from stbench.core.recipe import is_computed
from stbench.core.registry import suggest
from stbench.core.safe_load import shorten, shown


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
    require_known(values, parameters, section)
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
        raise one_line(error, section) from error
    refuse_booleans(values, found, section)
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


def refuse_booleans(given: Mapping[str, Any], found: Mapping[str, Any], section: str) -> None:
    """Refuse true and false where a number is expected; pydantic takes them for 1 and 0.

    Where they became a text, the field's own validator made it.
    """
    for name, value in given.items():
        if _has_converted_boolean(value, found[name]):
            raise UserError(
                f"invalid value for '{section}.{name}': input should be a number, got {shown(value)}; "
                f"change it with --set {section}.{name}=..."
            )


def _has_converted_boolean(given: Any, found: Any) -> bool:
    if isinstance(given, (list, tuple)) and isinstance(found, (list, tuple)):
        return any(map(_has_converted_boolean, given, found))
    return isinstance(given, bool) and not isinstance(found, (bool, str))


def require_known(values: Mapping[str, Any], known: Collection[str], section: str) -> None:
    """Raise UserError for a value of an option that is not known."""
    for name in values:
        if name not in known:
            raise UserError(
                f"unknown option {shorten(f'{section}.{name}')}{suggest(name, known, prefix=f'{section}.')}"
            )


def one_line(error: ValidationError, section: str) -> UserError:
    """Return the first error of a validation as a UserError."""
    first = error.errors()[0]
    place = ".".join([section, *(str(part) for part in first["loc"][:1])])
    if first["type"] == "missing" and len(first["loc"]) == 1:
        return UserError(f"option '{place}' has no default; give it with --set {place}=...")
    return UserError(
        f"invalid value for '{place}': {first['msg'].lower()}, got {shown(first['input'])}; "
        f"change it with --set {place}=..."
    )
