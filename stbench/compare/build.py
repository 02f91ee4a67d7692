"""Build a leaderboard from run records, without torch and without opening files.

One table per (setting, evaluation protocol), one row per set of runs that differ only in their seed. No run
is dropped silently: a run without results gets a note. docs/protocol.md defines the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from stbench.compare.at_budget import find_budget_points
from stbench.compare.budgets import choose_budgets
from stbench.compare.leaderboard import Leaderboard, MeanPoint, Row, RowAtBudget, Table
from stbench.compare.rows import RowRuns, choose_baseline, collect_rows
from stbench.compare.stats import nan_last, seed_stats
from stbench.compare.unfinished import UnfinishedRuns, find_unfinished, unfinished_notes, unfinished_rows
from stbench.compare.verdicts import compare_with_baseline, unpaired_notes
from stbench.runs.journal import JournalEntry
from stbench.runs.records import RunRecord


def build_leaderboard(records: Iterable[RunRecord], entries: Iterable[JournalEntry] = ()) -> Leaderboard:
    """Build the leaderboard of `records`, and of the requested runs in the journal `entries`.

    Raises:
        UserError: A last-stage evaluation without guidance has no FID.
    """
    # A fixed order, whatever the order of the records
    records = sorted(records, key=lambda r: (r.dataset, r.backbone, r.setting_hash, r.path))
    entries = list(entries)
    unfinished = find_unfinished(records, entries)

    # A table for each setting and protocol of the finished runs
    finished = [record for record in records if record.status == "finished"]
    keys = dict.fromkeys((r.setting_hash, point.protocol) for r in finished for point in r.final_points)
    tables = [
        _build_table(records, unfinished, setting=setting, protocol=protocol) for setting, protocol in keys
    ]

    # A table of states for each setting of the journal without a finished run
    settings = {setting for setting, _ in keys}
    first_entries: dict[str, JournalEntry] = {}
    for entry in entries:
        if entry.setting_hash not in settings:
            first_entries.setdefault(entry.setting_hash, entry)
    tables += [_build_unfinished_table(entry, records, unfinished) for entry in first_entries.values()]

    # Notes on the unfinished runs of all other settings
    shown = settings | first_entries.keys()
    other_runs = [run for runs in unfinished.values() for run in runs.values() if run.setting not in shown]
    return Leaderboard(tuple(tables), tuple(run.note for run in other_runs))


def _build_table(
    records: Sequence[RunRecord], unfinished: UnfinishedRuns, *, setting: str, protocol: str
) -> Table:
    """Build the table of one setting under one protocol."""
    records = [record for record in records if record.setting_hash == setting]
    first = next(record for record in records if protocol in {point.protocol for point in record.curve})

    # Rows, the finished and the unfinished ones
    rows, row_notes = collect_rows(records, unfinished, protocol)
    missing_rows = unfinished_rows(unfinished, setting, {row.first.row_key for row in rows})
    baseline, baseline_notes = choose_baseline(rows)

    # Budgets
    budgets, budget_notes = choose_budgets(rows, baseline)

    # Values and verdicts at the student-only budget
    points, student_notes = find_budget_points(rows, lambda row: budgets.student, first.batch)
    student = compare_with_baseline(points, baseline)

    # Values and verdicts at the everything-paid budget; the same if no row has an earlier stage
    paid = student
    paid_notes: list[str] = []
    if budgets.paid != budgets.student:
        points, paid_notes = find_budget_points(
            rows, lambda row: budgets.paid - row.earlier_images, first.batch
        )
        paid = compare_with_baseline(points, baseline)

    # Table
    compared = [_row(runs, *at_budgets) for runs, *at_budgets in zip(rows, student, paid, strict=True)]
    return Table(
        setting=setting,
        protocol=protocol,
        dataset=first.dataset,
        backbone=first.backbone,
        objective=first.objective,
        batch=first.batch,
        precision=first.precision,
        protocol_fields=first.protocols.get(protocol, {}),
        student_images=budgets.student,
        paid_images=budgets.paid,
        rows=tuple(sorted(compared, key=_rank)),
        absent=tuple(missing_rows),
        notes=(
            *unfinished_notes(unfinished, setting),
            *row_notes,
            *baseline_notes,
            *budget_notes,
            *(f"student only: {note}" for note in student_notes),
            *(f"everything paid: {note}" for note in paid_notes),
            *unpaired_notes(rows, baseline),
        ),
    )


def _build_unfinished_table(
    entry: JournalEntry, records: Sequence[RunRecord], unfinished: UnfinishedRuns
) -> Table:
    """Build the table of a setting that a journal names and of which no run is finished."""
    record = next((record for record in records if record.setting_hash == entry.setting_hash), None)
    return Table(
        setting=entry.setting_hash,
        protocol="",
        dataset=entry.dataset,
        backbone=entry.backbone,
        objective=entry.objective,
        batch=record.batch if record else None,
        precision=record.precision if record else None,
        protocol_fields={},
        student_images=0,
        paid_images=0,
        rows=(),
        absent=tuple(unfinished_rows(unfinished, entry.setting_hash, ())),
        notes=tuple(unfinished_notes(unfinished, entry.setting_hash)),
    )


def _row(runs: RowRuns, student: RowAtBudget, paid: RowAtBudget) -> Row:
    return Row(
        recipe=runs.label,
        length=runs.first.steps,
        backbone=runs.first.backbone,
        objective=runs.first.objective,
        needs=runs.first.needs,
        seeds=tuple(runs.runs),
        unfinished=tuple(run.seed for run in runs.unfinished),
        earlier_images=runs.earlier_images,
        student=student,
        paid=paid,
        curve=tuple(
            MeanPoint(images, seed_stats(list(runs.fid(step).values())))
            for images, step in runs.step_at_images.items()
        ),
        paths=tuple(run.path for run in runs.runs.values()),
    )


def _rank(row: Row) -> tuple[object, ...]:
    """Sort key of the rows of a table: the baseline, then by FID at the student-only budget."""
    fid = row.student.fid
    mean_fid = nan_last(fid.mean if fid else math.nan)
    return row.student.plain.verdict != "baseline", mean_fid, row.recipe, row.length
