"""Group finished runs into rows: runs that differ only in their seed, with their points under a protocol."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from stbench.compare.leaderboard import Interval
from stbench.compare.question import BASELINE, QUESTION, Question
from stbench.compare.stats import mean, value_at
from stbench.compare.unfinished import UnfinishedRun, UnfinishedRuns
from stbench.core.errors import UserError
from stbench.runs.guide_text import guiding_network, without_hash
from stbench.runs.records import CurvePoint, RunRecord, StageRecord

SMALLEST_FID = 1e-9
"""Lower bound of FID: values at or below zero are rounding errors and have no logarithm."""

Guidance = tuple[float, Interval, str]
"""Scale and interval of classifier-free guidance, and the guides beside it."""
GuidanceGrid = set[Guidance]
NO_GUIDANCE: Guidance = (1.0, (0.0, 1.0), "")
"""Identifies all points without guidance: at scale 1 the interval has no effect."""

ValueBySeed = Mapping[int, float]
Points = Mapping[tuple[int, Guidance], CurvePoint]
"""The last-stage points of one run under one protocol, by step and guidance."""


Cost = Callable[[CurvePoint | StageRecord], float]
"""A cost up to a point, or of a stage."""


@dataclass(frozen=True)
class RowRuns:
    """The finished runs of one row, at least one, with their points under one protocol."""

    runs: Mapping[int, RunRecord]
    """Seed -> record, sorted by seed."""
    points: Mapping[int, Points]
    """Seed -> points, in the order of `runs`."""
    unfinished: tuple[UnfinishedRun, ...]
    """The row's seeds without results."""
    question: Question = QUESTION
    """All points have its metric."""
    network: str = ""
    """Name of the other network that guides the row's samples; "" for none. Such a row has the costs of the
    runs and of that network, but no value without guidance."""

    @property
    def first(self) -> RunRecord:
        """The run with the smallest seed, for fields that all seeds share."""
        return next(iter(self.runs.values()))

    @property
    def label(self) -> str:
        """Name of the row."""
        return f"{self.first.label} + autoguidance by {self.network}" if self.network else self.first.label

    @property
    def needs(self) -> str:
        """What the row needs from outside the model; "" for nothing."""
        paid = not self.network or all(guiding_stage(points) for points in self.points.values())
        parts = [self.first.needs, "" if paid else f"the network {self.network}"]
        return ", ".join(part for part in parts if part)

    @property
    def earlier_images(self) -> int:
        """Training images of the stages before the last; equal for all seeds."""
        return sum(stage.images for stage in self.earlier_stages(next(iter(self.runs))))

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
        """Return the guidance at which every seed was evaluated at `step`, only that by the row's network."""
        return set.intersection(
            *(
                {how for s, how in points if s == step and guiding_network(how[2]) == self.network}
                for points in self.points.values()
            )
        )

    def values_at(self, step: int, guidance: Guidance = NO_GUIDANCE) -> ValueBySeed:
        """Return the metric by seed at `step`."""
        return {seed: self._value(points[step, guidance]) for seed, points in self.points.items()}

    def values_at_images(self, images: float) -> ValueBySeed | None:
        """Return the metric by seed, log-linear between evaluations without guidance; None outside them."""
        if self.network:
            return None
        values = {seed: value_at(*self.curve(seed), images) for seed in self.runs}
        known = {seed: value for seed, value in values.items() if value is not None}
        return known if len(known) == len(values) else None

    def curve(self, seed: int) -> tuple[list[int], list[float]]:
        """Return images and metric without guidance of one seed at `shared_steps`."""
        points = self.unguided(seed)
        return [point.images for point in points], [self._value(point) for point in points]

    def unguided(self, seed: int) -> list[CurvePoint]:
        """Return the points without guidance of one seed at `shared_steps`."""
        return [self.points[seed][step, NO_GUIDANCE] for step in self.shared_steps]

    def images_at_cost(self, amount: float, cost: Cost, *, all_stages: bool) -> int:
        """Return the images of the last stage that the row has seen when its mean cost reaches an amount.

        Linear in images between evaluations, and beyond the last one. 0 if the earlier stages cost more.
        """
        if all_stages:
            amount -= mean([sum(map(cost, self.earlier_stages(seed))) for seed in self.runs])
        if amount <= 0:
            return 0
        x0, y0 = 0, 0.0
        for x1, step in self.step_at_images.items():
            y1 = mean(list(map(cost, self.points_at(step))))
            if y1 >= amount:
                return round(x0 + (x1 - x0) * (amount - y0) / (y1 - y0))
            x0, y0 = x1, y1
        return max(x0 + 1, math.ceil(x0 * amount / y0) if y0 else 0)

    def earlier_stages(self, seed: int) -> list[StageRecord]:
        """Return the finished stages of one seed before its last, and the training of a guiding network."""
        run, guiding = self.runs[seed], guiding_stage(self.points[seed]) if self.network else None
        return [
            *(stage for stage in run.stages if stage.index < run.final_stage),
            *([guiding] if guiding else []),
        ]

    def _value(self, point: CurvePoint) -> float:
        return _fid(point) if self.question.metric == "fid" else point.metrics[self.question.metric]


