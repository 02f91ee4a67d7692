"""The arithmetic of a comparison: means, crossings of a curve, the paired test. Numbers in, numbers out.

Student's t is written out because importing scipy.special takes longer than comparing two hundred runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One figure over the seeds of a row: mean, sample standard deviation (None for one seed), all values."""

    mean: float
    std: float | None
    values: tuple[float, ...]


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return sum(values) / len(values)


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation of at least two values; NaN if one of them is not finite."""
    centre = mean(values) if all(map(math.isfinite, values)) else math.nan
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1))


def cell(values: Sequence[float]) -> Cell:
    """The figure that `values`, one per seed and at least one, make."""
    return Cell(mean(values), deviation(values) if len(values) > 1 else None, tuple(values))


def crossing(images: Sequence[int], fid: Sequence[float], target: float) -> float | None:
    """Images at which a curve first comes down to `target`, linear in log FID between points; None if never.

    A curve that starts below the target gives its first point, an upper bound. Nothing is extrapolated.
    """
    previous: tuple[int, float] | None = None
    for x, y in zip(images, fid, strict=True):
        if y <= target:
            if previous is None or y <= 0:
                return float(x)
            x0, y0 = previous
            return x0 + (x - x0) * math.log(y0 / target) / math.log(y0 / y)
        previous = (x, y) if math.isfinite(y) else None
    return None


def value_at(images: Sequence[int], fid: Sequence[float], x: float) -> float | None:
    """FID of a curve at x images, linear in log FID between points; None outside the curve."""
    for i, here in enumerate(images):
        if here == x:
            return fid[i]
        if here > x:
            if i == 0:
                return None
            part = (x - images[i - 1]) / (here - images[i - 1])
            return math.exp((1 - part) * math.log(fid[i - 1]) + part * math.log(fid[i]))
    return None


def student_p(t: float, dof: int) -> float:
    """Two-sided p-value of Student's t for whole degrees of freedom (Abramowitz and Stegun, 26.7.3 and 4)."""
    angle = math.atan(abs(t) / math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = dof % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, dof, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return max(0.0, 1.0 - inside)


def student_quantile(p: float, dof: int) -> float:
    """The t whose two-sided p-value is `p`, for whole degrees of freedom, by bisection."""
    low, high = 0.0, 1.0
    while student_p(high, dof) > p:
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2.0
        low, high = (middle, high) if student_p(middle, dof) > p else (low, middle)
    return high


def paired_interval(differences: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Interval of confidence `level` of the mean of 2 or more differences (Student's t)."""
    count = len(differences)
    half = student_quantile(1.0 - level, count - 1) * deviation(differences) / math.sqrt(count)
    return mean(differences) - half, mean(differences) + half


def paired_p(differences: Sequence[float]) -> float:
    """Two-sided p-value of a paired t-test on 2 or more differences; without spread 0, or 1 if all are 0."""
    centre, spread = mean(differences), deviation(differences)
    if spread == 0:
        return 0.0 if centre else 1.0
    return student_p(centre / (spread / math.sqrt(len(differences))), len(differences) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values: those below 0.05 hold together with 95 % confidence (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = running
    return adjusted
