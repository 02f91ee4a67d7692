"""The leaderboard at a glance: one table of at most nine columns per setting, and what to run next.

`tables.sections` has every number. A narrow terminal leaves out columns in the order of `LEVELS`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stbench.compare.format import NONE, Section, amount, count, flop
from stbench.compare.leaderboard import Comparison, ImagesToTarget, MeanRank, Row, RowAtBudget, Table
from stbench.compare.names import NEEDS_MARK, names
from stbench.compare.next_step import next_step
from stbench.compare.question import BASELINE, Amount, Unit, metric_name
from stbench.compare.stats import SeedStats
from stbench.compare.tables import sampling, seeds_in_brackets
from stbench.runs.guide_text import without_network

LEVELS = range(5)
"""0: all; 1: no interval of the speed-up; 2: none of the ratio; 3: no IS; 4: no deviation over seeds."""
MARKS = {"better": "+", "worse": "-", "not distinguishable": "=", "baseline": "", "no baseline": ""}
"""Verdict -> mark behind a ratio; all other verdicts are reasons why there is no test."""
NOT_TESTED = "?"
EQUAL: dict[Unit, str] = {"images": "images", "seconds": "time", "flops": "FLOPs"}
"""What is equal at a budget, in words."""
CI = " (95 % CI)"


@dataclass(frozen=True)
class Entry:
    """A row of a compact table with the table that it was compared in."""

    table: Table
    row: Row
    name: str

    @property
    def baseline(self) -> Row | None:
        """The row with which this one was compared."""
        return next((row for row in self.table.rows if row.student.plain.verdict == "baseline"), None)

    @property
    def cost(self) -> float | None:
        """Training FLOPs of all stages at the student-only budget, mean over seeds."""
        stats = self.row.student.flops_total
        return stats.mean if stats else None

    @property
    def relative_cost(self) -> float | None:
        """`cost` divided by that of the baseline."""
        other = self.baseline.student.flops_total if self.baseline else None
        return self.cost / other.mean if self.cost is not None and other and other.mean else None


# --- Words about a table ---


def words(table: Table) -> str:
    """Return the setting and protocol of a table in one line of words."""
    parts = [f"{table.backbone} on {table.dataset}", f"{table.objective} objective"]
    parts += [f"batch {table.batch}"] if table.batch else []
    parts += [table.precision] if table.precision else []
    fields = table.protocol_fields
    evaluation = [f"{fields['samples']} samples"] if "samples" in fields else []
    evaluation += [text.replace(" sampler with", ",").replace("function ", "") for text in sampling(fields)]
    ratios = fields.get("fdr")
    evaluation += [f"FDr over {', '.join(ratios)}"] if isinstance(ratios, Mapping) else []
    return ", ".join(parts) + (f"; {', '.join(evaluation)}" if evaluation else "")


def headings(tables: Sequence[Table]) -> list[str]:
    """Return `words` of all tables, with the options or hashes that tell apart those with equal words."""
    lines = list(map(words, tables))
    return [
        line if lines.count(line) == 1 else f"{line} ({_difference(table, line, tables)})"
        for line, table in zip(lines, tables, strict=True)
    ]


def _difference(table: Table, line: str, tables: Sequence[Table]) -> str:
    """Return up to three options of a table in which others with the same words differ, or its hashes."""
    others = [other for other in tables if words(other) == line]
    fields = {f"train.{name}": value for name, value in table.training.items()}
    fields |= {f"eval.{name}": value for name, value in table.protocol_fields.items()}
    differing = []
    for name, value in fields.items():
        section = "training" if name.startswith("train.") else "protocol_fields"
        if any(getattr(other, section).get(name.partition(".")[2]) != value for other in others):
            differing.append(f"{name} {str(value)[:24]}")
    return ", ".join(differing[:3]) or f"setting {table.setting}, protocol {table.protocol}"


def budget_line(table: Table) -> str:
    """Say at which images the rows of a table are compared."""
    images = table.student_images
    batch = table.batch or 1
    step = f", step {images // batch}" if images % batch == 0 else ""
    parts = [
        f"at {count(images)} images{step}" if not table.at else f"at {amount(table.at)} of the last stage"
    ]
    if not table.one_budget:
        equal = amount(table.at or Amount("images", table.paid_images))
        parts.append(f"paid: at {equal} of all stages")
    metric = metric_name(table.metric)
    reach = next((row.student.reach for row in table.rows if row.student.reach), None)
    if table.target is not None:
        parts.append(f"speed-up: to {metric} {_number(table.target)}")
    elif reach:
        parts.append(f"speed-up: to {table.baseline}'s {metric} {_number(reach.target)}")
    return "; ".join(parts)


def missing_line(table: Table) -> str:
    """Name the rows without results, in one line; "" if there are none."""
    by_state: dict[str, list[str]] = {}
    for row in table.absent:
        by_state.setdefault(f" {row.word}", []).append(f"{row.recipe} {seeds_in_brackets(row.seeds)}")
    partly = [f"{row.recipe} {seeds_in_brackets(row.unfinished)}" for row in table.rows if row.unfinished]
    if partly:
        by_state[""] = partly
    states = [", ".join(rows) + state for state, rows in by_state.items()]
    return f"no results yet: {'; '.join(states)}" if states else ""


def reasons_line(shown: Sequence[Entry]) -> str:
    """Say why rows were not tested, in one line; "" if all were, or without a baseline."""
    found: dict[str, list[str]] = {}
    for entry in shown:
        student, paid = entry.row.student.plain.verdict, entry.row.paid.plain.verdict
        if student not in MARKS:
            found.setdefault(student, []).append(entry.name)
        elif paid not in MARKS and student != "baseline":
            found.setdefault(f"paid, {paid}", []).append(entry.name)
    most = max(2, len(shown) - 1)  # the baseline is not tested against itself
    named = {why: "all rows" if len(who) >= most else ", ".join(who) for why, who in found.items()}
    reasons = [f"{who} ({why})" for why, who in named.items()]
    return f"not tested: {'; '.join(reasons)}" if reasons else ""


# --- The table ---


def entries(table: Table) -> list[Entry]:
    """Return the rows of a table; options are named only where they tell rows of one recipe apart."""
    finished = [(row, name) for row, name in names(table) if isinstance(row, Row)]
    recipes = [recipe_of(row) for row, _ in finished]
    found = []
    for (row, name), recipe in zip(finished, recipes, strict=True):
        if recipes.count(recipe) == 1 and recipe != BASELINE:
            name = recipe + (NEEDS_MARK if row.needs else "")
        found.append(Entry(table, row, name))
    return found


def recipe_of(row: Row) -> str:
    """Return the recipe of a row without its options."""
    return row.recipe.partition(" (")[0]


def options_line(shown: Sequence[Entry]) -> str:
    """Name the options that `entries` left out; "" if there are none."""
    left_out = [entry.row.recipe for entry in shown if recipe_of(entry.row) == entry.name.rstrip(NEEDS_MARK)]
    named = [recipe.replace(" (", " ").removesuffix(")") for recipe in left_out if " (" in recipe]
    return f"options: {'; '.join(named)}" if named else ""


def section(shown: Sequence[Entry], title: str, level: int = 0, first: str = "recipe") -> Section:
    """Return the compact table of rows. Columns in which no row has a value are left out.

    Args:
        shown: At least one row.
        title: Title of the section.
        level: Which columns to leave out, of `LEVELS`.
        first: Heading of the names.
    """
    metric = metric_name(shown[0].table.metric)
    two_budgets = not all(entry.table.one_budget for entry in shown)
    relative = any(entry.relative_cost is not None and entry.row is not entry.baseline for entry in shown)
    columns: dict[str, list[str]] = {
        first: [entry.name for entry in shown],
        "n": [_seeds(entry.row) for entry in shown],
        metric: [_value(entry.row.student, level) for entry in shown],
    }
    if level < 3 and metric != "IS":
        columns["IS"] = [_mean(entry.row.student.inception) for entry in shown]
    columns["guided"] = [_guided(entry.row.student) for entry in shown]
    ratio, speedup = (name + (CI if level < limit else "") for name, limit in (("ratio", 2), ("speed-up", 1)))
    columns[ratio] = [_ratio(entry.row.student.plain, interval=level < 2) for entry in shown]
    columns[speedup] = [_speedup(entry.row.student.reach, interval=level < 1) for entry in shown]
    if two_budgets:
        columns["paid"] = [_ratio(entry.row.paid.plain, interval=False) for entry in shown]
    columns["cost" if relative else "FLOPs"] = [_cost(entry, relative=relative) for entry in shown]
    kept = {name: cells for name, cells in columns.items() if any(cell != NONE for cell in cells)}
    return Section(title, tuple(kept), tuple(zip(*kept.values(), strict=True)))


def _seeds(row: Row) -> str:
    total = len(row.seeds) + len(row.unfinished)
    return f"{len(row.seeds)}/{total}" if row.unfinished else f"{total}"


def _number(value: float) -> str:
    """Format a metric with about three digits."""
    size = abs(value)
    decimals = 4 if 0 < size < 0.1 else 3 if size < 1 else 2 if size < 100 else 1
    return f"{value:.{decimals}f}"


def _value(row: RowAtBudget, level: int) -> str:
    stats = row.value
    if stats is None:
        return NONE
    mean = ("~" if row.interpolated else "") + _number(stats.mean)
    if stats.std is None or level >= 4:
        return mean
    decimals = len(_number(stats.mean).partition(".")[2])
    return f"{mean}±{stats.std:.{decimals}f}"


def _mean(stats: SeedStats | None) -> str:
    return NONE if stats is None else _number(stats.mean)


def _guided(row: RowAtBudget) -> str:
    if row.guided is None:
        return NONE
    edge = "*" if row.guided.edge else ""
    guides = f" {without_network(row.guided.guides)}" if row.guided.guides else ""
    return f"{_number(row.guided.value.mean)}@{row.guided.scale:g}{edge}{guides} {mark(row.best)}".rstrip()


def mark(comparison: Comparison) -> str:
    """Return the mark of a verdict."""
    return MARKS.get(comparison.verdict, NOT_TESTED)


def _ratio(comparison: Comparison, *, interval: bool) -> str:
    if comparison.ratio is None:
        return NONE
    if comparison.verdict == "baseline":
        return "1"
    between = "({:.2f}-{:.2f}) ".format(*comparison.interval) if interval and comparison.interval else ""
    return f"{comparison.ratio:.2f} {between}{mark(comparison)}"


def _speedup(reach: ImagesToTarget | None, *, interval: bool) -> str:
    if reach is None or reach.needed is None:
        return NONE
    if reach.speedup_student is not None:
        between = reach.interval_student if interval else None
        text = f"{'>=' if reach.bound else ''}{reach.speedup_student:.2f}x"
        return text + (" ({:.2f}-{:.2f})".format(*between) if between else "")
    # No seed reached the target: a bound from the images of the last evaluation
    return NONE if reach.arrived or not reach.limit else f"<{reach.needed / reach.limit:.2f}x"


def _cost(entry: Entry, *, relative: bool) -> str:
    if not relative:
        return NONE if entry.cost is None else flop(entry.cost)
    if entry.relative_cost is None or not math.isfinite(entry.relative_cost):
        return NONE
    extra = round(100 * (entry.relative_cost - 1))
    return f"{extra:+d}%" if extra else "0%"


# --- The lines below ---


def legend(sections: Sequence[Section], tables: Sequence[Table]) -> list[str]:
    """Explain the columns and marks of the compact tables, in two lines."""
    columns = {name for shown in sections for name in shown.header}
    baselines = dict.fromkeys(table.baseline for table in tables if table.rows)
    baseline, metric = " or ".join(baselines), metric_name(tables[0].metric)
    equal = EQUAL[tables[0].at.unit if tables[0].at else "images"]
    explained = {
        "n": "n: seeds",
        "guided": f"guided: {metric}@best scale, * edge of the grid",
        "ratio": f"ratio: {metric} / {baseline}'s at equal {equal} of the last stage",
        "paid": f"paid: at equal {equal} of all stages",
        "cost": "cost: extra FLOPs, all stages",
    }
    if any(name.startswith("ratio") for name in columns):
        columns.add("ratio")
    lines = ["; ".join(text for name, text in explained.items() if name in columns)]
    if "ratio" in columns:
        lines.append("+ better, - worse, = not distinguishable (paired t-test, Holm, 5 %), ? not tested")
    return lines


def remarks(tables: Sequence[Table], shown: Sequence[Entry]) -> list[str]:
    """Return the lines below a compact table of rows from `tables`."""
    rows = [entry.row for entry in shown]
    needs = dict.fromkeys(f"{recipe_of(row)}{NEEDS_MARK} needs {row.needs}" for row in rows if row.needs)
    lines = [options_line(shown), "; ".join(needs), reasons_line(shown)]
    lines += [line for table in tables for line in (missing_line(table), next_step(table))]
    return [line for line in lines if line]


def ranks_line(ranks: Sequence[MeanRank]) -> str:
    """Name the mean ranks over several settings, best first."""
    known = [f"{rank.recipe} {rank.student:.1f}" for rank in ranks if rank.student is not None]
    return f"mean rank over {ranks[0].tables} settings: {'; '.join(known)}"
