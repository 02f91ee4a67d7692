"""The fields of a run folder's files, from records to JSON and back, strictly. It opens no file.

Floats are written by repr and read back bit for bit. JSON has no word for the others, so they are written
as the strings "nan", "inf" and "-inf", which float() reads. Every error is one line naming place and field.
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
"""Name of a field -> what checks and converts its JSON value."""

REMEDY = "restore the file, or delete the folder and repeat its `stbench run`"


def plain(value: Any) -> Any:
    """The same value in JSON's own types, with "nan", "inf" and "-inf" for the floats that JSON lacks."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def parse(data: bytes, where: Path | str) -> dict[str, Any]:
    """One JSON object of our schema, its version taken off."""
    try:
        content = json.loads(data)
    except ValueError:
        raise UserError(f"{where} is not whole JSON (cut off or damaged); {REMEDY}") from None
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f"{where} lacks 'schema'; {REMEDY}")
    if (found := content.pop("schema")) != SCHEMA:
        raise UserError(
            f"{where} has schema {found!r}, this stbench reads {SCHEMA}; install the stbench that wrote it"
        )
    return content


def convert(row: Mapping[str, Any], fields: Fields, where: Path | str) -> dict[str, Any]:
    """The named fields of `row`, each converted; UserError for one that is missing or of another type."""
    values = {}
    for name, converter in fields.items():
        if name not in row:
            raise UserError(f"{where} lacks '{name}'; {REMEDY}")
        try:
            values[name] = converter(row[name])
        except (TypeError, ValueError):
            raise UserError(
                f"{where} has {name} = {row[name]!r}, which is no valid value; {REMEDY}"
            ) from None
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
