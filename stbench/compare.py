"""From run records to leaderboards, without torch or files. docs/protocol.md says what the figures mean.

One table per (setting, evaluation protocol); one row per group of runs that differ in the seed alone. Nothing
is dropped in silence: what is not in a figure is in a note.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from stbench.errors import UserError
from stbench.leaderboard import Against, Guided, Interval, Leaderboard, Point, Reach, Row, Table
from stbench.records import CurvePoint, RunRecord
from stbench.stats import cell, crossing, holm, paired_p, value_at

BASELINE = "vanilla"
"""The recipe, without options, that every other row is measured against."""
ALPHA = 0.05
"""Level of the verdicts, after Holm's correction over the rows of a table."""
MIN_SEEDS = 3
"""Seeds that a row and the baseline must share before there is a verdict."""
SMALLEST_FID = 1e-9
"""An FID at or below zero is rounding error; it is read as this, so that its logarithm exists."""


def leaderboard(records: Iterable[RunRecord]) -> Leaderboard:
    """The leaderboard of these runs; UserError for a finished curve without FID."""
    records = sorted(
        records, key=lambda record: (record.dataset, record.backbone, record.setting_hash, record.path)
    )
    finished = [record for record in records if record.status == "finished"]
    keys = {(r.setting_hash, p.protocol): None for r in finished for p in _final_points(r)}
    tables = [_table(records, setting, protocol) for setting, protocol in keys]
    homeless = [r for r in records if r.setting_hash not in {setting for setting, _ in keys}]
    return Leaderboard(tuple(tables), tuple(_state(record) for record in homeless))


@dataclass(frozen=True)
class _Group:
    """The finished runs of one row, by seed, with their final-stage points under one protocol."""

    runs: Mapping[int, RunRecord]
    points: Mapping[int, Mapping[tuple[int, float, Interval], CurvePoint]]
    unfinished: tuple[RunRecord, ...]

    @property
    def label(self) -> str:
        return self.first.label

    @property
    def first(self) -> RunRecord:
        return next(iter(self.runs.values()))

    @property
    def is_baseline(self) -> bool:
        return self.label == BASELINE

    @property
    def steps(self) -> list[int]:
        """Steps at which every seed was evaluated without guidance."""
        return sorted(set.intersection(*({k[0] for k in by if k[1] == 1.0} for by in self.points.values())))

    @property
    def earlier_images(self) -> int:
        return sum(stage.images for stage in self.first.stages if stage.index < self.first.final_stage)

    def at(self, step: int) -> dict[int, CurvePoint]:
        """Each seed's point without guidance."""
        return {seed: by[step, 1.0, (0.0, 1.0)] for seed, by in self.points.items()}

    def fid_at(self, step: int) -> dict[int, float]:
        return {seed: _fid(point) for seed, point in self.at(step).items()}

    def images_at(self, step: int) -> int:
        return next(iter(self.at(step).values())).images

    def curve(self, seed: int) -> tuple[list[int], list[float]]:
        """One seed's images and FID without guidance."""
        points = [self.at(step)[seed] for step in self.steps]
        return [point.images for point in points], [_fid(point) for point in points]


def _table(records: Sequence[RunRecord], setting: str, protocol: str) -> Table:
    mine = [record for record in records if record.setting_hash == setting]
    by_row: dict[Any, list[RunRecord]] = {}
    for record in mine:
        by_row.setdefault(_row_key(record), []).append(record)
    notes = [_state(record) for record in mine if record.status != "finished"]
    groups = []
    for runs in by_row.values():
        group = _group(runs, protocol, notes)
        if group.runs and group.steps:
            groups.append(group)
        elif group.runs:
            notes.append(f"{group.label}: left out, its seeds share no evaluation without guidance")
    base = _baseline(groups, notes)
    rows = [_row(group, base, _common_grid(groups, base)) for group in groups]
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


def _row_key(record: RunRecord) -> Any:
    """What the seeds of a row have in common."""
    options = tuple(sorted((name, repr(value)) for name, value in record.options.items()))
    plain = (record.backbone, record.objective, record.recipe, options, record.steps, record.precision)
    return record.spec.get("row_hash", plain)


def _group(runs: Sequence[RunRecord], protocol: str, notes: list[str]) -> _Group:
    chosen: dict[int, RunRecord] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        points = _points(run, protocol)
        if run.status != "finished":
            continue
        if run.seed in chosen:
            notes.append(f"{run.path}: left out, it repeats seed {run.seed} of {chosen[run.seed].path}")
        elif not points:
            notes.append(
                f"{run.label} seed {run.seed}: left out, it has no evaluation under protocol {protocol}"
            )
        else:
            chosen[run.seed] = run
    unfinished = tuple(run for run in runs if run.status != "finished" and run.seed not in chosen)
    return _Group(chosen, {seed: _points(run, protocol) for seed, run in chosen.items()}, unfinished)


def _final_points(record: RunRecord) -> list[CurvePoint]:
    return [point for point in record.curve if point.stage_index == record.final_stage]


def _points(record: RunRecord, protocol: str) -> dict[tuple[int, float, Interval], CurvePoint]:
    """Final-stage points by (step, scale, interval); without guidance any interval is (0, 1)."""
    points = [point for point in _final_points(record) if point.protocol == protocol]
    return {(p.step, p.guidance, (0.0, 1.0) if p.guidance == 1.0 else p.interval): p for p in points}


