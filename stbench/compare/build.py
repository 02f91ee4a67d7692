"""From run records to leaderboards, without torch or files. docs/protocol.md says what the figures mean.

One table per (setting, evaluation protocol); one row per group of runs that differ in the seed alone. Nothing
is dropped in silence: what is not in a figure is in a note.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from stbench.compare.budgets import edges, gaps, paid_budget, student_budget
from stbench.compare.leaderboard import Leaderboard, Point, Row, Standing, Table
from stbench.compare.rows import Group, group_runs
from stbench.compare.stats import cell
from stbench.compare.unfinished import Claims, absent, claims, final_points, row_key
from stbench.compare.verdicts import BASELINE, nan_last, standings
from stbench.runs.journal import JournalEntry
from stbench.runs.records import RunRecord


def leaderboard(records: Iterable[RunRecord], entries: Iterable[JournalEntry] = ()) -> Leaderboard:
    """The leaderboard of these runs and of what a journal asked for; UserError for a curve without FID."""
    records = sorted(
        records, key=lambda record: (record.dataset, record.backbone, record.setting_hash, record.path)
    )
    entries = list(entries)
    claimed = claims(records, entries)
    finished = [record for record in records if record.status == "finished"]
    keys = {(r.setting_hash, p.protocol): None for r in finished for p in final_points(r)}
    tables = [_table(records, claimed, setting, protocol) for setting, protocol in keys]
    settings = {setting for setting, _ in keys}
    bare = {entry.setting_hash: entry for entry in reversed(entries) if entry.setting_hash not in settings}
    tables += [_bare(entry, records, claimed) for entry in reversed(list(bare.values()))]
    seen = settings | bare.keys()
    notes = [claim.note for row in claimed.values() for claim in row.values() if claim.setting not in seen]
    return Leaderboard(tuple(tables), tuple(notes))


def _bare(entry: JournalEntry, records: Sequence[RunRecord], claimed: Claims) -> Table:
    """The table of a setting that a journal names and of which no run is finished."""
    mine = [record for record in records if record.setting_hash == entry.setting_hash]
    return Table(
        setting=entry.setting_hash,
        protocol="",
        dataset=entry.dataset,
        backbone=entry.backbone,
        objective=entry.objective,
        batch=mine[0].batch if mine else None,
        precision=mine[0].precision if mine else None,
        protocol_fields={},
        student_images=0,
        paid_images=0,
        rows=(),
        absent=tuple(absent(claimed, entry.setting_hash, ())),
        notes=tuple(_waiting(claimed, entry.setting_hash)),
    )


def _table(records: Sequence[RunRecord], claimed: Claims, setting: str, protocol: str) -> Table:
    mine = [record for record in records if record.setting_hash == setting]
    first = next(r for r in mine if protocol in {p.protocol for p in r.curve})
    groups, notes = group_runs(mine, claimed, protocol)
    notes = _waiting(claimed, setting) + notes
    base = _baseline(groups, notes)
    student = student_budget(groups, base, notes)
    paid = paid_budget(groups, base, student)
    sides = []
    for name, budget in (
        ("equal steps", lambda _: student),
        ("everything paid", lambda g: paid - g.earlier_images),
    ):
        told: list[str] = []
        sides.append(standings(groups, base, budget, told))
        if len(sides) == 1 or paid != student:
            told += edges(groups, sides[-1]) + gaps(groups, sides[-1], first.batch)
            notes += [f"{name}: {note}" for note in told]
    rows = [_row(group, *pair) for group, *pair in zip(groups, *sides, strict=True)]
    return Table(
        setting=setting,
        protocol=protocol,
        dataset=first.dataset,
        backbone=first.backbone,
        objective=first.objective,
        batch=first.batch,
        precision=first.precision,
        protocol_fields=first.protocols.get(protocol, {}),
        student_images=student,
        paid_images=paid,
        rows=tuple(sorted(rows, key=_rank)),
        absent=tuple(absent(claimed, setting, {row_key(group.first) for group in groups})),
        notes=tuple(notes + _unpaired(groups, base)),
    )


def _waiting(claimed: Claims, setting: str) -> list[str]:
    return [
        seeds[seed].note
        for seeds in claimed.values()
        for seed in sorted(seeds)
        if seeds[seed].setting == setting
    ]


def _baseline(groups: Sequence[Group], notes: list[str]) -> Group | None:
    """Plain vanilla; of several lengths the one with the most seeds, then the longest."""
    candidates = sorted(
        (g for g in groups if g.label == BASELINE), key=lambda g: (len(g.runs), g.first.steps)
    )
    if len(candidates) > 1:
        notes.append(
            f"baseline: the {BASELINE} runs of {candidates[-1].first.steps} steps (most seeds, then longest)"
        )
    return candidates[-1] if candidates else None


def _row(group: Group, student: Standing, paid: Standing) -> Row:
    return Row(
        recipe=group.label,
        length=group.first.steps,
        backbone=group.first.backbone,
        objective=group.first.objective,
        needs=group.first.needs,
        seeds=tuple(group.runs),
        unfinished=tuple(claim.seed for claim in group.unfinished),
        earlier_images=group.earlier_images,
        student=student,
        paid=paid,
        curve=tuple(
            Point(images, cell(list(group.fid(step).values()))) for images, step in group.moments.items()
        ),
        paths=tuple(run.path for run in group.runs.values()),
    )


def _rank(row: Row) -> tuple[object, ...]:
    fid = row.student.fid
    return (
        row.student.plain.verdict != "baseline",
        nan_last(fid.mean if fid else math.nan),
        row.recipe,
        row.length,
    )


def _unpaired(groups: Sequence[Group], base: Group | None) -> list[str]:
    """The seeds that are in a row's mean and not in its test."""
    if base is None:
        return []
    alone = [(group.label, sorted(group.runs.keys() - base.runs.keys())) for group in groups]
    return [
        f"{label}: no {BASELINE} of seed {', '.join(map(str, seeds))}; in the means, not in ratio and verdict"
        for label, seeds in alone
        if seeds
    ]
