"""Which runs are seeds of one leaderboard row, and what each of them measured. Says nothing of other rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from stbench.errors import UserError
from stbench.leaderboard import Interval
from stbench.records import CurvePoint, RunRecord

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
    unfinished: tuple[RunRecord, ...]

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

    def images(self, step: int) -> int:
        """Images of the last stage at `step`."""
        return self.at(step)[0].images

    def curve(self, seed: int) -> tuple[list[int], list[float]]:
        """One seed's images and FID without guidance, at the steps that all seeds have."""
        points = [self.points[seed][step, NO_GUIDANCE] for step in self.steps]
        return [point.images for point in points], [_fid(point) for point in points]


def group_runs(records: Iterable[RunRecord], protocol: str) -> tuple[list[Group], list[str]]:
    """The rows of one setting under one protocol, and a note on every run that is in none."""
    by_row: dict[Any, list[RunRecord]] = {}
    notes = []
    for record in records:
        by_row.setdefault(_row_key(record), []).append(record)
        if record.status != "finished":
            notes.append(state(record))
    groups = []
    for runs in by_row.values():
        group = _group(runs, protocol, notes)
        if group and group.steps:
            groups.append(group)
        elif group:
            notes.append(f"{group.label}: left out, its seeds share no evaluation without guidance")
    return groups, notes


def final_points(record: RunRecord) -> list[CurvePoint]:
    """The evaluations of the network that a run is about."""
    return [point for point in record.curve if point.stage_index == record.final_stage]


def state(record: RunRecord) -> str:
    """What a run that is in no figure is doing, and where."""
    points = final_points(record)
    reached = f"at step {points[-1].step} of {record.steps}" if points else "before its first evaluation"
    status = "running (or killed)" if record.status == "running" else record.status
    return f"{record.label} seed {record.seed}: {status} {reached}; not in the figures ({record.path})"


def _row_key(record: RunRecord) -> Any:
    """What the seeds of a row have in common."""
    options = tuple(sorted((name, repr(value)) for name, value in record.options.items()))
    plain = (record.backbone, record.objective, record.recipe, options, record.steps, record.precision)
    return record.spec.get("row_hash", plain)


def _group(runs: Sequence[RunRecord], protocol: str, notes: list[str]) -> Group | None:
    chosen: dict[int, RunRecord] = {}
    points: dict[int, Points] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        if run.status != "finished":
            continue
        found = _points(run, protocol)
        if not found:
            notes.append(f"{run.label} seed {run.seed}: left out, not evaluated under protocol {protocol}")
        elif run.seed in chosen:
            notes.append(f"{run.path}: left out, it repeats seed {run.seed} of {chosen[run.seed].path}")
        else:
            chosen[run.seed], points[run.seed] = run, found
    unfinished = tuple(run for run in runs if run.status != "finished" and run.seed not in chosen)
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
