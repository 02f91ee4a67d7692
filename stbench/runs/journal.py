"""The journal of a sweep: which runs were asked for and how each of them stands. `sweep.json`, beside the run
folders. No torch.

`stbench sweep` writes it; `compare` reads it, so that a run that is missing or failed is a visible row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.runs import schema
from stbench.runs.records import SCHEMA, RunRecord, row_label

FILE = "sweep.json"
State = Literal["waiting", "running", "failed", "finished"]


@dataclass(frozen=True)
class Entry:
    """One run that a sweep was asked for."""

    run_id: str
    """Name of its run folder."""
    dataset: str
    backbone: str
    """Family and size, such as "sit-ti/2"."""
    objective: str
    recipe: str
    options: Mapping[str, Any]
    """The recipe's options that were set."""
    seed: int
    steps: int
    """Steps of the last stage."""
    setting_hash: str
    row_hash: str
    state: State = "waiting"
    error: str = ""
    """One line, for a run that failed."""

    @property
    def label(self) -> str:
        """What its leaderboard row is called."""
        return row_label(self.recipe, self.options)


def write_journal(root: Path, entries: Iterable[Entry]) -> None:
    """Replace the journal of the run folders in `root`."""
    rows = [schema.plain(asdict(entry)) for entry in entries]
    content = json.dumps({"schema": SCHEMA, "runs": rows}, indent=1)
    atomic_write(root / FILE, f"{content}\n")


def read_journal(root: Path) -> list[Entry]:
    """The entries of `root`'s journal, in the order asked for; none where there is no journal.

    Raises UserError for a damaged one.
    """
    path = root / FILE
    if not path.exists():
        return []
    rows = schema.parse(path.read_bytes(), path).get("runs")
    if not isinstance(rows, list):
        raise UserError(f"{path} lacks 'runs'; {schema.REMEDY}")
    return [Entry(**schema.convert(row, _FIELDS, path)) for row in rows]


def merge_journals(known: Iterable[Entry], asked: Iterable[Entry]) -> list[Entry]:
    """Everything either names, each run once, in order; `asked` replaces what it names again."""
    runs = {entry.run_id: entry for entry in (*known, *asked)}
    return list(runs.values())


def settled(entries: Iterable[Entry], records: Iterable[RunRecord]) -> list[Entry]:
    """The entries as the run folders tell: what finished counts as finished, whatever the journal says."""
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
