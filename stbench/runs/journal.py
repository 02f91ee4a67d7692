"""The journal of a sweep: `sweep.json`, next to the run folders, lists every requested run and its state.

`stbench sweep` writes the journal. `compare` reads it to show waiting and failed runs. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.runs import schema
from stbench.runs.records import RunRecord, row_label
from stbench.runs.sealed import Binding, parse, seal, unseal

JOURNAL_FILE = "sweep.json"
REMEDY = "restore the file, or delete it and rerun `stbench sweep`, which keeps finished runs"
State = Literal["waiting", "running", "failed", "finished"]


@dataclass(frozen=True)
class JournalEntry:
    """One requested run and its state."""

    run_id: str
    """Name of its run folder."""
    dataset: str
    backbone: str
    """Family and size, such as "sit-ti/2"."""
    objective: str
    recipe: str
    options: Mapping[str, Any]
    """The recipe options that the user set; defaults are omitted."""
    seed: int
    steps: int
    """Steps of the last stage."""
    setting_hash: str
    row_hash: str
    state: State = "waiting"
    error: str = ""
    """One-line error message of a failed run, else ""."""

    @property
    def row_key(self) -> Hashable:
        """Identifies the leaderboard row, as `RunRecord.row_key` does."""
        return self.setting_hash, self.row_hash

    @property
    def label(self) -> str:
        """Name of the leaderboard row that the run belongs to."""
        return row_label(self.recipe, self.options)


def write_journal(root: Path, entries: Iterable[JournalEntry]) -> None:
    """Write the journal of the run folders in `root`, replacing an existing one."""
    record = seal({"runs": [asdict(entry) for entry in entries]}, Binding(), JOURNAL_FILE)
    atomic_write(root / JOURNAL_FILE, f"{json.dumps(record, indent=1)}\n")


def read_journal(root: Path) -> list[JournalEntry]:
    """Return the entries of the journal in `root` in the order of their requests; [] without a journal.

    Raises:
        UserError: The journal is damaged.
    """
    path = root / JOURNAL_FILE
    if not path.exists():
        return []
    record = parse(path.read_bytes(), path, remedy=REMEDY)
    content = unseal(record, Binding(schema=record["schema"]), JOURNAL_FILE, path, remedy=REMEDY)
    rows = content.get("runs")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path} has no valid field 'runs'; {REMEDY}")
    return [JournalEntry(**schema.convert(row, _FIELDS, path)) for row in rows]


def merge_journals(known: Iterable[JournalEntry], requested: Iterable[JournalEntry]) -> list[JournalEntry]:
    """Merge two journals by run id; an entry of `requested` replaces the known one in place."""
    runs = {entry.run_id: entry for entry in (*known, *requested)}
    return list(runs.values())


def reconcile(entries: Iterable[JournalEntry], records: Iterable[RunRecord]) -> list[JournalEntry]:
    """Mark entries as finished if their run folder is finished with at least the requested steps.

    The run folder takes precedence: a run may have been repeated by hand after the sweep recorded a failure.
    """
    done = {record.run_id: record.steps for record in records if record.status == "finished"}
    return [
        replace(entry, state="finished", error="") if done.get(entry.run_id, 0) >= entry.steps else entry
        for entry in entries
    ]


def _state(value: Any) -> Any:
    if value not in get_args(State):
        raise ValueError(value)
    return value


_FIELDS: schema.Fields = {
    **dict.fromkeys(
        ("run_id", "dataset", "backbone", "objective", "recipe", "setting_hash", "row_hash", "error"),
        schema.text,
    ),
    "options": schema.mapping,
    "seed": schema.whole,
    "steps": schema.whole,
    "state": _state,
}
