"""`--set a.b=c` and config files: parsing and validation of option values."""

from __future__ import annotations

import difflib
import inspect
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, lookup, names, suggest

SECTIONS = ("backbone", "recipe", "train", "eval", "data")
"""First words of the options that --set takes."""


def parse_set(pairs: Sequence[str]) -> dict[str, Any]:
    """`["train.lr=1e-3", ...]` -> {"train.lr": 0.001}; values are JSON where they parse, else text."""
    parsed = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise UserError(f"--set wants KEY=VALUE, got '{pair}'; for example --set train.lr=1e-3")
        parsed[name.strip()] = _value(text.strip())
    return parsed


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return {"true": True, "True": True, "False": False, "None": None, "none": None}.get(text, text)


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
"""What a config file may give."""


def read_config(file: Path) -> dict[str, Any]:
    """A YAML, JSON or Python file (mmengine's Config, `_base_` included) as {option: value}; `set` is
    flattened.
    """
    return checked_options(read_file(file, "config", "--config"), OPTIONS, str(file))


def read_file(file: Path, what: str, option: str) -> dict[str, Any]:
    """The content of a YAML, JSON or Python file, or a UserError that calls it a `what` file of `option`."""
    from mmengine.config import Config  # imports yapf and numpy: only when a file is given

    if not file.is_file():
        raise UserError(f"{what} file not found: {file}; expected a .yaml, .json or .py file after {option}")
    try:
        return dict(Config.fromfile(str(file)).to_dict())
    except Exception as error:  # mmengine raises whatever its parsers raise
        raise UserError(
            f"{what} file {file} cannot be read: {type(error).__name__}: {error}".splitlines()[0]
        ) from error


def checked_options(content: Mapping[str, Any], known: Sequence[str], where: str) -> dict[str, Any]:
    """The options with `set` flattened; UserError for one that is not among the known, or a `set` of none."""
    for name in content:
        if name not in known:
            raise UserError(f"{where}: unknown option '{name}'{suggest(name, sorted(known))}")
    if not isinstance(content.get("set", {}), Mapping):
        raise UserError(
            f"{where}: 'set' wants options and values, got {content['set']!r}; "
            f"for example set: {{train.lr: 1e-3}}"
        )
    return {**content, "set": _flatten(content.get("set", {}))}


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        )
    return flat


def split_backbone(name: str) -> tuple[str, str | None]:
    """ "sit" -> ("sit", None); "sit-b/2" -> ("sit", "b/2"); the longest registered family wins."""
    families = sorted(names(BACKBONES), key=len, reverse=True)
    for family in families:
        if name == family:
            return family, None
        if name.startswith(family + "-"):
            return family, name[len(family) + 1 :]
    lookup(BACKBONES, name.split("-")[0])
    raise AssertionError("unreachable: lookup raised")


def _section(model: type[BaseModel], values: dict[str, Any], section: str) -> Any:
    for name in values:
        if name not in model.model_fields:
            raise UserError(f"unknown option '{section}.{name}'{_near(section, name, model.model_fields)}")
    try:
        return model(**values)
    except ValidationError as error:
        raise _one_line(error, section) from error


def _validate(function: Any, values: dict[str, Any], section: str, skip: set[str]) -> dict[str, Any]:
    """Check values against a signature; returns every option, defaults included, as plain data."""
    target = function.__init__ if inspect.isclass(function) else function
    hints = typing.get_type_hints(target, include_extras=True)
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if name in skip:
            continue
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[name] = (hints.get(name, Any), default)
    values = {k: v for k, v in values.items() if k not in skip}
    for name in values:
        if name not in fields:
            raise UserError(f"unknown option '{section}.{name}'{_near(section, name, fields)}")
    model = create_model("Options", __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **fields)
    try:
        return model(**values).model_dump()
    except ValidationError as error:
        raise _one_line(error, section) from error


def _near(section: str, name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    if near:
        return f"; did you mean '{section}.{near[0]}'?"
    return f"; {section} takes: {', '.join(known) or 'no options'}"


def _one_line(error: ValidationError, section: str) -> UserError:
    first = error.errors()[0]
    place = ".".join([section, *(str(part) for part in first["loc"][:1])])
    return UserError(
        f"bad value for '{place}': {first['msg'].lower()}, got {first['input']!r}; "
        f"change it with --set {place}=..."
    )
