"""From run records to leaderboards, without torch or files. docs/protocol.md says what the figures mean.

One table per (setting, evaluation protocol); one row per group of runs that differ in the seed alone. Nothing
is dropped in silence: what is not in a figure is in a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from stbench.groups import Group, final_points, group_runs, state
from stbench.leaderboard import Against, Guided, Interval, Leaderboard, Point, Reach, Row, Table
from stbench.records import RunRecord
from stbench.stats import cell, crossing, holm, mean, paired_p, value_at

BASELINE = "vanilla"
"""The recipe, without options, that every other row is measured against."""
ALPHA = 0.05
"""Level of the verdicts, after Holm's correction over the rows of a table."""
MIN_SEEDS = 3
"""Seeds that a row and the baseline must share before there is a verdict."""


def leaderboard(records: Iterable[RunRecord]) -> Leaderboard:
    """The leaderboard of these runs; UserError for a finished curve without FID."""
    records = sorted(
        records, key=lambda record: (record.dataset, record.backbone, record.setting_hash, record.path)
    )
    finished = [record for record in records if record.status == "finished"]
    keys = {(r.setting_hash, p.protocol): None for r in finished for p in final_points(r)}
    tables = [_table(records, setting, protocol) for setting, protocol in keys]
    homeless = [r for r in records if r.setting_hash not in {setting for setting, _ in keys}]
    return Leaderboard(tuple(tables), tuple(state(record) for record in homeless))


def _table(records: Sequence[RunRecord], setting: str, protocol: str) -> Table:
    mine = [record for record in records if record.setting_hash == setting]
    groups, notes = group_runs(mine, protocol)
    base = _baseline(groups, notes)
    grid = _common_grid(groups, base, notes)
    rows = [_row(group, base, grid) for group in groups]
    rows = _settle(rows, lambda row: row.student, lambda row, value: replace(row, student=value))
    rows = _settle(rows, lambda row: row.paid, lambda row, value: replace(row, paid=value))
    notes += _unpaired(groups, base) + _edges(rows) + _missing_baseline(rows, mine[0].batch, base)
    first = next(r for r in mine if protocol in {p.protocol for p in r.curve})
    return Table(
        setting=setting,
        protocol=protocol,
        dataset=first.dataset,
        backbone=first.backbone,
        objective=first.objective,
        batch=first.batch,
        precision=first.precision,
        protocol_fields=first.protocols.get(protocol, {}),
        rows=tuple(sorted(rows, key=_rank)),
        notes=tuple(notes),
    )


def _rank(row: Row) -> tuple[object, ...]:
    return row.student.verdict != "baseline", row.images, _nan_last(row.fid.mean), row.recipe


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


def _budget(group: Group, base: Group | None) -> int:
    """The last step that a row shares with the baseline; its own last where they share none."""
    common = set(group.steps) & set(base.steps) if base else set()
    return max(common or group.steps)


def _common_grid(
    groups: Sequence[Group], base: Group | None, notes: list[str]
) -> set[tuple[float, Interval]]:
    """The (scale, interval) pairs that all rows share which were sampled with guidance at their budget."""
    grids = [group.grid(_budget(group, base)) for group in groups]
    guided = [grid for grid in grids if len(grid) > 1]
    common = set.intersection(*guided) if guided else set()
    if guided and len(common) < 2:
        notes.append("best guidance: left out, the rows share no two scales; evaluate them at the same")
    return common


def _guided(group: Group, step: int, grid: set[tuple[float, Interval]]) -> Guided | None:
    if len(grid) < 2 or not grid <= group.grid(step):
        return None
    fids = {pair: cell(list(group.fid(step, pair).values())) for pair in grid}
    scale, interval = min(sorted(fids), key=lambda pair: _nan_last(fids[pair].mean))
    scales = [pair[0] for pair in grid]
    return Guided(scale, interval, fids[scale, interval], edge=scale in (min(scales), max(scales)))


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _row(group: Group, base: Group | None, grid: set[tuple[float, Interval]]) -> Row:
    step = _budget(group, base)
    points = group.at(step)
    runs = list(group.runs.values())
    earlier = [[stage for stage in run.stages if stage.index < run.final_stage] for run in runs]
    seconds, flops = [p.seconds for p in points], [p.flops for p in points]
    scores = [p.metrics["is"] for p in points if "is" in p.metrics]
    return Row(
        recipe=group.label,
        backbone=group.first.backbone,
        objective=group.first.objective,
        needs=group.first.needs,
        seeds=tuple(group.runs),
        unfinished=tuple(run.seed for run in group.unfinished),
        steps=step,
        images=points[0].images,
        fid=cell(list(group.fid(step).values())),
        inception=cell(scores) if len(scores) == len(points) else None,
        val_loss=cell([mean(p.val_loss) if p.val_loss else math.nan for p in points]),
        guided=_guided(group, step, grid),
        flops_student=cell(flops),
        flops_total=cell([x + sum(s.flops for s in e) for x, e in zip(flops, earlier, strict=True)]),
        seconds_student=cell(seconds),
        seconds_total=cell([x + sum(s.seconds for s in e) for x, e in zip(seconds, earlier, strict=True)]),
        student=_against(group, base, step, 0),
        paid=_against(group, base, step, group.earlier_images),
        curve=tuple(_point(group, step) for step in group.steps),
        paths=tuple(run.path for run in runs),
    )


