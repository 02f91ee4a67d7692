"""The fields of the files in a run folder: records to JSON and back, with strict checks. Opens no file.

Floats are written with `repr` and read back bit for bit. JSON has no infinities and no NaN, so these are
written as the strings "inf", "-inf" and "nan". Every error is one line that names the place and the field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stbench.core.errors import UserError
from stbench.runs.records import SCHEMA

Fields = Mapping[str, Callable[[Any], Any]]
"""Name of a field -> function that checks and converts its JSON value."""

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


def parse(data: bytes, where: Path | str) -> dict[str, Any]:
    """Parse a JSON object of the current schema; returns it without its "schema" field.

    Raises:
        UserError: If the data are not a JSON object, or have another schema.
    """
    try:
        content = json.loads(data)
    except ValueError:
        raise UserError(f"{where} is not complete JSON (cut off or damaged); {REMEDY}") from None
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f"{where} has no field 'schema'; {REMEDY}")
    found = content.pop("schema")
    if found == 1:
        raise UserError(
            f"{where} has schema 1, but this version reads schema {SCHEMA}; convert the folder that contains "
            f"the run folders with `python scripts/migrate_records.py FOLDER`"
        )
    if found != SCHEMA:
        raise UserError(
            f"{where} has schema {found!r}, but this version reads schema {SCHEMA}; use the version of "
            f"stbench that wrote it"
        )
    return content


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
        except (TypeError, ValueError):
            raise UserError(f"{where}: {name} = {row[name]!r} is not a valid value; {REMEDY}") from None
    return values


def _typed(kind: type) -> Callable[[Any], Any]:
    def checked(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError
        return value

    return checked


text, whole, flag, mapping = _typed(str), _typed(int), _typed(bool), _typed(dict)


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _interval(value: Any) -> tuple[float, float]:
    low, high = value
    return _number(low), _number(high)


POINT: Fields = {
    "stage": text,
    "stage_index": whole,
    "step": whole,
    "images": whole,
    "guidance": _number,
    "interval": _interval,
    "protocol": text,
    "metrics": lambda value: {name: _number(number) for name, number in mapping(value).items()},
    "val_loss": lambda value: [_number(number) for number in value],
    "seconds": _number,
    "flops": _number,
}
STAGE: Fields = {
    "name": text,
    "index": whole,
    "steps": whole,
    "images": whole,
    "seconds": _number,
    "warmup_seconds": _number,
    "flops_student": _number,
    "flops_heads": _number,
    "flops_teachers": _number,
    "fingerprint": text,
    "sha256": mapping,
    "reused": flag,
}
BACKBONE: Fields = {"name": text, "size": text, "options": mapping, "effective": mapping}
SPEC: Fields = {
    "run_id": text,
    "dataset": text,
    "backbone": mapping,
    "objective": text,
    "recipe": mapping,
    "train": mapping,
    "eval": mapping,
    "seed": whole,
    "stage_count": whole,
    "setting_hash": text,
    "train_hash": text,
    "plugins": mapping,
}
