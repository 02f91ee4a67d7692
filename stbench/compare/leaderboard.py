"""The result of a comparison as plain data: tables, rows and their values at both budgets.

docs/protocol.md defines every value. Images, seconds and FLOPs are those of training. The field names are
the keys of the JSON output and, joined by underscores, the columns of the CSV output: to rename a field is to
change both formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stbench.compare.question import Amount
from stbench.compare.stats import SeedStats

Interval = tuple[float, float]
"""Lower and upper end: of a confidence interval, or of the flow-equivalent times at which guidance is on."""


@dataclass(frozen=True)
class BestGuidance:
    """The best guidance of a row, chosen by the mean over seeds.

    The candidates are the scales and intervals that the rows of a table share, without guides and, where the
    row was sampled with some, with its guides.
    """

    scale: float
    interval: Interval
    guides: str
    """Guides beside the scale, as in docs/guidance.md; "" for none."""
    value: SeedStats
    edge: bool
    """Whether the scale is the smallest or largest of the grid, so that a better one may exist outside it."""


@dataclass(frozen=True)
class Comparison:
    """The metric of a row compared with the baseline at the same budget."""

    ratio: float | None
    """The metric of the row divided by that of the baseline: the geometric mean over common seeds."""
    p: float | None
    """Holm-adjusted p-value of a paired t-test on log ratios; None without a test."""
    verdict: str
    """"better", "worse", "not distinguishable", or the reason why there is no test."""
    interval: tuple[float, float] | None = None
    """95 % confidence interval of the ratio, not adjusted; None without a test."""


@dataclass(frozen=True)
class ImagesToTarget:
    """What a row needs to reach a target: a given value, or the baseline's mean at a budget."""

    target: float
    """Value of the metric to reach."""
    needed: float | None
    """The baseline's images of the last stage: its budget, or those to a given target; None if unknown."""
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
    """`needed` and the images of the baseline's earlier stages, divided by `paid`."""
    bound: bool = False
    """Whether a seed was past the target at its first evaluation, so that `student` is an upper bound."""
    interval_student: Interval | None = None
    """95 % interval of the speed-up, paired over seeds; docs/protocol.md. None if it cannot be estimated."""
    interval_paid: Interval | None = None
    flops_student: float | None = None
    """Training FLOPs to the target: those of the last stage, mean over seeds."""
    flops_paid: float | None = None
    """`flops_student` plus those of all earlier stages."""
    seconds_student: float | None = None
    seconds_paid: float | None = None


@dataclass(frozen=True)
class RowAtBudget:
    """One row at one budget. Values are None where the row was not evaluated there."""

    images: int
    """Images of the last stage that the budget allows."""
    step: int | None
    """The evaluated step; None if there is none, also where the metric is interpolated."""
    value: SeedStats | None
    """The compared metric without guidance."""
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
        """Whether the metric is interpolated between two evaluations."""
        return self.value is not None and self.step is None


@dataclass(frozen=True)
class MeanPoint:
    """One point of a row's learning curve: the metric without guidance over the seeds."""

    images: int
    """Images of the last stage."""
    value: SeedStats


@dataclass(frozen=True)
class Row:
    """The finished seeds of one recipe, at both budgets."""

    recipe: str
    """Name of the row: the recipe and the options that were set."""
    options: Mapping[str, Any]
    """The options that were set."""
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
    area: SeedStats | None
    """Geometric mean of the metric from the table's `area_start` to the student-only budget: the area under
    the curve in log scale. None if the curve does not cover these images."""
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
    """The rows that may be compared: the baseline first, then by the metric at the student-only budget."""

    metric: str
    """Name of the compared metric; see `question.metric_name`."""
    baseline: str
    """Label of the row with which the others are compared, whether or not the table has it."""
    target: float | None
    """Value of the metric that was asked for; None if the target is the baseline's mean at each budget."""
    at: Amount | None
    """Seconds or FLOPs that are equal for all rows at a budget; None for images."""
    setting: str
    """Setting hash."""
    protocol: str
    """Protocol hash; "" for a setting without a finished run."""
    dataset: str
    backbone: str
    objective: str
    batch: int | None
    precision: str | None
    training: Mapping[str, Any]
    """The `train.*` options that all rows share."""
    protocol_fields: Mapping[str, Any]
    student_images: int
    """Student-only budget: images of the last stage. If another amount is equal, those of the baseline."""
    paid_images: int
    """Everything-paid budget: images of all stages. If another amount is equal, those of the baseline."""
    area_start: int
    """Images of the last stage at the latest of the rows' first evaluations."""
    rows: tuple[Row, ...]
    absent: tuple[UnfinishedRow, ...]
    notes: tuple[str, ...]

    @property
    def one_budget(self) -> bool:
        """Whether both budgets are the same for all rows."""
        if self.at is not None:
            return not any(row.earlier_images for row in self.rows)
        return self.paid_images == self.student_images


@dataclass(frozen=True)
class MeanRank:
    """The mean rank of a row over all tables with finished runs, among the rows that occur in all of them.

    Rank 1 is the best; rows of equal value share the mean of their ranks. None if the row lacks a value in a
    table.
    """

    recipe: str
    """Name of the row, with its length where a table has two rows of that name."""
    tables: int
    """Number of tables."""
    student: float | None
    """By the metric at the student-only budgets."""
    guided: float | None
    """By the metric at best guidance at the student-only budgets."""
    paid: float | None
    """By the metric at the everything-paid budgets."""


@dataclass(frozen=True)
class Leaderboard:
    """All tables, the notes on runs that belong to none of them, and the mean ranks over the tables."""

    tables: tuple[Table, ...]
    notes: tuple[str, ...]
    ranks: tuple[MeanRank, ...] = ()
