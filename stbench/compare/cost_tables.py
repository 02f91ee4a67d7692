"""The images, FLOPs and time of the rows of a table: to a target, and at a budget."""

from __future__ import annotations

from collections.abc import Callable

from stbench.compare.format import NONE, Section, count, duration, flop, number
from stbench.compare.leaderboard import ImagesToTarget, Interval, Row, RowAtBudget, Table
from stbench.compare.names import finished_rows
from stbench.compare.question import metric_name
from stbench.compare.stats import SeedStats

# --- Images to target ---


def target_sections(table: Table, at_budget: Callable[[Row], RowAtBudget]) -> list[Section]:
    """Return images, FLOPs and time to the target at a budget; [] if there is no target."""
    rows = [(row, name, at_budget(row).reach) for row, name in finished_rows(table)]
    known = next((reach for _, _, reach in rows if reach), None)
    if known is None:
        return []
    lines = [(name, *(_reach(reach, row) if reach else [NONE] * 4)) for row, name, reach in rows]
    target = _target(table, known)
    header = ("recipe", "student only", "speed-up", "everything paid", "speed-up")
    images = Section(f"Images to reach {target}", header, tuple(lines))

    costs = [(name, *(_target_costs(reach) if reach else [NONE] * 4)) for row, name, reach in rows]
    title = f"Speed-up (95 % interval) and cost to reach {target}"
    header = ("recipe", "student only", "everything paid", "FLOPs", "time")
    return [images, Section(title, header, tuple(costs))]


def _target(table: Table, reach: ImagesToTarget) -> str:
    metric = f"{metric_name(table.metric)} of {number(reach.target)}"
    if table.target is not None:
        return metric
    return f"{table.baseline}'s {metric} (at {count(reach.needed or 0)} images)"


def _reach(reach: ImagesToTarget, row: Row) -> tuple[str, ...]:
    if reach.student is None or reach.paid is None:
        some = f" ({reach.arrived} of {len(row.seeds)} seeds)" if reach.arrived else ""
        paid_limit = reach.limit + row.earlier_images
        return f"> {count(reach.limit)}{some}", NONE, f"> {count(paid_limit)}{some}", NONE
    at_most, at_least = ("<= ", ">= ") if reach.bound else ("", "")
    return (
        f"{at_most}{count(reach.student)}",
        f"{at_least}{_speedup(reach.speedup_student)}",
        f"{at_most}{count(reach.paid)}",
        f"{at_least}{_speedup(reach.speedup_paid)}",
    )


def _target_costs(reach: ImagesToTarget) -> tuple[str, ...]:
    return (
        _interval(reach.interval_student),
        _interval(reach.interval_paid),
        _last_and_all(reach.flops_student, reach.flops_paid, flop),
        _last_and_all(reach.seconds_student, reach.seconds_paid, duration),
    )


def _interval(interval: Interval | None) -> str:
    return NONE if interval is None else "{:.2f}x to {:.2f}x".format(*interval)


def _speedup(speedup: float | None) -> str:
    return NONE if speedup is None else f"{speedup:.2f}x"


# --- Costs at a budget ---


def student_costs(table: Table) -> Section:
    """Return what the rows need from outside the model, and the costs at the student-only budget."""
    rows = [(name, row.needs or NONE, *_costs(row, row.student)) for row, name in finished_rows(table)]
    title = "Cost at the student-only budget: last stage / all stages"
    return Section(title, ("recipe", "needs", "images", "FLOPs", "time"), tuple(rows), frozenset({0, 1}))


def paid_costs(table: Table) -> Section:
    """Return the costs at the everything-paid budget."""
    rows = [(name, *_costs(row, row.paid)) for row, name in finished_rows(table)]
    title = "Cost at the everything-paid budget: last stage / all stages"
    return Section(title, ("recipe", "images", "FLOPs", "time"), tuple(rows))


def _costs(row: Row, at_budget: RowAtBudget) -> tuple[str, str, str]:
    images = at_budget.images if at_budget.step else None
    return (
        _last_and_all(images, None if images is None else images + row.earlier_images, count),
        _last_and_all(_mean(at_budget.flops_student), _mean(at_budget.flops_total), flop),
        _last_and_all(_mean(at_budget.seconds_student), _mean(at_budget.seconds_total), duration),
    )


def _mean(stats: SeedStats | None) -> float | None:
    return stats.mean if stats else None


def _last_and_all(last: float | None, total: float | None, text: Callable[[float], str]) -> str:
    """Format a cost of the last stage and of all stages, once if they are equal."""
    if last is None or total is None:
        return NONE
    return text(last) if text(last) == text(total) else f"{text(last)} / {text(total)}"
