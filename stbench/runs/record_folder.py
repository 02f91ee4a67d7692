"""A folder of sealed records: reads and writes its JSON and JSONL files, bound to the folder's spec.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.runs.records import SCHEMA, CurvePoint, StageRecord
from stbench.runs.schema import OPTIONAL_POINT, REMEDY, Fields, convert
from stbench.runs.sealed import Binding, parse, seal, unseal

Record = TypeVar("Record")


class RecordFolder:
    """The JSON files of a run folder. Every write is atomic; every read verifies checksums."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._binding: Binding | None = None

    @property
    def binding(self) -> Binding:
        """Identity and schema of the folder's records, which spec.json states."""
        if self._binding is None:
            if not self.exists():
                return Binding()
            self.read_spec()
        assert self._binding is not None
        return self._binding

    def exists(self) -> bool:
        """Whether a run was created here."""
        return (self.path / "spec.json").exists()

    def read_spec(self) -> dict[str, Any]:
        """Read spec.json, which states identity and schema of the folder; checks no other field."""
        path = self.path / "spec.json"
        record = self._parse("spec.json")
        found = Binding(str(record.get("identity", "")), record["schema"])
        if found.schema < SCHEMA and "identity" in record:
            raise UserError(
                f"{path} is damaged: schema {found.schema} has no field 'identity', expected schema {SCHEMA}"
                f"; {REMEDY}"
            )
        content = unseal(record, found, "spec.json", path)
        content.pop("identity", None)
        self._binding = found
        return content

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Replace a JSON file."""
        record = seal(content, self.binding, name)
        text = json.dumps(record, indent=1, allow_nan=False)
        atomic_write(self.path / name, text + "\n")

    def write_lines(self, name: str, records: Sequence[CurvePoint | StageRecord]) -> None:
        """Replace a file of one JSON object per line; nothing is written without records."""
        rows = [
            seal(_fields(record), self.binding, f"{name}:{number}")
            for number, record in enumerate(records, start=1)
        ]
        lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        if lines:
            atomic_write(self.path / name, "".join(lines))

    def _parse(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return parse(path.read_bytes(), path)
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}); {REMEDY}") from None

    def read(self, name: str) -> dict[str, Any]:
        """Read a JSON file.

        Raises:
            UserError: If it is missing, damaged, or of another folder.
        """
        return unseal(self._parse(name), self.binding, name, self.path / name)

    def read_lines(
        self, name: str, cls: Callable[..., Record], fields: Fields, optional: Fields = MappingProxyType({})
    ) -> list[Record]:
        """Read a file of one JSON object per line; [] if it is missing. A line may lack `optional` fields.

        Raises:
            UserError: If a line is cut off, damaged or of another folder, or if a field has another type.
        """
        path = self.path / name
        if not path.exists():
            return []
        *lines, rest = path.read_bytes().split(b"\n")
        if rest or not lines:
            raise UserError(f"{path} line {len(lines) + 1} is cut off; {REMEDY}")
        rows = []
        for number, line in enumerate(lines, start=1):
            where = f"{path} line {number}"
            row = unseal(parse(line, where), self.binding, f"{name}:{number}", where, line=line)
            if unknown := sorted(row.keys() - fields.keys() - optional.keys()):
                raise UserError(f"{where} has an unknown field {unknown[0]!r}; {REMEDY}")
            present = {name: check for name, check in optional.items() if name in row}
            rows.append(cls(**convert(row, {**fields, **present}, where)))
        return rows


def _fields(record: CurvePoint | StageRecord) -> dict[str, Any]:
    """Return the fields of a record, without empty optional ones."""
    return {name: value for name, value in asdict(record).items() if value or name not in OPTIONAL_POINT}
