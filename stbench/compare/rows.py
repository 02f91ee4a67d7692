"""Group finished runs into rows: runs that differ only in their seed, with their points under a protocol."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from stbench.compare.leaderboard import Interval
from stbench.compare.stats import value_at
from stbench.compare.unfinished import UnfinishedRun, UnfinishedRuns
from stbench.core.errors import UserError
from stbench.runs.records import CurvePoint, RunRecord

BASELINE = "vanilla"
"""The recipe, without options, with which all other rows are compared."""
SMALLEST_FID = 1e-9
"""Lower bound of FID: values at or below zero are rounding errors and have no logarithm."""

Guidance = tuple[float, Interval]
"""Guidance scale and interval."""
GuidanceGrid = set[Guidance]
NO_GUIDANCE: Guidance = (1.0, (0.0, 1.0))
"""Identifies all points without guidance: at scale 1 the interval has no effect."""

FidBySeed = Mapping[int, float]
Points = Mapping[tuple[int, Guidance], CurvePoint]
"""The last-stage points of one run under one protocol, by step and guidance."""


@dataclass(frozen=True)
class RowRuns:
    """The finished runs of one row, at least one, with their points under one protocol."""

    runs: Mapping[int, RunRecord]
    """Seed -> record, sorted by seed."""
    points: Mapping[int, Points]
    """Seed -> points, in the order of `runs`."""
    unfinished: tuple[UnfinishedRun, ...]
    """The row's seeds without results."""

    @property
    def first(self) -> RunRecord:
        """The run with the smallest seed, for fields that all seeds share."""
        return next(iter(self.runs.values()))

    @property
    def label(self) -> str:
        """Name of the row."""
        return self.first.label

    @property
    def earlier_images(self) -> int:
        """Training images of the stages before the last; equal for all seeds."""
        return sum(stage.images for stage in self.first.stages if stage.index < self.first.final_stage)

    @cached_property
    def shared_steps(self) -> list[int]:
        """Steps at which every seed was evaluated without guidance, ascending."""
        steps = ({step for step, guidance in p if guidance == NO_GUIDANCE} for p in self.points.values())
        return sorted(set.intersection(*steps))

    @cached_property
    def step_at_images(self) -> dict[int, int]:
        """Images of the last stage -> step, for `shared_steps`."""
        return {self.points_at(step)[0].images: step for step in self.shared_steps}

    @property
    def last_images(self) -> int:
        """Images of the last stage at the last of `shared_steps`."""
        return max(self.step_at_images)

    def points_at(self, step: int) -> list[CurvePoint]:
        """Return the points without guidance at `step`, one per seed."""
        return [points[step, NO_GUIDANCE] for points in self.points.values()]

    def guidance_grid(self, step: int) -> GuidanceGrid:
        """Return the guidance values at which every seed was evaluated at `step`."""
        return set.intersection(*({how for s, how in points if s == step} for points in self.points.values()))

    def fid(self, step: int, guidance: Guidance = NO_GUIDANCE) -> FidBySeed:
        """Return FID by seed at `step`."""
        return {seed: _fid(points[step, guidance]) for seed, points in self.points.items()}

    def fid_at_images(self, images: int) -> FidBySeed | None:
        """Return FID by seed without guidance, log-linear between evaluations; None outside the curves."""
        fids = {seed: value_at(*self.curve(seed), images) for seed in self.runs}
        known = {seed: fid for seed, fid in fids.items() if fid is not None}
        return known if len(known) == len(fids) else None

    def curve(self, seed: int) -> tuple[list[int], list[float]]:
        """Return images and FID without guidance of one seed at `shared_steps`."""
        points = [self.points[seed][step, NO_GUIDANCE] for step in self.shared_steps]
        return [point.images for point in points], [_fid(point) for point in points]


def collect_rows(
    records: Iterable[RunRecord], unfinished: UnfinishedRuns, protocol: str
) -> tuple[list[RowRuns], list[str]]:
    """Group the finished runs of one setting into rows.

    Returns:
        The rows under `protocol`, and a note for every finished run that is in none of them.
    """
    runs_by_row: dict[Hashable, list[RunRecord]] = {}
    for record in records:
        if record.status == "finished":
            runs_by_row.setdefault(record.row_key, []).append(record)

    rows: list[RowRuns] = []
    notes: list[str] = []
    for key, runs in runs_by_row.items():
        row, run_notes = _collect_row(runs, unfinished.get(key, {}), protocol)
        notes += run_notes
        if row and row.shared_steps:
            rows.append(row)
        elif row:
            notes.append(f"{row.label}: excluded, its seeds share no evaluation without guidance")
    return rows, notes


def choose_baseline(rows: Sequence[RowRuns]) -> tuple[RowRuns | None, list[str]]:
    """Choose the plain vanilla row with the most seeds, then the longest; add a note if there are several."""
    candidates = sorted(
        (row for row in rows if row.label == BASELINE), key=lambda row: (len(row.runs), row.first.steps)
    )
    if not candidates:
        return None, []
    baseline = candidates[-1]
    note = f"baseline: the {BASELINE} runs of {baseline.first.steps} steps (most seeds, then longest)"
    return baseline, [note] if len(candidates) > 1 else []


def _collect_row(
    runs: Sequence[RunRecord], unfinished: Mapping[int, UnfinishedRun], protocol: str
) -> tuple[RowRuns | None, list[str]]:
    """Choose one run per seed: the first by path that was evaluated under `protocol`."""
    chosen: dict[int, RunRecord] = {}
    points: dict[int, Points] = {}
    notes: list[str] = []
    for run in sorted(runs, key=lambda run: run.seed):
        found = _points(run, protocol)
        if not found:
            notes.append(f"{run.label} seed {run.seed}: excluded, not evaluated under protocol {protocol}")
        elif run.seed in chosen:
            notes.append(f"{run.path}: excluded, repeats seed {run.seed} of {chosen[run.seed].path}")
        else:
            chosen[run.seed], points[run.seed] = run, found
    missing = tuple(unfinished[seed] for seed in sorted(unfinished) if seed not in chosen)
    return (RowRuns(chosen, points, missing) if chosen else None), notes


def _points(record: RunRecord, protocol: str) -> Points:
    points = [point for point in record.final_points if point.protocol == protocol]
    return {(p.step, NO_GUIDANCE if p.guidance == 1.0 else (p.guidance, p.interval)): p for p in points}


def _fid(point: CurvePoint) -> float:
    if "fid" not in point.metrics:
        raise UserError(
            f"expected 'fid' among the metrics at step {point.step} of protocol {point.protocol}, found "
            f"{', '.join(point.metrics) or 'none'}; run `stbench evaluate` on this run again"
        )
    return max(point.metrics["fid"], SMALLEST_FID)
