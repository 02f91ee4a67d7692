"""Text tables and the formatting of numbers with units, shared by everything that is printed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stbench.compare.question import Amount
from stbench.compare.stats import SeedStats

NONE = "-"
"""Text of a missing value."""
GAP = 2
"""Spaces between the columns of a table in the terminal."""


@dataclass(frozen=True)
class Section:
    """A titled table of text, the common form of all printed formats."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})
    """Indices of the left-aligned columns, which contain words; the others contain numbers."""

    @property
    def narrowest(self) -> int:
        """Columns that the table needs if its words are wrapped between words."""
        widths = []
        for i, column in enumerate(zip(self.header, *self.rows, strict=True)):
            pieces = [piece for cell in column for piece in cell.split()] if i in self.left else column
            widths.append(max(map(len, pieces), default=0))
        return sum(widths) + GAP * (len(widths) - 1)


def count(number: float) -> str:
    """Format a number of images with at most four digits: 800, 51.2k, 1.28M."""
    return _scaled(number)


def flop(number: float) -> str:
    """Format a number of FLOPs with at most four digits: 1.23 PFLOP."""
    return _scaled(number, " KMGTPE", " ") + "FLOP"


def _scaled(number: float, prefixes: str = " kMGTPE", gap: str = "") -> str:
    power = 0
    # 999.95 rather than 1000: with one decimal it would be rounded to 1000.0
    while 999.95 <= abs(number) < math.inf and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if abs(number) < 100 else f"{number:.4g}"
    return digits + gap + prefixes[power].strip()


def duration(seconds: float) -> str:
    """Format a duration in hours or minutes if it is at least two of them, else in seconds."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def amount(wanted: Amount) -> str:
    """Format an amount of training: "51.2k images", "2 h of training", "3 EFLOP"."""
    if wanted.unit == "images":
        return f"{count(wanted.value)} images"
    return flop(wanted.value) if wanted.unit == "flops" else f"{duration(wanted.value)} of training"


def number(value: float) -> str:
    """Format a metric with four decimals below 0.1, three below 10, two below 100 and one above."""
    return f"{value:.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    size = abs(value)
    return 4 if 0 < size < 0.1 else 3 if size < 10 else 2 if size < 100 else 1


def spread(stats: SeedStats | None) -> str:
    """Format mean ± standard deviation, or the value of a single seed."""
    if stats is None:
        return NONE
    if stats.std is None:
        return number(stats.mean)
    return f"{number(stats.mean)} ± {stats.std:.{_decimals(stats.mean)}f}"
