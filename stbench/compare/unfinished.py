"""Requested runs without results: waiting, running, stopped or failed.

There are two sources: the run folders, and the journal that `stbench sweep` writes next to them.
"""

from __future__ import annotations

from collections.abc import Container, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from stbench.compare.leaderboard import UnfinishedRow
from stbench.runs.journal import JournalEntry, reconcile
from stbench.runs.records import RunRecord


@dataclass(frozen=True)
class UnfinishedRun:
    """One requested run that has no results."""

    setting: str
    """Setting hash."""
    label: str
    """Name of its row."""
    steps: int
    """Requested steps of the last stage."""
    seed: int
    state: str
    """Short, such as "waiting" or "failed: loss is nan at step 3"."""
    note: str
    """One sentence for the notes of a table."""

    @property
    def failed(self) -> bool:
        """Whether the run ended in an error."""
        return self.state.startswith("failed")


UnfinishedRuns = Mapping[Hashable, Mapping[int, UnfinishedRun]]
"""Row key -> seed -> run."""


def find_unfinished(records: Sequence[RunRecord], entries: Iterable[JournalEntry] = ()) -> UnfinishedRuns:
    """Collect the unfinished runs of the run folders and of a journal.

    If both know a run, the folder gives its progress and the journal its error.
    """
    found: dict[Hashable, dict[int, UnfinishedRun]] = {}

    # Run folders
    for record in records:
        if record.status != "finished":
            found.setdefault(record.row_key, {})[record.seed] = _from_folder(record)

    # Journal
    finished = {record.run_id for record in records if record.status == "finished"}
    for entry in reconcile(entries, records):
        if entry.state == "finished" and entry.run_id in finished:
            continue
        row = found.setdefault(entry.row_key, {})
        row[entry.seed] = _from_journal(entry, row.get(entry.seed))
    return found


def unfinished_rows(
    unfinished: UnfinishedRuns, setting: str, finished: Container[Hashable]
) -> list[UnfinishedRow]:
    """Return the rows of a setting whose keys are not in `finished`, sorted by name and length."""
    rows = [
        _unfinished_row(list(runs.values()))
        for key, runs in unfinished.items()
        if key not in finished and next(iter(runs.values())).setting == setting
    ]
    return sorted(rows, key=lambda row: (row.recipe, row.length))


def unfinished_notes(unfinished: UnfinishedRuns, setting: str) -> list[str]:
    """Return a note for every unfinished run of a setting."""
    return [
        runs[seed].note
        for runs in unfinished.values()
        for seed in sorted(runs)
        if runs[seed].setting == setting
    ]


def _from_folder(record: RunRecord) -> UnfinishedRun:
    # A killed process cannot update its status, so "running" may be out of date.
    state = "running (or killed)" if record.status == "running" else record.status
    points = record.final_points
    progress = f"at step {points[-1].step} of {record.steps}" if points else "before its first evaluation"
    name = f"{record.label} seed {record.seed}"
    return UnfinishedRun(
        setting=record.setting_hash,
        label=record.label,
        steps=record.steps,
        seed=record.seed,
        state=state,
        note=f"{name}: {state} {progress}; not included in the results ({record.path})",
    )


def _from_journal(entry: JournalEntry, folder: UnfinishedRun | None) -> UnfinishedRun:
    """Return the run of a journal entry, or of its run `folder` with the error from the journal."""
    error = " ".join(entry.error.split())
    state = _state(entry, error)
    if folder and entry.state == "failed":
        return replace(folder, state=state, note=f"{folder.note}: {error}" if error else folder.note)
    return folder or UnfinishedRun(
        setting=entry.setting_hash,
        label=entry.label,
        steps=entry.steps,
        seed=entry.seed,
        state=state,
        note=f"{entry.label} seed {entry.seed}: {state}; not included in the results ({entry.run_id})",
    )


def _state(entry: JournalEntry, error: str) -> str:
    if entry.state == "failed":
        return f"failed: {error or 'no error recorded'}"
    return "finished, but its folder is gone" if entry.state == "finished" else entry.state


def _unfinished_row(runs: Sequence[UnfinishedRun]) -> UnfinishedRow:
    ordered = sorted(runs, key=lambda run: run.seed)
    seeds_by_state: dict[str, list[int]] = {}
    for run in ordered:
        seeds_by_state.setdefault(run.state, []).append(run.seed)
    states = [
        state if len(seeds_by_state) == 1 else f"{state} ({_seed_list(seeds)})"
        for state, seeds in seeds_by_state.items()
    ]
    without_errors = dict.fromkeys(state.partition(":")[0] for state in seeds_by_state)
    return UnfinishedRow(
        recipe=runs[0].label,
        length=runs[0].steps,
        seeds=tuple(run.seed for run in ordered),
        state="; ".join(states),
        word=", ".join(without_errors),
    )


def _seed_list(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {' '.join(map(str, seeds))}"
