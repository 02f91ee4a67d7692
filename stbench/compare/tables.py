"""One table of the leaderboard as text: sections of at most 100 columns.

Each budget has a section of values and two of verdicts. Learning curve, images to target and costs follow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any

from stbench.compare.cost_tables import paid_costs, student_costs, target_sections
from stbench.compare.format import NONE, Section, amount, count, number, spread
from stbench.compare.leaderboard import (
    BestGuidance,
    Comparison,
    Row,
    RowAtBudget,
    Table,
    UnfinishedRow,
)
from stbench.compare.names import finished_rows, names
from stbench.compare.question import Amount, metric_name
from stbench.runs.guide_text import without_network

STATE_LENGTH = 60
"""Characters of an unfinished row's state in the verdict column; the notes have the full text."""
CURVE_POINTS = 5
"""Points of a learning curve that fit in 100 columns."""

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


# --- All sections of a table ---


def sections(table: Table) -> list[Section]:
    """Return the sections of a table in their printed order."""
    if not table.rows:
        return [states(table)]

    # Values and verdicts at the student-only budget
    step = table.student_images // (table.batch or 1)
    title = f"Student only (equal last-stage steps): step {step}, {count(table.student_images)} images"
    if table.at:
        title = f"Student only: {amount(table.at)} of the last stage"
    if table.one_budget:
        title += "; no row has an earlier stage, so this is also everything paid"
    budgets = [_student_values(table, title), *_verdict_pair(table, lambda row: row.student)]
    to_target = target_sections(table, lambda row: row.student)
    costs = [student_costs(table)]

    # Values and verdicts at the everything-paid budget, if it is another one
    if not table.one_budget:
        equal = amount(table.at or Amount("images", table.paid_images))
        title = f"Everything paid: {equal} of all stages together"
        budgets += [_paid_values(table, title), *_verdict_pair(table, lambda row: row.paid)]
        if table.target is None:  # a given target is the same at both budgets
            to_target += target_sections(table, lambda row: row.paid)
        costs += [paid_costs(table)]

    return [*budgets, _learning_curve(table), *to_target, *costs]


def states(table: Table) -> Section:
    """Return the states of all rows of a table without finished runs."""
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
    header = ("recipe", "seeds", *_value_names(table))
    return Section(title, header, tuple(rows), frozenset({0, 1}))


def _paid_values(table: Table, title: str) -> Section:
    rows: list[tuple[str, ...]] = []
    for row, name in names(table):
        if isinstance(row, UnfinishedRow):
            rows.append((name, *[NONE] * 5))
        else:
            last_stage = count(row.paid.images) if row.paid.value else NONE
            rows.append((name, last_stage, *_values(row.paid)))
    header = ("recipe", "last stage", *_value_names(table))
    return Section(title, header, tuple(rows))


def _value_names(table: Table) -> tuple[str, ...]:
    metric = metric_name(table.metric)
    return metric, "IS", f"{metric}, best guidance", "val loss"


def _values(row: RowAtBudget) -> tuple[str, ...]:
    loss = NONE if row.val_loss is None else number(row.val_loss.mean)
    return value(row), spread(row.inception), best_value(row.guided), loss


def seeds_in_brackets(seeds: Sequence[int]) -> str:
    """Format seeds without results: "(3 4)"."""
    return f"({' '.join(map(str, seeds))})"


def value(row: RowAtBudget) -> str:
    """Format the metric without guidance; ~ marks an interpolated one."""
    return ("~" if row.interpolated else "") + spread(row.value)


def best_value(guided: BestGuidance | None) -> str:
    """Format the metric at the best guidance with its scale and guides; * marks the edge of the grid."""
    if guided is None:
        return NONE
    guides = f" {without_network(guided.guides)}" if guided.guides else ""
    return f"{spread(guided.value)} @{guided.scale:g}{'*' if guided.edge else ''}{guides}"


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
    title = f"Comparison with {table.baseline} at the same budget, {guidance}"
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
    """Return the metric at the last images of any row and at about a half, a quarter and so on of them."""
    chosen: list[int] = []
    for images in sorted({point.images for row in table.rows for point in row.curve}, reverse=True):
        if len(chosen) < CURVE_POINTS and (not chosen or images <= chosen[-1] / 2):
            chosen.append(images)
    columns = chosen[::-1]
    rows = []
    for row, name in finished_rows(table):
        means = {point.images: point.value for point in row.curve}
        rows.append((name, *(spread(means.get(images)) for images in columns)))
    header = ("recipe", *(f"at {count(images)}" for images in columns))
    title = f"{metric_name(table.metric)} during training, by images of the last stage"
    return Section(title, header, tuple(rows))
