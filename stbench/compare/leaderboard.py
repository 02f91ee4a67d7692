"""The result of a comparison as plain data: tables, rows and their values at both budgets.

docs/protocol.md defines every value. Images, seconds and FLOPs are those of training. The field names are
the keys of the JSON output and, joined by underscores, the columns of the CSV output: to rename a field is to
change both formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stbench.compare.stats import SeedStats

Interval = tuple[float, float]
"""Flow-equivalent times between which guidance is on."""


@dataclass(frozen=True)
class BestGuidance:
    """The best point of the guidance grid that the rows of a table share, chosen by the mean over seeds."""

    scale: float
    interval: Interval
    fid: SeedStats
    edge: bool
    """Whether the scale is the smallest or largest of the grid, so that a better one may exist outside it."""


@dataclass(frozen=True)
class Comparison:
    """FID of a row compared with the baseline at the same budget."""

    ratio: float | None
    """FID of the row divided by that of the baseline: the geometric mean over common seeds."""
    p: float | None
    """Holm-adjusted p-value of a paired t-test on log FID; None without a test."""
    verdict: str
    """"better", "worse", "not distinguishable", or the reason why there is no test."""
    interval: tuple[float, float] | None = None
    """95 % confidence interval of the ratio, not adjusted; None without a test."""


@dataclass(frozen=True)
class ImagesToTarget:
    """Training images that a row needs to reach the baseline's mean FID at a budget."""

    target: float
    """FID to reach."""
    needed: int
    """The baseline's images at the budget."""
    student: float | None
    """Images of the last stage, mean over seeds; None unless every seed reaches the target."""
    paid: float | None
    """`student` plus the images of all earlier stages."""
    arrived: int
    """Number of seeds that reach the target."""
    limit: int
    """Images of the last stage at the row's last evaluation."""
    speedup_student: float | None
    """`needed` divided by `student`."""
    speedup_paid: float | None
    """`needed` divided by `paid`."""
    bound: bool = False
    """Whether a seed was below the target at its first evaluation, so that `student` is an upper bound."""


@dataclass(frozen=True)
class RowAtBudget:
    """One row at one budget. Values are None where the row was not evaluated there."""

    images: int
    """Images of the last stage that the budget allows."""
    step: int | None
    """The evaluated step; None if there is none, also where FID is interpolated."""
    fid: SeedStats | None
    inception: SeedStats | None
    val_loss: SeedStats | None
    guided: BestGuidance | None
    plain: Comparison
    """The row without guidance against the baseline without guidance."""
    best: Comparison
    """The row at its best guidance against the baseline at the baseline's best guidance."""
    flops_student: SeedStats | None
    flops_total: SeedStats | None
    seconds_student: SeedStats | None
    seconds_total: SeedStats | None
    reach: ImagesToTarget | None

    @property
    def interpolated(self) -> bool:
        """Whether FID is interpolated between two evaluations."""
        return self.fid is not None and self.step is None


@dataclass(frozen=True)
class MeanPoint:
    """One point of a row's learning curve: FID without guidance over the seeds."""

    images: int
    """Images of the last stage."""
    fid: SeedStats


@dataclass(frozen=True)
class Row:
    """The finished seeds of one recipe, at both budgets."""

    recipe: str
    """Name of the row: the recipe and the options that were set."""
    length: int
    """Steps of the last stage."""
    backbone: str
    objective: str
    needs: str
    """What the recipe needs from outside the model; "" for nothing."""
    seeds: tuple[int, ...]
    unfinished: tuple[int, ...]
    """Requested seeds without results; a note of the table gives the reason."""
    earlier_images: int
    """Training images of the earlier stages."""
    student: RowAtBudget
    """At the student-only budget."""
    paid: RowAtBudget
    """At the everything-paid budget."""
    curve: tuple[MeanPoint, ...]
    """All steps at which every seed was evaluated, including those beyond the budgets."""
    paths: tuple[str, ...]
    """Run folders, one per seed."""


@dataclass(frozen=True)
class UnfinishedRow:
    """A requested row of which no seed is finished."""

    recipe: str
    length: int
    seeds: tuple[int, ...]
    state: str
    """State of every seed, with error messages."""
    word: str
    """The same in short: "waiting", "failed", "failed, waiting"."""


@dataclass(frozen=True)
class Table:
    """The rows that may be compared: the baseline first, then by FID at the student-only budget."""

    setting: str
    """Setting hash."""
    protocol: str
    """Protocol hash; "" for a setting without a finished run."""
    dataset: str
    backbone: str
    objective: str
    batch: int | None
    precision: str | None
    protocol_fields: Mapping[str, Any]
    student_images: int
    """Student-only budget: images of the last stage."""
    paid_images: int
    """Everything-paid budget: images of all stages."""
    rows: tuple[Row, ...]
    absent: tuple[UnfinishedRow, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Leaderboard:
    """All tables, and the notes on runs that belong to none of them."""

    tables: tuple[Table, ...]
    notes: tuple[str, ...]
