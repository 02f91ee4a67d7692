"""What was asked for and is in no figure: runs that wait, run, stopped or failed. Knows no results.

Two sources: the run folders themselves, and the journal that `stbench sweep` keeps beside them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from stbench.compare.leaderboard import Absent
from stbench.runs.journal import JournalEntry, reconcile
from stbench.runs.records import CurvePoint, RunRecord

RowKey = Hashable
"""What the seeds of a row have in common."""


@dataclass(frozen=True)
class Claim:
    """One run that counts for a row and has no figures."""

    setting: str
    row: RowKey
    label: str
    steps: int
    seed: int
    state: str
    """Short, such as "waiting" or "failed: loss is nan at step 3"."""
    note: str
    """One whole line."""

    @property
    def failed(self) -> bool:
        """Whether an error ended it."""
        return self.state.startswith("failed")


Claims = Mapping[RowKey, Mapping[int, Claim]]
"""Row -> seed -> claim."""


def claims(records: Sequence[RunRecord], entries: Iterable[JournalEntry] = ()) -> Claims:
    """All unfinished runs, by row and seed; the folder says where a run stands, the journal why it failed."""
    found: dict[RowKey, dict[int, Claim]] = {}
    for record in records:
        if record.status != "finished":
            found.setdefault(row_key(record), {})[record.seed] = _of_record(record)
    here = {record.run_id for record in records if record.status == "finished"}
    for entry in reconcile(entries, records):
        if entry.state == "finished" and entry.run_id in here:
            continue
        row = found.setdefault((entry.setting_hash, entry.row_hash), {})
        row[entry.seed] = _both(row.get(entry.seed), entry)
    return found


def absent(claimed: Claims, setting: str, present: Iterable[RowKey]) -> list[Absent]:
    """The rows of a setting that no finished run stands for, by name."""
    rows = {key: seeds for key, seeds in claimed.items() if key not in set(present)}
    mine = [list(seeds.values()) for seeds in rows.values()]
    found = [_absent(row) for row in mine if row[0].setting == setting]
    return sorted(found, key=lambda row: (row.recipe, row.length))


def row_key(record: RunRecord) -> RowKey:
    """Its setting, and its row hash or, without one, the fields that it would be made of."""
    options = tuple(sorted((name, repr(value)) for name, value in record.options.items()))
    plain = (record.backbone, record.objective, record.recipe, options, record.steps, record.precision)
    return record.setting_hash, record.spec.get("row_hash", plain)


def final_points(record: RunRecord) -> list[CurvePoint]:
    """The evaluations of the network that a run is about."""
    return [point for point in record.curve if point.stage_index == record.final_stage]


def state(record: RunRecord) -> str:
    """What a run that is in no figure is doing, and where."""
    points = final_points(record)
    reached = f"at step {points[-1].step} of {record.steps}" if points else "before its first evaluation"
    return f"{record.label} seed {record.seed}: {_word(record)} {reached}; not in the figures ({record.path})"


def _word(record: RunRecord) -> str:
    return "running (or killed)" if record.status == "running" else record.status


def _of_record(record: RunRecord) -> Claim:
    return Claim(
        setting=record.setting_hash,
        row=row_key(record),
        label=record.label,
        steps=record.steps,
        seed=record.seed,
        state=_word(record),
        note=state(record),
    )


def _both(folder: Claim | None, entry: JournalEntry) -> Claim:
    """The journal's word on a run; a folder that says more keeps its own, and takes the error from it."""
    error = " ".join(entry.error.split())
    words = {
        "failed": f"failed: {error or 'no error recorded'}",
        "finished": "finished, but its folder is gone",
    }
    word = words.get(entry.state, entry.state)
    if folder and entry.state == "failed":
        return replace(folder, state=word, note=f"{folder.note}: {error}" if error else folder.note)
    return folder or Claim(
        setting=entry.setting_hash,
        row=(entry.setting_hash, entry.row_hash),
        label=entry.label,
        steps=entry.steps,
        seed=entry.seed,
        state=word,
        note=f"{entry.label} seed {entry.seed}: {word}; asked for, not in the figures ({entry.run_id})",
    )


def _absent(row: Sequence[Claim]) -> Absent:
    states: dict[str, list[int]] = {}
    for claim in sorted(row, key=lambda claim: claim.seed):
        states.setdefault(claim.state, []).append(claim.seed)
    words = list(states) if len(states) == 1 else [f"{word} ({_seeds(s)})" for word, s in states.items()]
    seeds = tuple(sorted(claim.seed for claim in row))
    short = dict.fromkeys(state.partition(":")[0] for state in states)
    return Absent(row[0].label, row[0].steps, seeds, "; ".join(words), ", ".join(short))


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {' '.join(map(str, seeds))}"