def _point(group: Group, step: int) -> Point:
    return Point(group.images(step), cell(list(group.fid(step).values())))


def _against(group: Group, base: Group | None, step: int, earlier: int) -> Against:
    """The comparison at the row's budget plus `earlier` images; its p-value is not yet corrected."""
    images = group.images(step) + earlier
    if base is None:
        return Against(images, None, None, None, "no baseline", None)
    reach = _reach(group, base, step, earlier)
    theirs = {seed: value_at(*base.curve(seed), images) for seed in base.runs}
    known = {seed: fid for seed, fid in theirs.items() if fid is not None}
    if len(known) < len(theirs):
        return Against(images, None, None, None, f"no {BASELINE} there", reach)
    fid = cell(list(known.values()))
    if group is base:
        return Against(images, fid, 1.0, None, "baseline", reach)
    own = group.fid(step)
    logs = [math.log(own[seed]) - math.log(known[seed]) for seed in own if seed in known]
    ratio = math.exp(mean(logs)) if logs else None
    if any(run.status == "failed" for run in group.unfinished):
        return Against(images, fid, ratio, None, "a seed failed", reach)
    if not all(map(math.isfinite, logs)):
        return Against(images, fid, ratio, None, "no finite FID", reach)
    if len(logs) < MIN_SEEDS:
        return Against(images, fid, ratio, None, "too few seeds", reach)
    return Against(images, fid, ratio, paired_p(logs), "", reach)


def _reach(group: Group, base: Group, step: int, earlier: int) -> Reach | None:
    """Images to the baseline's mean FID at `step`, and how many times more the baseline needed."""
    if step not in base.steps:
        return None
    target, needed = mean(list(base.fid(step).values())), base.images(step)
    limit = group.images(group.steps[-1]) + earlier
    if group is base:
        return Reach(target, float(needed), len(base.runs), limit, 1.0)
    crossings = [crossing(*group.curve(seed), target) for seed in group.runs]
    arrived = [images + earlier for images in crossings if images is not None]
    images = mean(arrived) if len(arrived) == len(crossings) else None
    return Reach(target, images, len(arrived), limit, needed / images if images else None)


def _settle(
    rows: Sequence[Row], get: Callable[[Row], Against], put: Callable[[Row, Against], Row]
) -> list[Row]:
    """The rows with Holm's correction and the verdicts on one axis."""
    tested = [(i, get(row).p) for i, row in enumerate(rows)]
    asked = [(i, p) for i, p in tested if p is not None]
    adjusted = dict(zip([i for i, _ in asked], holm([p for _, p in asked]), strict=True))
    return [put(row, _verdict(get(row), adjusted[i])) if i in adjusted else row for i, row in enumerate(rows)]


def _verdict(against: Against, p: float) -> Against:
    ratio = against.ratio or 1.0
    verdict = "not distinguishable" if p >= ALPHA else "better" if ratio < 1 else "worse"
    return replace(against, p=p, verdict=verdict)


def _unpaired(groups: Sequence[Group], base: Group | None) -> list[str]:
    """The seeds that are in a row's mean and not in its test."""
    if base is None:
        return []
    alone = {group.label: sorted(group.runs.keys() - base.runs.keys()) for group in groups}
    return [
        f"{label}: no {BASELINE} of seed {', '.join(map(str, seeds))}; in the means, not in ratio and verdict"
        for label, seeds in alone.items()
        if seeds
    ]


def _edges(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.recipe}: its best guidance, {row.guided.scale:g}*, is at the edge of the common grid"
        for row in rows
        if row.guided and row.guided.edge
    ]


def _missing_baseline(rows: Sequence[Row], batch: int, base: Group | None) -> list[str]:
    """What to train so that every row can be compared with everything paid."""
    if base is None:
        return []
    short = {row.paid.images for row in rows if row.paid.fid is None}
    return [
        f"{BASELINE} has no point at {images} images; train it with --steps {math.ceil(images / batch)}"
        for images in sorted(short)
    ]
