"""One table of the leaderboard as text: sections of at most 100 columns.

Each budget has a section of values and two of verdicts. Learning curve, images to target and costs follow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from stbench.compare.format import NONE, Section, count, duration, flop, number, spread
from stbench.compare.leaderboard import (
    BestGuidance,
    Comparison,
    ImagesToTarget,
    Row,
    RowAtBudget,
    Table,
    UnfinishedRow,
)
from stbench.compare.rows import BASELINE
from stbench.compare.stats import SeedStats

STATE_LENGTH = 60
"""Characters of an unfinished row's state in the verdict column; the notes have the full text."""
CURVE_POINTS = 5
"""Points of a learning curve that fit in 100 columns."""
NEEDS_MARK = "†"
"""Marks a row that needs something from outside the model."""

AtBudget = Callable[[Row], RowAtBudget]
"""Selects one of a row's two budgets."""


# --- Headings and names ---


def heading(table: Table) -> str:
    """Return what the runs of a table have in common, in one line."""
    parts = [table.dataset, table.backbone, table.objective]
    parts += [f"batch {table.batch}"] if table.batch else []
    parts += [table.precision] if table.precision else []
    return ", ".join([*parts, *sampling(table.protocol_fields)])


def sampling(fields: Mapping[str, Any]) -> list[str]:
    """Describe the sampler and its network evaluations per image; [] if the protocol does not name them."""
    if "sampler" not in fields or "steps" not in fields:
        return []
    steps = fields["steps"]
    # Heun's method evaluates twice per step, except in the last (Euler) step.
    evaluations = 2 * steps - 1 if fields["sampler"] == "heun" else steps
    return [f"{fields['sampler']} sampler with {evaluations} function evaluations"]


def hashes(table: Table) -> str:
    """Return the hashes of a table and the fields of its evaluation protocol."""
    fields = ", ".join(f"{name} {_short(value)}" for name, value in table.protocol_fields.items())
    text = f"setting {table.setting}" + (f", protocol {table.protocol}" if table.protocol else "")
    return f"{text}{': ' if fields else ''}{fields}"


def _short(value: Any) -> str:
    """Shorten a hash to its first 8 digits; return other values unchanged."""
    text = str(value)
    return text[:8] if len(text) >= 40 and " " not in text else text


def names(table: Table) -> list[tuple[Row | UnfinishedRow, str]]:
    """Return all rows with their names: the recipe, its length if the recipe occurs twice, the needs mark."""
    rows: list[Row | UnfinishedRow] = [*table.rows, *table.absent]
    occurrences = Counter(row.recipe for row in rows)
    named = []
    for row in rows:
        length = f" [{row.length} steps]" if occurrences[row.recipe] > 1 else ""
        mark = NEEDS_MARK if isinstance(row, Row) and row.needs else ""
        named.append((row, row.recipe + length + mark))
    return named


def needs_notes(table: Table) -> list[str]:
    """Name what rows need from outside the model."""
    return [f"{name} needs {row.needs}" for row, name in _finished(table) if row.needs]


def _finished(table: Table) -> list[tuple[Row, str]]:
    return [(row, name) for row, name in names(table) if isinstance(row, Row)]


# --- All sections of a table ---


def sections(table: Table) -> list[Section]:
    """Return the sections of a table in their printed order."""
    if not table.rows:
        return [_states(table)]
    one_budget = table.paid_images == table.student_images

    # Values and verdicts at the student-only budget
    step = table.student_images // (table.batch or 1)
    title = f"Student only (equal last-stage steps): step {step}, {count(table.student_images)} images"
    if one_budget:
        title += "; no row has an earlier stage, so this is also everything paid"
    budgets = [_student_values(table, title), *_verdict_pair(table, lambda row: row.student)]
    to_target = [_images_to_target(table, lambda row: row.student)]
    costs = [_student_costs(table)]

    # Values and verdicts at the everything-paid budget, if it is another one
    if not one_budget:
        title = f"Everything paid: {count(table.paid_images)} images of all stages together"
        budgets += [_paid_values(table, title), *_verdict_pair(table, lambda row: row.paid)]
        to_target += [_images_to_target(table, lambda row: row.paid)]
        costs += [_paid_costs(table)]

    return [*budgets, _learning_curve(table), *filter(None, to_target), *costs]


def _states(table: Table) -> Section:
    rows = [
        (name, seeds_in_brackets(row.seeds), row.state)
        for row, name in names(table)
        if isinstance(row, UnfinishedRow)
    ]
    return Section("No finished runs", ("recipe", "seeds", "state"), tuple(rows), frozenset({0, 1, 2}))


# --- Values at a budget ---


def _student_values(table: Table, title: str) -> Section:
    rows: list[tuple[str, ...]] = []
    for row, name in names(table):
        if isinstance(row, UnfinishedRow):
            rows.append((name, f"{seeds_in_brackets(row.seeds)} {row.word}", *[NONE] * 4))
        else:
            seeds = [*map(str, row.seeds), *(seeds_in_brackets([seed]) for seed in row.unfinished)]
            rows.append((name, " ".join(seeds), *_values(row.student)))
    header = ("recipe", "seeds", "FID", "IS", "FID, best guidance", "val loss")
    return Section(title, header, tuple(rows), frozenset({0, 1}))


