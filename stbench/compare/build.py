"""Build a leaderboard from run records, without torch and without opening files.

One table per (setting, evaluation protocol), one row per set of runs that differ only in their seed. No run
is dropped silently: a run without results gets a note. docs/protocol.md defines the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from stbench.compare.at_budget import find_budget_points
from stbench.compare.budgets import choose_budgets
from stbench.compare.leaderboard import Leaderboard, MeanPoint, Row, RowAtBudget, Table
from stbench.compare.question import QUESTION, Question
from stbench.compare.ranks import mean_ranks
from stbench.compare.rows import RowRuns, choose_baseline, collect_rows
from stbench.compare.stats import SeedStats, curve_mean, nan_last, seed_stats
from stbench.compare.unfinished import UnfinishedRuns, find_unfinished, unfinished_notes, unfinished_rows
from stbench.compare.verdicts import compare_with_baseline, unpaired_notes
from stbench.core.errors import UserError
from stbench.core.text import visible
from stbench.runs.journal import JournalEntry
from stbench.runs.records import RunRecord


def build_leaderboard(
    records: Iterable[RunRecord], entries: Iterable[JournalEntry] = (), question: Question = QUESTION
) -> Leaderboard:
    """Build the leaderboard of `records`, and of the requested runs in the journal `entries`.

    Raises:
        UserError: A last-stage evaluation without guidance has no FID, or no run has the asked metric.
    """
    # A fixed order, whatever the order of the records
    records = sorted(records, key=lambda r: (r.dataset, r.backbone, r.setting_hash, r.path))
    entries = list(entries)
    unfinished = find_unfinished(records, entries)

    # A table for each setting and protocol of the finished runs
    finished = [record for record in records if record.status == "finished"]
    _require_metric(finished, question.metric)
    evaluations = dict.fromkeys(
        (record.setting_hash, point.protocol, question.metric == "fid" or question.metric in point.metrics)
        for record in finished
        for point in record.final_points
    )
    keys = [(setting, protocol) for setting, protocol, measured in evaluations if measured]
    tables = [
        _build_table(records, unfinished, question, setting=setting, protocol=protocol)
        for setting, protocol in keys
    ]

    # A table of states for each setting of the journal without a finished run
    settings = {record.setting_hash for record in finished}
    first_entries: dict[str, JournalEntry] = {}
    for entry in entries:
        if entry.setting_hash not in settings:
            first_entries.setdefault(entry.setting_hash, entry)
    tables += [
        _build_unfinished_table(entry, records, unfinished, question) for entry in first_entries.values()
    ]

    # Notes on the unfinished runs of all other settings
    shown = settings | first_entries.keys()
    other_runs = [run for runs in unfinished.values() for run in runs.values() if run.setting not in shown]
    unmeasured = settings - {setting for setting, _ in keys}
    notes = [
        f"setting {setting}: no evaluation with metric {question.metric}" for setting in sorted(unmeasured)
    ]
    notes += [run.note for run in other_runs]
    return Leaderboard(tuple(tables), tuple(notes), mean_ranks(tables, question))


def _build_table(
    records: Sequence[RunRecord],
    unfinished: UnfinishedRuns,
    question: Question,
    *,
    setting: str,
    protocol: str,
) -> Table:
    """Build the table of one setting under one protocol."""
    records = [record for record in records if record.setting_hash == setting]
    first = next(record for record in records if protocol in {point.protocol for point in record.curve})

    # Rows, the finished and the unfinished ones
    rows, row_notes = collect_rows(records, unfinished, protocol, question)
    missing_rows = unfinished_rows(unfinished, setting, {row.first.row_key for row in rows})
    baseline, baseline_notes = choose_baseline(rows, question)
    own_rows = [row for row in rows if not row.network]

    # Budgets
    budgets, budget_notes = choose_budgets(own_rows, baseline, question.at)

    # Values and verdicts at the student-only budget
    points, student_notes = find_budget_points(
        rows, partial(budgets.images_of, all_stages=False), first.batch
    )
    student = compare_with_baseline(points, baseline)

    # Values and verdicts at the everything-paid budget; the same if no row has an earlier stage
    paid = student
    paid_notes: list[str] = []
    if budgets.paid != budgets.student or (budgets.cost and any(row.earlier_images for row in rows)):
        points, paid_notes = find_budget_points(
            rows, partial(budgets.images_of, all_stages=True), first.batch
        )
        paid = compare_with_baseline(points, baseline)

    # Table
    start = max((min(row.step_at_images) for row in rows), default=0)
    areas = [_area(row, start, budgets.student) for row in rows]
    compared = [_row(*parts) for parts in zip(rows, student, paid, areas, strict=True)]
    return Table(
        metric=question.metric,
        baseline=baseline.label if baseline else question.baseline,
        target=question.target,
        at=budgets.cost,
        setting=setting,
        protocol=protocol,
        dataset=first.dataset,
        backbone=first.backbone,
        objective=first.objective,
        batch=first.batch,
        precision=first.precision,
        training=_training(first),
        protocol_fields=first.protocols.get(protocol, {}),
        student_images=budgets.student,
        paid_images=budgets.paid,
        area_start=start,
        rows=tuple(sorted(compared, key=lambda row: _rank(row, question))),
        absent=tuple(missing_rows),
        notes=(
            *unfinished_notes(unfinished, setting),
            *row_notes,
            *baseline_notes,
            *budget_notes,
            *(f"student only: {note}" for note in student_notes),
            *(f"everything paid: {note}" for note in paid_notes),
            *unpaired_notes(own_rows, baseline),
        ),
    )


def _build_unfinished_table(
    entry: JournalEntry, records: Sequence[RunRecord], unfinished: UnfinishedRuns, question: Question
) -> Table:
    """Build the table of a setting that a journal names and of which no run is finished."""
    record = next((record for record in records if record.setting_hash == entry.setting_hash), None)
    return Table(
        metric=question.metric,
        baseline=question.baseline,
        target=question.target,
        at=None,
        setting=entry.setting_hash,
        protocol="",
        dataset=entry.dataset,
        backbone=entry.backbone,
        objective=entry.objective,
        batch=record.batch if record else None,
        precision=record.precision if record else None,
        training=_training(record) if record else {},
        protocol_fields={},
        student_images=0,
        paid_images=0,
        area_start=0,
        rows=(),
        absent=tuple(unfinished_rows(unfinished, entry.setting_hash, ())),
        notes=tuple(unfinished_notes(unfinished, entry.setting_hash)),
    )


def _row(runs: RowRuns, student: RowAtBudget, paid: RowAtBudget, area: SeedStats | None) -> Row:
    return Row(
        recipe=runs.label,
        options=dict(runs.first.options),
        length=runs.first.steps,
        backbone=runs.first.backbone,
        objective=runs.first.objective,
        needs=runs.needs,
        seeds=tuple(runs.runs),
        unfinished=tuple(run.seed for run in runs.unfinished),
        earlier_images=runs.earlier_images,
        student=student,
        paid=paid,
        area=area,
        curve=tuple(
            MeanPoint(images, seed_stats(list(runs.values_at(step).values())))
            for images, step in runs.step_at_images.items()
            if not runs.network
        ),
        paths=tuple(run.path for run in runs.runs.values()),
    )


def _area(row: RowRuns, start: int, end: int) -> SeedStats | None:
    """Return the geometric mean of the metric of every seed between two numbers of images."""
    means = [curve_mean(*row.curve(seed), start, end) for seed in row.runs if not row.network]
    known = [value for value in means if value is not None]
    return seed_stats(known) if known and len(known) == len(means) else None


def _rank(row: Row, question: Question) -> tuple[object, ...]:
    """Sort key of the rows of a table: the baseline, then by the metric at the student-only budget."""
    value = row.student.value
    mean = nan_last(question.falling(value.mean if value else math.nan))
    return row.student.plain.verdict != "baseline", mean, row.recipe, row.length


def _training(record: RunRecord) -> dict[str, Any]:
    """Return the `train.*` options that define a setting."""
    train = record.spec["train"]
    return {name: value for name, value in train.items() if name not in ("steps", "save_every")}


def _require_metric(records: Sequence[RunRecord], metric: str) -> None:
    """Raise UserError if no run was evaluated with `metric`, and name those that exist."""
    found = dict.fromkeys(name for r in records for point in r.final_points for name in point.metrics)
    if records and metric != "fid" and metric not in found:
        raise UserError(
            f"--metric {visible(metric, 40)}: no finished run was evaluated with it; "
            f"choose one of {', '.join(map(visible, found))}"
        )