def collect_rows(
    records: Iterable[RunRecord], unfinished: UnfinishedRuns, protocol: str, question: Question = QUESTION
) -> tuple[list[RowRuns], list[str]]:
    """Group the finished runs of one setting into rows of their points that have the asked metric.

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
        row, run_notes = _collect_row(runs, unfinished.get(key, {}), protocol, question)
        notes += run_notes
        if row and row.shared_steps:
            guided, guided_notes = _network_rows(row)
            rows += [row, *guided]
            notes += guided_notes
        elif row:
            notes.append(f"{row.label}: excluded, its seeds share no evaluation without guidance")
    return rows, notes


def choose_baseline(rows: Sequence[RowRuns], question: Question) -> tuple[RowRuns | None, list[str]]:
    """Choose the baseline's row with the most seeds, then the longest; add a note if there are several."""
    named = [row for row in rows if row.label == question.baseline]
    if not named and question.baseline != BASELINE:  # options may be left out
        named = [row for row in rows if row.first.recipe == question.baseline and not row.network]
    candidates = sorted(named, key=lambda row: (len(row.runs), row.first.steps))
    if not candidates:
        return None, []
    baseline = candidates[-1]
    note = f"baseline: the {baseline.label} runs of {baseline.first.steps} steps (most seeds, then longest)"
    return baseline, [note] if len(candidates) > 1 else []


def _collect_row(
    runs: Sequence[RunRecord],
    unfinished: Mapping[int, UnfinishedRun],
    protocol: str,
    question: Question,
) -> tuple[RowRuns | None, list[str]]:
    """Choose one run per seed: the first by path that was evaluated under `protocol`."""
    chosen: dict[int, RunRecord] = {}
    points: dict[int, Points] = {}
    notes: list[str] = []
    for run in sorted(runs, key=lambda run: run.seed):
        found = _points(run, protocol, question.metric)
        if not found:
            how = f"under protocol {protocol}"
            how += f" with metric {question.metric}" if question.metric != "fid" else ""
            notes.append(f"{run.label} seed {run.seed}: excluded, not evaluated {how}")
        elif run.seed in chosen:
            notes.append(f"{run.path}: excluded, repeats seed {run.seed} of {chosen[run.seed].path}")
        else:
            chosen[run.seed], points[run.seed] = run, found
    missing = tuple(unfinished[seed] for seed in sorted(unfinished) if seed not in chosen)
    return (RowRuns(chosen, points, missing, question) if chosen else None), notes


def _points(record: RunRecord, protocol: str, metric: str) -> Points:
    """Return the last-stage points under `protocol`; those without FID stay, because they are an error."""
    points = [point for point in record.final_points if point.protocol == protocol]
    points = [point for point in points if metric == "fid" or metric in point.metrics]
    found: dict[tuple[int, Guidance], CurvePoint] = {}
    for point in points:
        interval = NO_GUIDANCE[1] if point.guidance == 1.0 else point.interval
        # Seeds of a guiding network differ in a hash only; of several, the first evaluated counts.
        found.setdefault((point.step, (point.guidance, interval, without_hash(point.guides))), point)
    return found


def _network_rows(row: RowRuns) -> tuple[list[RowRuns], list[str]]:
    """Return a row for each other network that guides samples of a row's runs, and notes on missing seeds."""
    names = dict.fromkeys(
        guiding_network(how[2]) for points in row.points.values() for _, how in points if how[2]
    )
    rows, notes = [], []
    for name in names:
        if not name:
            continue
        points = {
            seed: {
                key: point
                for key, point in found.items()
                if key[1] == NO_GUIDANCE or guiding_network(key[1][2]) == name
            }
            for seed, found in row.points.items()
        }
        points = {
            seed: found for seed, found in points.items() if any(how != NO_GUIDANCE for _, how in found)
        }
        guided = replace(row, runs={seed: row.runs[seed] for seed in points}, points=points, network=name)
        rows.append(guided)
        if others := sorted(row.runs.keys() - points.keys()):
            notes.append(f"{guided.label}: no samples of seed {', '.join(map(str, others))}")
    return rows, notes


def guiding_stage(points: Points) -> StageRecord | None:
    """Return the training of the network that guides these points as a stage; None if it is not known."""
    cost = next((point.guide_cost for point in points.values() if point.guide_cost), None)
    if cost is None:
        return None
    return StageRecord(
        name="guiding network",
        index=-1,
        steps=0,
        images=round(cost["images"]),
        seconds=cost["seconds"],
        warmup_seconds=0.0,
        flops_student=cost["flops"],
        flops_heads=0.0,
        flops_teachers=0.0,
        fingerprint="",
        sha256={},
        reused=True,
    )


def _fid(point: CurvePoint) -> float:
    if "fid" not in point.metrics:
        raise UserError(
            f"expected 'fid' among the metrics at step {point.step} of protocol {point.protocol}, found "
            f"{', '.join(point.metrics) or 'none'}; run `stbench evaluate` on this run again"
        )
    return max(point.metrics["fid"], SMALLEST_FID)