def _paid_values(table: Table, title: str) -> Section:
    rows: list[tuple[str, ...]] = []
    for row, name in names(table):
        if isinstance(row, UnfinishedRow):
            rows.append((name, *[NONE] * 5))
        else:
            last_stage = count(row.paid.images) if row.paid.fid else NONE
            rows.append((name, last_stage, *_values(row.paid)))
    header = ("recipe", "last stage", "FID", "IS", "FID, best guidance", "val loss")
    return Section(title, header, tuple(rows))


def _values(row: RowAtBudget) -> tuple[str, ...]:
    loss = NONE if row.val_loss is None else number(row.val_loss.mean)
    return fid(row), spread(row.inception), best_fid(row.guided), loss


def seeds_in_brackets(seeds: Sequence[int]) -> str:
    """Format seeds without results: "(3 4)"."""
    return f"({' '.join(map(str, seeds))})"


def fid(row: RowAtBudget) -> str:
    """Format FID without guidance; ~ marks an interpolated one."""
    return ("~" if row.interpolated else "") + spread(row.fid)


def best_fid(guided: BestGuidance | None) -> str:
    """Format FID at the best guidance with its scale; * marks the edge of the grid."""
    return f"{spread(guided.fid)} @{guided.scale:g}{'*' if guided.edge else ''}" if guided else NONE


# --- Verdicts at a budget ---


def _verdict_pair(table: Table, at_budget: AtBudget) -> list[Section]:
    """Return the verdicts without guidance and at the best guidance."""
    return [
        _verdicts(table, "without guidance", lambda row: at_budget(row).plain),
        _verdicts(table, "each at its best guidance", lambda row: at_budget(row).best),
    ]


def _verdicts(table: Table, guidance: str, comparison_of: Callable[[Row], Comparison]) -> Section:
    rows: list[tuple[str, ...]] = []
    for row, name in names(table):
        if isinstance(row, UnfinishedRow):
            rows.append((name, *[NONE] * 3, shorten(row.state, STATE_LENGTH, placeholder=" ...")))
        else:
            rows.append((name, *_comparison(comparison_of(row))))
    title = f"Comparison with {BASELINE} at the same budget, {guidance}"
    header = ("recipe", "ratio", "95 % interval", "p (Holm)", "verdict")
    return Section(title, header, tuple(rows), frozenset({0, 4}))


def _comparison(comparison: Comparison) -> tuple[str, ...]:
    p = comparison.p
    p_text = NONE if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"
    interval = NONE if comparison.interval is None else "{:.2f} to {:.2f}".format(*comparison.interval)
    return ratio(comparison), interval, p_text, comparison.verdict


def ratio(comparison: Comparison) -> str:
    """Format the ratio to the baseline with two decimals."""
    return NONE if comparison.ratio is None else f"{comparison.ratio:.2f}"


# --- Learning curve ---


def _learning_curve(table: Table) -> Section:
    """Return FID at the last images of any row and at about a half, a quarter and so on of them."""
    chosen: list[int] = []
    for images in sorted({point.images for row in table.rows for point in row.curve}, reverse=True):
        if len(chosen) < CURVE_POINTS and (not chosen or images <= chosen[-1] / 2):
            chosen.append(images)
    columns = chosen[::-1]
    rows = []
    for row, name in _finished(table):
        fids = {point.images: point.fid for point in row.curve}
        rows.append((name, *(spread(fids.get(images)) for images in columns)))
    header = ("recipe", *(f"at {count(images)}" for images in columns))
    return Section("FID during training, by images of the last stage", header, tuple(rows))


# --- Images to target ---


def _images_to_target(table: Table, at_budget: AtBudget) -> Section | None:
    """Return the images to the baseline's FID at a budget, or None without a baseline there."""
    rows = [(row, name, at_budget(row).reach) for row, name in _finished(table)]
    known = next((reach for _, _, reach in rows if reach), None)
    if known is None:
        return None
    lines = [(name, *(_reach(reach, row) if reach else [NONE] * 4)) for row, name, reach in rows]
    title = f"Images to reach {BASELINE}'s FID of {number(known.target)} (at {count(known.needed)} images)"
    header = ("recipe", "student only", "speed-up", "everything paid", "speed-up")
    return Section(title, header, tuple(lines))


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


def _speedup(speedup: float | None) -> str:
    return NONE if speedup is None else f"{speedup:.2f}x"


# --- Costs at a budget ---


def _student_costs(table: Table) -> Section:
    rows = [(name, row.needs or NONE, *_costs(row, row.student)) for row, name in _finished(table)]
    title = "Cost at the student-only budget: last stage / all stages"
    return Section(title, ("recipe", "needs", "images", "FLOPs", "time"), tuple(rows), frozenset({0, 1}))


def _paid_costs(table: Table) -> Section:
    rows = [(name, *_costs(row, row.paid)) for row, name in _finished(table)]
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
