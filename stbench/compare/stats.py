"""Statistics of a comparison: means over seeds, curve crossings, the paired t-test and Holm's correction.

Student's t distribution is implemented here: importing scipy.special takes longer than comparing 200 runs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

# --- Mean and spread over seeds ---


@dataclass(frozen=True)
class SeedStats:
    """Mean and spread of one quantity over the seeds of a row."""

    mean: float
    std: float | None
    """Sample standard deviation; None for a single seed."""
    values: tuple[float, ...]
    """One value per seed."""


def seed_stats(values: Sequence[float]) -> SeedStats:
    """Summarise `values`, one per seed, at least one."""
    return SeedStats(mean(values), deviation(values) if len(values) > 1 else None, tuple(values))


def mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean of at least one value."""
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """Return the sample standard deviation of at least two values; NaN if a value is not finite."""
    centre = mean(values) if all(map(math.isfinite, values)) else math.nan
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def nan_last(value: float) -> float:
    """Return a sort key that places NaN after every number."""
    return math.inf if math.isnan(value) else value


def safe_log(value: float) -> float:
    """Return the logarithm, or NaN where there is none."""
    return math.log(value) if value > 0 else math.nan


# --- Learning curves, piecewise linear in log FID ---


def crossing(images: Sequence[int], fid: Sequence[float], target: float) -> float | None:
    """Return the images at which a curve first reaches `target`, linear in log FID; None if it never does.

    A curve that starts below the target returns its first point, which is an upper bound. The curve is never
    extrapolated.
    """
    previous: tuple[int, float] | None = None
    for x, y in zip(images, fid, strict=True):
        if y <= target:
            if previous is None or y <= 0:
                return float(x)
            x0, y0 = previous
            return x0 + (x - x0) * math.log(y0 / target) / math.log(y0 / y)
        # A diverged point gives no slope: a crossing right after it is placed at the next point.
        previous = (x, y) if math.isfinite(y) else None
    return None


def value_at(images: Sequence[int], fid: Sequence[float], x: float) -> float | None:
    """Return the FID of a curve at `x` images, linear in log FID between points; None outside the curve."""
    for i, here in enumerate(images):
        if here == x:
            return fid[i]
        if here > x:
            if i == 0:
                return None
            part = (x - images[i - 1]) / (here - images[i - 1])
            return math.exp((1 - part) * safe_log(fid[i - 1]) + part * safe_log(fid[i]))
    return None


def curve_mean(images: Sequence[int], values: Sequence[float], start: float, end: float) -> float | None:
    """Return the geometric mean of a curve between two numbers of images, linear in the log of its values.

    None if the curve does not cover the interval, and NaN if a value has no logarithm.
    """
    if not start < end:
        return None
    inside = [(x, y) for x, y in zip(images, values, strict=True) if start < x < end]
    first, last = value_at(images, values, start), value_at(images, values, end)
    if first is None or last is None:
        return None
    points = [(start, first), *inside, (end, last)]
    if not all(0 < y < math.inf for _, y in points):
        return math.nan
    logs = [(x, math.log(y)) for x, y in points]
    area = sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in pairwise(logs))
    return math.exp(area / (end - start))


# --- Student's t, the paired test and intervals ---

BOOTSTRAP_SEEDS = 10
"""Differences from which an interval is a bootstrap interval: fewer have too few different resamples."""
BOOTSTRAP_RESAMPLES = 2000


def student_p(t: float, dof: int) -> float:
    """Return the two-sided p-value of Student's t for integer degrees of freedom.

    Closed forms: Abramowitz and Stegun, 26.7.3 (odd) and 26.7.4 (even).
    """
    angle = math.atan(abs(t) / math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = dof % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, dof, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


@cache
def student_quantile(p: float, dof: int) -> float:
    """Return the t whose two-sided p-value is `p` for integer degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while student_p(high, dof) > p:
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if student_p(middle, dof) > p else (low, middle)
    return high


def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return the confidence interval of the mean of two or more differences.

    It is Student's below `BOOTSTRAP_SEEDS` differences. From there on, the quantiles of t are not those of
    normal differences but are estimated by resampling: the bootstrap-t interval.
    """
    count = len(differences)
    centre, spread = mean(differences), deviation(differences)
    if count < BOOTSTRAP_SEEDS or not spread > 0:
        half = student_quantile(1.0 - level, count - 1) * spread / math.sqrt(count)
        return centre - half, centre + half
    low, high = _bootstrap_quantiles(differences, level)
    return centre - high * spread / math.sqrt(count), centre - low * spread / math.sqrt(count)


def _bootstrap_quantiles(differences: Sequence[float], level: float) -> tuple[float, float]:
    """Return the lower and upper quantile of t, estimated by resampling `differences`.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 12.5. The order has no effect.
    """
    import numpy as np  # slow to import, and needed for many seeds only

    values = np.sort(np.asarray(differences))
    drawn = values[np.asarray(_resamples(len(values)))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(len(values))
    varied = errors > 0  # a resample of equal values has no t
    t = (drawn.mean(axis=1)[varied] - values.mean()) / errors[varied]
    low, high = np.quantile(t, [(1.0 - level) / 2, (1.0 + level) / 2])
    return float(low), float(high)


@cache
def _resamples(count: int) -> list[list[int]]:
    """Return `BOOTSTRAP_RESAMPLES` draws of `count` positions with replacement, always the same."""
    draw = random.Random(0)
    return [draw.choices(range(count), k=count) for _ in range(BOOTSTRAP_RESAMPLES)]


def paired_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a paired t-test on two or more differences.

    Without spread, t is undefined; the result is then 1 if all differences are zero and 0 otherwise.
    """
    centre, spread = mean(differences), deviation(differences)
    if spread == 0:
        return 0.0 if centre else 1.0
    return student_p(centre / (spread / math.sqrt(len(differences))), len(differences) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p-values, in the order given.

    Rejecting where they are below alpha bounds the family-wise error rate by alpha (Holm 1979).
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