def _fid(point: CurvePoint) -> float:
    if "fid" not in point.metrics:
        raise UserError(
            f"expected 'fid' among the metrics at step {point.step} of protocol {point.protocol}, found "
            f"{', '.join(point.metrics) or 'none'}; run `stbench evaluate` on the run again"
        )
    return max(point.metrics["fid"], SMALLEST_FID)


def _state(record: RunRecord) -> str:
    """What a run that is in no figure is doing."""
    points = _final_points(record)
    reached = f"at step {points[-1].step} of {record.steps}" if points else "before its first evaluation"
    state = "running (or killed)" if record.status == "running" else record.status
    return f"{record.label} seed {record.seed}: {state} {reached}; not in the figures ({record.path})"


def _baseline(groups: Sequence[_Group], notes: list[str]) -> _Group | None:
    """Plain vanilla; of several lengths the one with the most seeds, then the longest."""
    candidates = sorted((g for g in groups if g.is_baseline), key=lambda g: (len(g.runs), g.first.steps))
    if len(candidates) > 1:
        notes.append(
            f"baseline: the {BASELINE} runs of {candidates[-1].first.steps} steps (most seeds, then longest)"
        )
    return candidates[-1] if candidates else None


def _budget(group: _Group, base: _Group | None) -> int:
    """The last step that a row shares with the baseline; its own last where they share none."""
    common = set(group.steps) & set(base.steps) if base else set()
    return max(common or group.steps)


def _common_grid(groups: Sequence[_Group], base: _Group | None) -> set[tuple[float, Interval]]:
    """The (scale, interval) pairs that all rows share which were sampled with guidance at their budget."""
    grids = [_grid(group, _budget(group, base)) for group in groups]
    guided = [grid for grid in grids if len(grid) > 1]
    return set.intersection(*guided) if guided else set()


def _grid(group: _Group, step: int) -> set[tuple[float, Interval]]:
    return set.intersection(*({key[1:] for key in by if key[0] == step} for by in group.points.values()))


def _guided(group: _Group, step: int, grid: set[tuple[float, Interval]]) -> Guided | None:
    if len(grid) < 2 or not grid <= _grid(group, step):
        return None
    fids = {pair: cell([_fid(by[step, pair[0], pair[1]]) for by in group.points.values()]) for pair in grid}
    scale, interval = min(sorted(fids), key=lambda pair: _nan_last(fids[pair].mean))
    scales = [pair[0] for pair in grid]
    return Guided(scale, interval, fids[scale, interval], edge=scale in (min(scales), max(scales)))


def _nan_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _row(group: _Group, base: _Group | None, grid: set[tuple[float, Interval]]) -> Row:
    step = _budget(group, base)
    points = list(group.at(step).values())
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
        fid=cell(list(group.fid_at(step).values())),
        inception=cell(scores) if len(scores) == len(points) else None,
        val_loss=cell([fmean(p.val_loss) if p.val_loss else math.nan for p in points]),
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


def _point(group: _Group, step: int) -> Point:
    return Point(group.images_at(step), cell(list(group.fid_at(step).values())))


def _against(group: _Group, base: _Group | None, step: int, earlier: int) -> Against:
    """The comparison at the row's budget plus `earlier` images; its p-value is not yet corrected."""
    images = group.images_at(step) + earlier
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
    own = group.fid_at(step)
    logs = [math.log(own[seed]) - math.log(known[seed]) for seed in own if seed in known]
    ratio = math.exp(fmean(logs)) if logs else None
    if any(run.status == "failed" for run in group.unfinished):
        return Against(images, fid, ratio, None, "a seed failed", reach)
    if not all(map(math.isfinite, logs)):
        return Against(images, fid, ratio, None, "no finite FID", reach)
    if len(logs) < MIN_SEEDS:
        return Against(images, fid, ratio, None, "too few seeds", reach)
    return Against(images, fid, ratio, paired_p(logs), "", reach)


def _reach(group: _Group, base: _Group, step: int, earlier: int) -> Reach | None:
    """Images to the baseline's mean FID at `step`, and how many times more the baseline needed."""
    if step not in base.steps:
        return None
    target, needed = fmean(base.fid_at(step).values()), base.images_at(step)
    limit = group.images_at(group.steps[-1]) + earlier
    if group is base:
        return Reach(target, float(needed), len(base.runs), limit, 1.0)
    crossings = [crossing(*group.curve(seed), target) for seed in group.runs]
    arrived = [images + earlier for images in crossings if images is not None]
    mean = fmean(arrived) if len(arrived) == len(crossings) else None
    return Reach(target, mean, len(arrived), limit, needed / mean if mean else None)


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


def _unpaired(groups: Sequence[_Group], base: _Group | None) -> list[str]:
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


def _missing_baseline(rows: Sequence[Row], batch: int, base: _Group | None) -> list[str]:
    """What to train so that every row can be compared with everything paid."""
    if base is None:
        return []
    short = {row.paid.images for row in rows if row.paid.fid is None}
    return [
        f"{BASELINE} has no point at {images} images; train it with --steps {math.ceil(images / batch)}"
        for images in sorted(short)
    ]
