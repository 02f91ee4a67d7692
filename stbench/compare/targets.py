"""Training images, time and FLOPs that a row needs to reach a target, and its speed-up over the baseline.

The mean over seeds answers how much training the target needs. The interval of the speed-up is paired over
seeds, as the verdicts are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stbench.compare.at_budget import BudgetPoint
from stbench.compare.leaderboard import ImagesToTarget, Interval
from stbench.compare.rows import Cost, RowRuns
from stbench.compare.stats import crossing, mean, paired_interval

MIN_SEEDS = 3
"""Seeds that a row and the baseline must share for a test or an interval."""


def images_to_target(point: BudgetPoint, reference: BudgetPoint | None) -> ImagesToTarget | None:
    """Return what a row needs to reach the asked target, or by default the baseline's mean at a budget.

    Args:
        point: The row at the budget.
        reference: The baseline at the budget, or None without one.

    Returns:
        None if there is no target: none was asked and the baseline has no value at the budget.
    """
    row, asked = point.row, point.row.question.target
    if row.network:
        return None

    # What the baseline needs: its own budget, whatever its seeds do individually, or its mean first crossing
    needed: float | None = None
    if asked is not None:
        target = asked
        needed = _mean(_crossings(reference.row, target)) if reference else None
    elif reference is not None and reference.values is not None:
        target = mean(list(reference.values.values()))
        needed = reference.images
    else:
        return None

    # The first crossing of every seed, and the mean. If one seed never reaches the target, there is none.
    if point is reference and asked is None:
        crossings: list[float | None] = [float(point.images)] * len(row.runs)
        bound = False
    else:
        crossings = _crossings(row, target)
        bound = any(_starts_below(row, seed, target) for seed in row.runs)
    student = _mean(crossings)
    paid = None if student is None else student + row.earlier_images

    needed_paid = needed + reference.row.earlier_images if needed is not None and reference else None
    return ImagesToTarget(
        target=target,
        needed=needed,
        student=student,
        paid=paid,
        arrived=sum(images is not None for images in crossings),
        limit=row.last_images,
        speedup_student=needed / student if needed and student else None,
        speedup_paid=needed_paid / paid if needed_paid and paid else None,
        bound=bound and student is not None,
        interval_student=_interval(point, reference, all_stages=False),
        interval_paid=_interval(point, reference, all_stages=True),
        flops_student=_cost(row, crossings, lambda spent: spent.flops, all_stages=False),
        flops_paid=_cost(row, crossings, lambda spent: spent.flops, all_stages=True),
        seconds_student=_cost(row, crossings, lambda spent: spent.seconds, all_stages=False),
        seconds_paid=_cost(row, crossings, lambda spent: spent.seconds, all_stages=True),
    )


def _mean(values: Sequence[float | None]) -> float | None:
    """Return the mean if all values are known."""
    known = [value for value in values if value is not None]
    return mean(known) if known and len(known) == len(values) else None


# --- Crossings ---


def _crossing(row: RowRuns, seed: int, target: float) -> float | None:
    images, values = row.curve(seed)
    return crossing(images, list(map(row.question.falling, values)), row.question.falling(target))


def _crossings(row: RowRuns, target: float) -> list[float | None]:
    return [_crossing(row, seed, target) for seed in row.runs]


def _starts_below(row: RowRuns, seed: int, target: float) -> bool:
    """Whether a seed is past the target at its first evaluation, so that its crossing is an upper bound."""
    _, values = row.curve(seed)
    return row.question.falling(values[0]) < row.question.falling(target)


# --- The interval of the speed-up ---


def _interval(point: BudgetPoint, reference: BudgetPoint | None, *, all_stages: bool) -> Interval | None:
    """Return Student's 95 % interval of the geometric mean of the speed-ups of the common seeds.

    Without an asked target, each seed's target is the baseline's value of the same seed, so that the interval
    covers the spread of the baseline, too. None without a test, and if a speed-up of a seed is unknown or
    only a bound.
    """
    if reference is None or point is reference:
        return None
    row, baseline = point.row, reference.row
    if any(run.failed for side in (row, baseline) for run in side.unfinished):
        return None
    logs = []
    for seed in row.runs.keys() & baseline.runs.keys():
        target, needed = _paired_target(reference, seed)
        if target is None or needed is None or _starts_below(row, seed, target):
            return None
        images = _crossing(row, seed, target)
        if images is None:
            return None
        extra = (baseline.earlier_images, row.earlier_images) if all_stages else (0, 0)
        logs.append(math.log(needed + extra[0]) - math.log(images + extra[1]))
    if len(logs) < MIN_SEEDS:
        return None
    low, high = paired_interval(logs)
    return math.exp(low), math.exp(high)


def _paired_target(reference: BudgetPoint, seed: int) -> tuple[float | None, float | None]:
    """Return the target of one seed, and the images that the baseline needs to reach it; None if unknown."""
    asked = reference.row.question.target
    if asked is None:
        value = reference.values[seed] if reference.values else math.nan
        return (value, float(reference.images)) if math.isfinite(value) else (None, None)
    if _starts_below(reference.row, seed, asked):
        return None, None
    return asked, _crossing(reference.row, seed, asked)


# --- Costs ---


def _cost(row: RowRuns, crossings: Sequence[float | None], cost: Cost, *, all_stages: bool) -> float | None:
    """Return the mean cost at the crossings, linear in images between evaluations; None as for images."""
    costs: list[float | None] = []
    for seed, images in zip(row.runs, crossings, strict=True):
        here = None if images is None else _cost_at(row, seed, images, cost)
        earlier = row.earlier_stages(seed) if all_stages else []
        costs.append(None if here is None else here + sum(map(cost, earlier)))
    return _mean(costs)


def _cost_at(row: RowRuns, seed: int, images: float, cost: Cost) -> float | None:
    before, spent = 0, 0.0
    for point in row.unguided(seed):
        if point.images >= images:
            if point.images == before:  # a damaged point at no images
                return cost(point)
            return spent + (cost(point) - spent) * (images - before) / (point.images - before)
        before, spent = point.images, cost(point)
    return None
