"""What a comparison says: tables, rows and their figures. Plain data, without torch, files or formats.

docs/protocol.md says what every figure means. Images, seconds and FLOPs are those of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stbench.stats import Cell

Interval = tuple[float, float]


@dataclass(frozen=True)
class Guided:
    """The best scale of the guidance grid that the rows of a table share, chosen on the mean over seeds."""

    scale: float
    interval: Interval
    fid: Cell
    edge: bool
    """Whether the best scale is the grid's smallest or largest, so that a better one may lie outside."""


@dataclass(frozen=True)
class Reach:
    """Images until a row comes down to the baseline's mean FID at the row's budget."""

    target: float
    images: float | None
    """Mean over seeds; None unless every seed arrives."""
    arrived: int
    limit: int
    """Images at the row's last point, beyond which nothing is claimed."""
    speedup: float | None
    """The baseline's images over the row's."""


@dataclass(frozen=True)
class Against:
    """A row against the baseline at equal images, with one way of counting them."""

    images: int
    """Images of the row at its budget: of the last stage, or of all stages."""
    fid: Cell | None
    """The baseline's FID at as many images; None where it has none."""
    ratio: float | None
    """Geometric mean over common seeds of the row's FID by the baseline's."""
    p: float | None
    """Holm-adjusted p-value; None without a test."""
    verdict: str
    reach: Reach | None


@dataclass(frozen=True)
class Point:
    """One point of a row's learning curve: images of the last stage, FID without guidance over the seeds."""

    images: int
    fid: Cell


@dataclass(frozen=True)
class Row:
    """One recipe over its seeds at its budget, the last step that it shares with the baseline."""

    recipe: str
    backbone: str
    objective: str
    needs: str
    seeds: tuple[int, ...]
    unfinished: tuple[int, ...]
    """Seeds that were started and are not in the figures; a note of the table says why."""
    steps: int
    images: int
    fid: Cell
    inception: Cell | None
    val_loss: Cell
    guided: Guided | None
    flops_student: Cell
    flops_total: Cell
    seconds_student: Cell
    seconds_total: Cell
    student: Against
    paid: Against
    curve: tuple[Point, ...]
    """All steps that every seed has, also beyond the budget."""
    paths: tuple[str, ...]

    @property
    def earlier_images(self) -> int:
        """Images that earlier stages were trained on."""
        return self.paid.images - self.student.images


@dataclass(frozen=True)
class Table:
    """The rows that may be compared with one another: the baseline, then by budget and FID."""

    setting: str
    protocol: str
    dataset: str
    backbone: str
    objective: str
    batch: int
    precision: str
    protocol_fields: Mapping[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Leaderboard:
    """All tables, and what belongs to none of them."""

    tables: tuple[Table, ...]
    notes: tuple[str, ...]
