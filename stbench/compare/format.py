"""Titled tables of text, the units of their figures, and what is printed of one run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from stbench.compare.stats import Cell
from stbench.runs.records import CurvePoint

Columns = dict[str, Callable[[CurvePoint], str]]


NONE = "-"
"""Stands for a figure that there is not."""


@dataclass(frozen=True)
class Section:
    """A titled table of text, the common form of all printed formats; the columns in `left` hold words."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})


def count(number: float) -> str:
    """A number of images in four digits at most: 800, 51.2k, 1.28M."""
    return _scaled(number)


def flop(number: float) -> str:
    """A number of FLOPs in four digits at most: 1.23 PFLOP."""
    return _scaled(number, " KMGTPE", " ") + "FLOP"


def _scaled(number: float, prefixes: str = " kMGTPE", gap: str = "") -> str:
    power = 0
    while 999.95 <= abs(number) < math.inf and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if abs(number) < 100 else f"{number:.4g}"
    return digits + gap + prefixes[power].strip()


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def number(value: float) -> str:
    """A metric with four decimals below 0.1, three below 10, two below 100, one above."""
    return f"{value:.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    size = abs(value)
    return 4 if 0 < size < 0.1 else 3 if size < 10 else 2 if size < 100 else 1


def spread(cell: Cell | None) -> str:
    """Mean ± standard deviation, or the one value."""
    if cell is None:
        return NONE
    if cell.std is None:
        return number(cell.mean)
    return f"{number(cell.mean)} ± {cell.std:.{_decimals(cell.mean)}f}"
