"""Records with a checksum: JSON objects that are bound to the run folder and the place they were written for.

The checksum covers the content of a record, the identity of its folder and its place in it (file name and
line). A damaged record is therefore detected, and so is a valid one that was copied from another run, file or
line. White space may change. Opens no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stbench.core.errors import UserError
from stbench.core.safe_load import MAX_DEPTH, parse_json
from stbench.runs.records import READABLE, SCHEMA
from stbench.runs.schema import REMEDY, plain

CHECKSUM = "checksum"
"""Field with the checksum of the other fields."""
DIGITS = 16
"""Hexadecimal digits of a checksum."""


@dataclass(frozen=True)
class Binding:
    """What binds the records of a folder to it."""

    identity: str = ""
    """Random name of the folder, drawn when it is created."""
    schema: int = SCHEMA
    """Version of all files in the folder."""


def parse(data: bytes, where: Path | str, *, remedy: str = REMEDY) -> dict[str, Any]:
    """Parse a JSON object of a readable schema, without verifying its checksum.

    Raises:
        UserError: If the data are not a JSON object, or have another schema.
    """
    try:
        content = parse_json(data) if _is_unusual(data) else json.loads(data)
    except ValueError as error:  # MalformedError is one
        raise UserError(f"{where} is not complete JSON (cut off or damaged): {error}; {remedy}") from None
    if not isinstance(content, dict) or "schema" not in content:
        raise UserError(f"{where} has no field 'schema'; {remedy}")
    found = content["schema"]
    if type(found) is int and found in READABLE:
        return content
    readable = " and ".join(map(str, READABLE))
    if found == 1:
        raise UserError(
            f"{where} has schema 1, but this version reads schema {readable}; convert the folder that "
            f"contains the run folders with `python scripts/migrate_records.py FOLDER`"
        )
    raise UserError(
        f"{where} has schema {str(found)[:20]!r}, but this version reads schema {readable}; "
        f"use the version of stbench that wrote it"
    )


def seal(content: Mapping[str, Any], binding: Binding, place: str) -> dict[str, Any]:
    """Return a record as JSON values, with its schema and, except in schema 2, its checksum.

    Args:
        content: The fields of the record.
        binding: Identity and schema of the folder.
        place: The file in the folder, and the line in a file of lines: "curve.jsonl:3".
    """
    record: dict[str, Any] = plain({"schema": binding.schema, **content})
    if binding.schema < SCHEMA:
        return record
    return {**record, CHECKSUM: _checksum(json.dumps(record), binding, place)}


def unseal(
    record: Mapping[str, Any],
    binding: Binding,
    place: str,
    where: Path | str,
    *,
    line: bytes = b"",
    remedy: str = REMEDY,
) -> dict[str, Any]:
    """Verify the checksum of a parsed record; returns its fields without schema and checksum.

    Args:
        record: What `parse` returned.
        binding: Identity and schema of the folder.
        place: As for `seal`.
        where: File and line, for messages.
        line: What was parsed, if it is a line of its own; makes the check faster.
        remedy: End of the messages.

    Raises:
        UserError: If the record is damaged, or was written for another place or folder.
    """
    fields = dict(record)
    if fields["schema"] != binding.schema:
        raise UserError(
            f"{where} is damaged: expected schema {binding.schema} as in the other files of its folder, "
            f"found {fields['schema']}; {remedy}"
        )
    found = fields.pop(CHECKSUM, None)
    if binding.schema < SCHEMA:
        if found is not None:
            raise UserError(
                f"{where} is damaged: schema {binding.schema} has no field '{CHECKSUM}', expected schema "
                f"{SCHEMA}; {remedy}"
            )
    elif found is None:
        raise UserError(f"{where} is damaged: it has no field '{CHECKSUM}'; {remedy}")
    elif found != _checksum(_as_written(line), binding, place):
        expected = _checksum(json.dumps(fields), binding, place)
        if found != expected:
            raise UserError(
                f"{where} is damaged or belongs to another run: its checksum is {str(found)[:DIGITS]!r}, but "
                f"its content has {expected!r}; {remedy}"
            )
    del fields["schema"]
    return fields


def _is_unusual(data: bytes) -> bool:
    """Whether a text needs the checks of `parse_json`, which take longer than everything else in `compare`.

    These are escapes, characters outside ASCII, constants that are not JSON, and deep nesting.
    """
    special = not data.isascii() or b"\\" in data or b"NaN" in data or b"Infinity" in data
    return special or data.count(b"[") + data.count(b"{") > MAX_DEPTH


def _checksum(content: str, binding: Binding, place: str) -> str:
    """The checksum of a record without its checksum: of its fields in their order, on one line, in ASCII."""
    return hashlib.sha256(f"{binding.identity}\n{place}\n{content}".encode()).hexdigest()[:DIGITS]


def _as_written(line: bytes) -> str:
    """What the checksum of a line covers if its format has not changed; formatting it again takes longer."""
    start, found, end = line.rpartition(b', "checksum": "')
    written = found and len(end) == DIGITS + 2 and end.endswith(b'"}') and start.isascii()
    return start.decode() + "}" if written else ""
