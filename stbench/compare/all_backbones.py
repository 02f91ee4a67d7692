"""All backbones side by side: the tables that share data set, objective and protocol, combined into one.

FIDs of different settings are shown next to each other but not ranked. Ratios and verdicts are those of each
row's own table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stbench.compare.format import NONE, Section, amount, count
from stbench.compare.leaderboard import Comparison, Leaderboard, Row, RowAtBudget, Table, UnfinishedRow
from stbench.compare.names import names
from stbench.compare.question import Amount, metric_name
from stbench.compare.tables import best_value, ratio, sampling, seeds_in_brackets, value

EXPLANATION = (
    "{metric}s of different settings are shown side by side and are not ranked. Ratio and verdict compare a "
    "row with {baseline} in the same setting. n.d.: not distinguishable."
)
SHORT_VERDICTS = {
    "not distinguishable": "n.d.",
    "not trained that far": "not trained",
    "not evaluated there": "not evaluated",
    "too few seeds": "few seeds",
}
"""Abbreviations of the verdicts that are too long for a column."""
_NO_BASELINE = re.compile(r"no (.+) there|(.+) not sampled")
"""Verdicts that name the baseline."""


@dataclass(frozen=True)
class CombinedTables:
    """Several tables as one text."""

    heading: str
    text: str
    sections: tuple[Section, ...]


def combine_tables(leaderboard: Leaderboard) -> list[CombinedTables]:
    """Combine the tables of each data set, objective and protocol that has more than one setting."""
    # Tables with finished runs
    groups: dict[tuple[str, str, str], list[Table]] = {}
    for table in leaderboard.tables:
        if table.protocol:
            groups.setdefault((table.dataset, table.objective, table.protocol), []).append(table)

    # Tables without finished runs have no protocol yet and join every group of their data set and objective
    for (dataset, objective, _), tables in groups.items():
        tables += [
            table
            for table in leaderboard.tables
            if not table.protocol and (table.dataset, table.objective) == (dataset, objective)
        ]
    return [_combine(tables) for tables in groups.values() if len(tables) > 1]


def _combine(tables: Sequence[Table]) -> CombinedTables:
    first = tables[0]
    one_setting_each = len({table.backbone for table in tables}) == len(tables)
    scope = f"all {'backbones' if one_setting_each else 'settings'} under {first.objective}"
    parts = [first.dataset, scope, *sampling(first.protocol_fields)]
    student = _section(
        "Student only" if first.at else "Student only (equal last-stage steps)",
        tables,
        images=lambda table: table.student_images,
        at_budget=lambda row: row.student,
    )
    paid = _section(
        "Everything paid",
        tables,
        images=lambda table: table.paid_images,
        at_budget=lambda row: row.paid,
    )
    explanation = EXPLANATION.format(metric=metric_name(first.metric), baseline=first.baseline)
    return CombinedTables(
        heading=f"{', '.join(parts)} (protocol {first.protocol})", text=explanation, sections=(student, paid)
    )


def _section(
    title: str,
    tables: Sequence[Table],
    *,
    images: Callable[[Table], int],
    at_budget: Callable[[Row], RowAtBudget],
) -> Section:
    """Return all rows of all tables at one budget."""
    # If the budgets differ, the name of each setting is followed by its budget
    at = tables[0].at
    budgets = dict.fromkeys(amount(at or Amount("images", images(table))) for table in tables if table.rows)
    rows = []
    for table, setting in zip(tables, _setting_names(tables), strict=True):
        budget = f" ({count(images(table))})" if len(budgets) > 1 and table.rows else ""
        rows += [(setting + budget, *_cells(row, name, at_budget)) for row, name in names(table)]
    metric, versus = metric_name(tables[0].metric), f"vs. {tables[0].baseline}"
    header = ("backbone", "recipe", metric, versus, f"{metric}, best guidance", versus)
    return Section(f"{title}: {' or '.join(budgets)}", header, tuple(rows), frozenset({0, 1, 3, 5}))


def _setting_names(tables: Sequence[Table]) -> list[str]:
    """Return the backbones, followed by the setting hash where a backbone occurs twice."""
    backbones = [table.backbone for table in tables]
    return [
        f"{table.backbone} [{table.setting}]" if backbones.count(table.backbone) > 1 else table.backbone
        for table in tables
    ]


def _cells(row: Row | UnfinishedRow, name: str, at_budget: Callable[[Row], RowAtBudget]) -> tuple[str, ...]:
    if isinstance(row, UnfinishedRow):
        return f"{name} {seeds_in_brackets(row.seeds)}", NONE, row.word, NONE, NONE
    here = at_budget(row)
    return name, value(here), _comparison(here.plain), best_value(here.guided), _comparison(here.best)


def _comparison(comparison: Comparison) -> str:
    verdict = SHORT_VERDICTS.get(comparison.verdict, comparison.verdict)
    if found := _NO_BASELINE.fullmatch(verdict):
        verdict = f"no {found[1] or found[2]}"
    return verdict if comparison.ratio is None else f"{ratio(comparison)} {verdict}"
