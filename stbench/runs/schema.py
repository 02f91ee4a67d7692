"""The fields of the files in a run folder: the type of each, and JSON values for floats. Opens no file.

Floats are written with `repr` and read back bit for bit. JSON has no infinities and no NaN, so these are
written as the strings "inf", "-inf" and "nan". Every error is one line that names the place and the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stbench.core import limits
from stbench.core.errors import UserError
from stbench.core.safe_load import shown
from stbench.runs.guide_text import recorded_guides

Fields = Mapping[str, Callable[[Any], Any]]
"""Name of a field -> function that checks and converts its JSON value."""

NOT_FINITE = ("nan", "inf", "-inf")
"""Strings that stand for floats that are not finite."""

REMEDY = "restore the file, or delete the folder and run `stbench run` again"


def plain(value: Any) -> Any:
    """Convert a value to JSON's types, with "nan", "inf" and "-inf" for floats that JSON cannot represent."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def convert(row: Mapping[str, Any], fields: Fields, where: Path | str) -> dict[str, Any]:
    """Convert the named fields of a row.

    Raises:
        UserError: If a field is missing or has another type.
    """
    values = {}
    for name, converter in fields.items():
        if name not in row:
            raise UserError(f"{where} has no field '{name}'; {REMEDY}")
        try:
            values[name] = converter(row[name])
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{where}: {name} = {shown(row[name])} is not a valid value; {REMEDY}") from None
    return values


def _typed(kind: type) -> Callable[[Any], Any]:
    def checked(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return checked


text, flag, mapping, sequence = _typed(str), _typed(bool), _typed(dict), _typed(list)


def whole(value: Any) -> int:
    """Check a non-negative integer below 2^63; True and False are not integers."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise TypeError
    return value


def number(value: Any) -> float:
    """Check a number, or one of the strings that `plain` writes for a float that is not finite."""
    if value not in NOT_FINITE and type(value) not in (int, float):
        raise TypeError
    return float(value)


def numbers(value: Any) -> dict[str, float]:
    """Check a mapping from names to numbers."""
    return {name: number(item) for name, item in mapping(value).items()}


def texts(value: Any) -> dict[str, str]:
    """Check a mapping from names to strings."""
    return {name: text(item) for name, item in mapping(value).items()}


def digest(value: Any) -> str:
    """Check a sha256 in hexadecimal."""
    if len(text(value)) != 64 or not set(value) <= set("0123456789abcdef"):
        raise ValueError
    return str(value)


def digests(value: Any) -> dict[str, str]:
    """Check a mapping from names to sha256 in hexadecimal."""
    return {name: digest(item) for name, item in mapping(value).items()}


def mappings(value: Any) -> dict[str, dict[str, Any]]:
    """Check a mapping from names to mappings."""
    return {name: mapping(item) for name, item in mapping(value).items()}


def section(**fields: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a check of a mapping with at least these fields; the value is returned unchanged."""

    def checked(value: Any) -> Any:
        for name, converter in fields.items():
            if name not in mapping(value):
                raise TypeError
            converter(value[name])
        return value

    return checked


def _interval(value: Any) -> tuple[float, float]:
    low, high = sequence(value)
    return number(low), number(high)


def _backbone(value: Any) -> Any:
    optional = [mapping(value)[name] for name in ("options", "effective") if name in mapping(value)]
    for options in optional:
        depth = mapping(options).get("depth", 1)
        if type(depth) is int and depth > limits.MAX_DEPTH:  # building the network would not end
            raise ValueError
    return section(name=text, size=text)(value)


def _data(value: Any) -> Any:
    if value is not None:
        extractor = mapping(value).get("extractor")
        text("" if extractor is None else extractor)
        text(value.get("vae_sha256", ""))
    return value


def _stages(value: Any) -> Any:
    for stage in sequence(value):
        section(name=text, steps=whole, images=whole, supervision=mapping)(stage)
    return value


def _guide_cost(value: Any) -> dict[str, float]:
    cost = numbers(section(images=number, seconds=number, flops=number)(value))
    if not all(map(math.isfinite, cost.values())):
        raise ValueError
    return cost


POINT: Fields = {
    "stage": text,
    "stage_index": whole,
    "step": whole,
    "images": whole,
    "guidance": number,
    "interval": _interval,
    "protocol": text,
    "metrics": numbers,
    "val_loss": lambda value: [number(item) for item in sequence(value)],
    "seconds": number,
    "flops": number,
}
OPTIONAL_POINT: Fields = {"guides": recorded_guides, "guide_cost": _guide_cost}
"""Fields of a point that are left out where they are empty."""
STAGE: Fields = {
    "name": text,
    "index": whole,
    "steps": whole,
    "images": whole,
    "seconds": number,
    "warmup_seconds": number,
    "flops_student": number,
    "flops_heads": number,
    "flops_teachers": number,
    "fingerprint": text,
    "sha256": digests,
    "reused": flag,
}
STATE: Fields = {
    "file": text,
    "sha256": digest,
    "step": whole,
    "seconds": number,
    "warmup_seconds": number,
    "cost": numbers,
}
SPEC: Fields = {
    "run_id": text,
    "dataset": text,
    "backbone": _backbone,
    "objective": text,
    "recipe": section(name=text, options=mapping, effective=mapping, needs=text),
    "train": section(steps=whole, batch=whole, precision=text),
    "eval": mapping,
    "seed": whole,
    "stage_count": whole,
    "setting_hash": text,
    "train_hash": text,
    "plugins": texts,
}
OPTIONAL: Fields = {"row_hash": text, "stages": _stages, "data": _data, "objective_options": mapping}
"""Fields of spec.json that the earliest records lack."""
