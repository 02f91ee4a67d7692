"""Numbers in the data of a page."""

from __future__ import annotations

import math

DIGITS = 5
"""Significant digits of the values in curves; the leaderboard is formatted from the full values."""


def short(value: float | None) -> float | None:
    """Round to `DIGITS` significant digits; None for numbers that are not finite."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
