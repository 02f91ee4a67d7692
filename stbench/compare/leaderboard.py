"""What a comparison says: tables, rows and their figures. Plain data, without torch, files or formats.

docs/protocol.md says what every figure means. Images, seconds and FLOPs are those of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stbench.compare.stats import Cell

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
class Versus:
    """A row's FID against the baseline's at the same budget."""

    ratio: float | None
    """Geometric mean over common seeds of the row's FID by the baseline's."""
    p: float | None
    """Holm-adjusted p-value; None without a test."""
    verdict: str
    interval: tuple[float, float] | None = None
    """95 % interval of the ratio from the paired log differences, not adjusted; None without a test."""


@dataclass(frozen=True)
class Reach:
    """Images until a row comes down to the baseline's mean FID at a budget."""

    target: float
    needed: int
    """The baseline's images at the budget."""
    student: float | None
    """Images of the last stage, mean over seeds; None unless every seed arrives."""
    paid: float | None
    """The same with the images of all earlier stages."""
    arrived: int
    limit: int
    """Images of the last stage at the row's last point, beyond which nothing is claimed."""
    speedup_student: float | None
    """The baseline's images over the row's."""
    speedup_paid: float | None
    bound: bool = False
    """Whether a seed was there at its first evaluation, so that it needs fewer images than these."""


@dataclass(frozen=True)
class Standing:
    """One row at one budget. Figures are None where the row was not evaluated there."""

    images: int
    """Images of the last stage that the budget leaves."""
    step: int | None
    """The evaluation that the figures are of; None where FID is interpolated or there is none."""
    fid: Cell | None
    inception: Cell | None
    val_loss: Cell | None
    guided: Guided | None
    plain: Versus
    """Without guidance, against the baseline without guidance."""
    best: Versus
    """At its best guidance, against the baseline at the baseline's best guidance."""
    flops_student: Cell | None
    flops_total: Cell | None
    seconds_student: Cell | None
    seconds_total: Cell | None
    reach: Reach | None

    @property
    def interpolated(self) -> bool:
        """Whether FID lies between two evaluations."""
        return self.fid is not None and self.step is None


@dataclass(frozen=True)
class Point:
    """One point of a row's learning curve: images of the last stage, FID without guidance over the seeds."""

    images: int
    fid: Cell


@dataclass(frozen=True)
class Row:
    """One recipe over its seeds, at both budgets."""

    recipe: str
    length: int
    """Steps that the last stage was trained for."""
    backbone: str
    objective: str
    needs: str
    seeds: tuple[int, ...]
    unfinished: tuple[int, ...]
    """Seeds that were asked for and are not in the figures; a note of the table says why."""
    earlier_images: int
    """Images that earlier stages were trained on."""
    student: Standing
    """At equal steps of the last stage."""
    paid: Standing
    """At equal images of all stages."""
    curve: tuple[Point, ...]
    """All steps that every seed has, also beyond the budgets."""
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Absent:
    """A row that was asked for and of which no seed is finished."""

    recipe: str
    length: int
    seeds: tuple[int, ...]
    state: str
    """Of each seed, with the errors."""
    word: str
    """The same in short: "waiting", "failed", "failed, waiting"."""


@dataclass(frozen=True)
class Table:
    """The rows that may be compared with one another: the baseline, then by FID at equal steps."""

    setting: str
    protocol: str
    """"" for a setting of which nothing is finished."""
    dataset: str
    backbone: str
    objective: str
    batch: int | None
    precision: str | None
    protocol_fields: Mapping[str, Any]
    student_images: int
    """The first budget: images of the last stage."""
    paid_images: int
    """The second: images of all stages."""
    rows: tuple[Row, ...]
    absent: tuple[Absent, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Leaderboard:
    """All tables, and what belongs to none of them."""

    tables: tuple[Table, ...]
    notes: tuple[str, ...]
