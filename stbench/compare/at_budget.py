"""What each row measured at one budget: metrics, best guidance and costs. Compares no rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from stbench.compare.leaderboard import BestGuidance, Interval
from stbench.compare.question import metric_name
from stbench.compare.rows import NO_GUIDANCE, Cost, RowRuns, ValueBySeed
from stbench.compare.stats import SeedStats, mean, nan_last, seed_stats
from stbench.runs.records import CurvePoint

SharedGrid = set[tuple[float, Interval]]
"""Scales and intervals of classifier-free guidance."""


@dataclass(frozen=True)
class BudgetPoint:
    """The point of a row's training at which a budget is used up."""

    row: RowRuns
    images: int
    """Images of the last stage."""
    shared_grid: SharedGrid
    """The scales and intervals among which each row of the table chooses its best."""

    @property
    def step(self) -> int | None:
        """The step evaluated at exactly `images`, or None."""
        return self.row.step_at_images.get(self.images)

    @cached_property
    def values(self) -> ValueBySeed | None:
        """The metric by seed without guidance, log-linear between evaluations; None outside the curve."""
        return self.row.values_at_images(self.images)

    @cached_property
    def best_guidance(self) -> BestGuidance | None:
        """The best of the shared grid by its mean; None unless the row was sampled at all of the grid.

        A row that another network guides may lack some, because that network has its own scale.
        """
        grid, step = self.shared_grid, self.step
        if step is None:
            return None
        found = [how for how in self.row.guidance_grid(step) if how[:2] in grid]
        covers = bool(found) if self.row.network else grid <= {how[:2] for how in found}
        if not covers or (len(found) < 2 and not self.row.network):
            return None
        stats = {how: seed_stats(list(self.row.values_at(step, how).values())) for how in found}
        best = min(sorted(stats), key=lambda how: nan_last(self.row.question.falling(stats[how].mean)))
        scales = [scale for scale, _ in grid]
        edge = len(grid) > 1 and best[0] in (min(scales), max(scales))
        return BestGuidance(*best, stats[best], edge=edge)

    @property
    def values_at_best_guidance(self) -> ValueBySeed | None:
        """The metric by seed at `best_guidance`."""
        best = self.best_guidance
        if best is None or self.step is None:
            return None
        return self.row.values_at(self.step, (best.scale, best.interval, best.guides))

    def inception(self) -> SeedStats | None:
        """Return the Inception Score without guidance; None unless every seed has one."""
        points = [] if self.row.network else self._points
        scores = [point.metrics["is"] for point in points if "is" in point.metrics]
        return seed_stats(scores) if points and len(scores) == len(points) else None

    def val_loss(self) -> SeedStats | None:
        """Return the validation loss, averaged over its time bins."""
        losses = [mean(point.val_loss) if point.val_loss else math.nan for point in self._points]
        return seed_stats(losses) if losses else None

    def flops(self, *, all_stages: bool) -> SeedStats | None:
        """Return the training FLOPs of the last stage or of all stages."""
        return self._cost(lambda spent: spent.flops, all_stages)

    def seconds(self, *, all_stages: bool) -> SeedStats | None:
        """Return the training seconds of the last stage or of all stages."""
        return self._cost(lambda spent: spent.seconds, all_stages)

    def missing_reason(self) -> str:
        """Return why the row has no value at this budget."""
        if self.row.network:
            return "guided only"
        if self.images <= 0:
            return "paid more already"
        return "not trained that far" if self.images > self.row.last_images else "not evaluated there"

    @property
    def _points(self) -> list[CurvePoint]:
        """The points without guidance at `step`, one per seed; [] if there is no such step."""
        return [] if self.step is None else self.row.points_at(self.step)

    def _cost(self, cost: Cost, all_stages: bool) -> SeedStats | None:
        costs = []
        seeds = list(self.row.runs) if self._points else []
        for point, seed in zip(self._points, seeds, strict=True):
            earlier = self.row.earlier_stages(seed) if all_stages else []
            costs.append(cost(point) + sum(map(cost, earlier)))
        return seed_stats(costs) if costs else None


def find_budget_points(
    rows: Sequence[RowRuns], images_of: Callable[[RowRuns], int], batch: int
) -> tuple[list[BudgetPoint], list[str]]:
    """Find the point of every row at a budget.

    Args:
        rows: The rows of a table.
        images_of: Images of the last stage that the budget allows a row.
        batch: Images per step, to suggest a number of steps for rows that were not trained far enough.

    Returns:
        One point per row, and notes on guidance grids, rows without values and interpolated values.
    """
    grid, notes = _shared_grid(rows, images_of)
    points = [BudgetPoint(row, images_of(row), grid) for row in rows]
    return points, [*notes, *_edge_notes(points), *_gap_notes(points, batch)]


def _shared_grid(
    rows: Sequence[RowRuns], images_of: Callable[[RowRuns], int]
) -> tuple[SharedGrid, list[str]]:
    """Return the scales and intervals shared by all rows that were sampled with guidance at the budget."""
    steps = [(row, row.step_at_images.get(images_of(row))) for row in rows if not row.network]
    grids = [row.guidance_grid(step) for row, step in steps if step is not None]
    guided = [{how[:2] for how in grid} for grid in grids if len(grid) > 1]
    shared = set.intersection(*guided) if guided else {NO_GUIDANCE[:2]}
    if len(shared) >= 2 or all(len(grid) < 2 for grid in guided):
        return shared, []
    return shared, [
        "best guidance: omitted, the rows share fewer than two guidance scales; evaluate all at the same ones"
    ]


def _edge_notes(points: Sequence[BudgetPoint]) -> list[str]:
    """Name the rows whose best guidance may be outside the shared grid."""
    named = [
        f"{point.row.label} @{point.best_guidance.scale:g}*"
        for point in points
        if point.best_guidance and point.best_guidance.edge
    ]
    return [f"best guidance at the edge of the shared grid: {_sorted_list(named)}"] if named else []


def _gap_notes(points: Sequence[BudgetPoint], batch: int) -> list[str]:
    """Name the rows without a value at the budget, with the steps to train, and the interpolated ones."""
    missing = [point for point in points if point.values is None and not point.row.network]

    # Rows that need more training, grouped by the images that they need
    too_short: dict[int, list[str]] = {}
    for point in missing:
        if point.images > point.row.last_images:
            too_short.setdefault(point.images, []).append(point.row.label)
    notes = [
        f"not trained to {images} images of the last stage: {_sorted_list(labels)}; "
        f"train with --steps {math.ceil(images / batch)}"
        for images, labels in sorted(too_short.items())
    ]

    # Rows whose earlier stages use up the budget
    if overspent := [point.row.label for point in missing if point.images <= 0]:
        notes.append(f"the earlier stages alone exceed the budget: {_sorted_list(overspent)}")

    # Rows evaluated before and after the budget
    if between := [point.row for point in points if point.values is not None and point.step is None]:
        labels = _sorted_list(row.label for row in between)
        metric = metric_name(between[0].question.metric)
        notes.append(f"{metric} marked ~ is interpolated between two evaluations: {labels}")
    return notes


def _sorted_list(labels: Iterable[str]) -> str:
    return ", ".join(sorted(labels))
