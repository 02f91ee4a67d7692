"""Which runs are seeds of one leaderboard row, and what each of them measured. Says nothing of other rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from stbench.compare.leaderboard import Interval
from stbench.compare.stats import value_at
from stbench.compare.unfinished import Claim, Claims, RowKey, final_points, row_key
from stbench.core.errors import UserError
from stbench.runs.records import CurvePoint, RunRecord

SMALLEST_FID = 1e-9
"""An FID at or below zero is rounding error; it is read as this, so that its logarithm exists."""
NO_GUIDANCE = (1.0, (0.0, 1.0))
"""Scale and interval of a point without guidance, whatever interval was asked for."""

Points = Mapping[tuple[int, tuple[float, Interval]], CurvePoint]
"""A run's last-stage points under one protocol, by step and (scale, interval)."""


@dataclass(frozen=True)
class Group:
    """The finished runs of one row, by seed, with their points under one protocol; at least one run."""

    runs: Mapping[int, RunRecord]
    points: Mapping[int, Points]
    unfinished: tuple[Claim, ...]
    """Seeds of the row that are in no figure."""

    @property
    def first(self) -> RunRecord:
        """Any run, for what all have in common."""
        return next(iter(self.runs.values()))

    @property
    def label(self) -> str:
        """What the row is called."""
        return self.first.label

    @cached_property
    def steps(self) -> list[int]:
        """Steps at which every seed was evaluated without guidance."""
        return sorted(
            set.intersection(*({s for s, how in p if how == NO_GUIDANCE} for p in self.points.values()))
        )

    @cached_property
    def moments(self) -> dict[int, int]:
        """Images of the last stage -> step, in order."""
        return {self.at(step)[0].images: step for step in self.steps}

    @property
    def earlier_images(self) -> int:
        """Images that the stages before the last were trained on."""
        return sum(stage.images for stage in self.first.stages if stage.index < self.first.final_stage)

    def grid(self, step: int) -> set[tuple[float, Interval]]:
        """The (scale, interval) pairs at which every seed was evaluated at `step`."""
        return set.intersection(*({how for s, how in p if s == step} for p in self.points.values()))

    def at(self, step: int) -> list[CurvePoint]:
        """Each seed's point without guidance, in the order of `runs`."""
        return [points[step, NO_GUIDANCE] for points in self.points.values()]

    def fid(self, step: int, how: tuple[float, Interval] = NO_GUIDANCE) -> dict[int, float]:
        """Each seed's FID."""
        return {seed: _fid(points[step, how]) for seed, points in self.points.items()}

    def fid_near(self, images: int) -> dict[int, float] | None:
        """Each seed's FID at as many images of the last stage, log-linear between points; None outside."""
        found = {seed: value_at(*self.curve(seed), images) for seed in self.runs}
        known = {seed: fid for seed, fid in found.items() if fid is not None}
        return known if len(known) == len(found) else None

    def curve(self, seed: int) -> tuple[list[int], list[float]]:
        """One seed's images and FID without guidance, at the steps that all seeds have."""
        points = [self.points[seed][step, NO_GUIDANCE] for step in self.steps]
        return [point.images for point in points], [_fid(point) for point in points]


def group_runs(records: Iterable[RunRecord], claimed: Claims, protocol: str) -> tuple[list[Group], list[str]]:
    """The rows of one setting under one protocol, and a note on every finished run that is in none."""
    by_row: dict[RowKey, list[RunRecord]] = {}
    notes: list[str] = []
    for record in records:
        if record.status == "finished":
            by_row.setdefault(row_key(record), []).append(record)
    groups = []
    for key, runs in by_row.items():
        group = _group(runs, claimed.get(key, {}), protocol, notes)
        if group and group.steps:
            groups.append(group)
        elif group:
            notes.append(f"{group.label}: left out, its seeds share no evaluation without guidance")
    return groups, notes


def _group(
    runs: Sequence[RunRecord], claimed: Mapping[int, Claim], protocol: str, notes: list[str]
) -> Group | None:
    chosen: dict[int, RunRecord] = {}
    points: dict[int, Points] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        found = _points(run, protocol)
        if not found:
            notes.append(f"{run.label} seed {run.seed}: left out, not evaluated under protocol {protocol}")
        elif run.seed in chosen:
            notes.append(f"{run.path}: left out, it repeats seed {run.seed} of {chosen[run.seed].path}")
        else:
            chosen[run.seed], points[run.seed] = run, found
    unfinished = tuple(claimed[seed] for seed in sorted(claimed) if seed not in chosen)
    return Group(chosen, points, unfinished) if chosen else None


def _points(record: RunRecord, protocol: str) -> Points:
    mine = [point for point in final_points(record) if point.protocol == protocol]
    return {(p.step, NO_GUIDANCE if p.guidance == 1.0 else (p.guidance, p.interval)): p for p in mine}


def _fid(point: CurvePoint) -> float:
    if "fid" not in point.metrics:
        raise UserError(
            f"expected 'fid' among the metrics at step {point.step} of protocol {point.protocol}, found "
            f"{', '.join(point.metrics) or 'none'}; run `stbench evaluate` on the run again"
        )
    return max(point.metrics["fid"], SMALLEST_FID)
