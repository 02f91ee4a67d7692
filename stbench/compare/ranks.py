"""Mean ranks of rows over the tables of a leaderboard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from stbench.compare.leaderboard import MeanRank, Row, Table
from stbench.compare.question import Question
from stbench.compare.stats import SeedStats, mean, nan_last

Values = Callable[[Row], SeedStats | None]


def rank_names(table: Table) -> list[tuple[Row, str]]:
    """Return the finished rows with names that are unique in the table: the length tells equal ones apart."""
    occurrences = Counter(row.recipe for row in table.rows)
    return [
        (row, f"{row.recipe} [{row.length} steps]" if occurrences[row.recipe] > 1 else row.recipe)
        for row in table.rows
    ]


def mean_ranks(tables: Sequence[Table], question: Question) -> tuple[MeanRank, ...]:
    """Rank the rows that occur in all tables with finished runs; () for a single table.

    Rows are sorted by the rank at the student-only budget.
    """
    named = [{name: row for row, name in rank_names(table)} for table in tables if table.rows]
    common = [name for name in named[0] if all(name in rows for rows in named)] if len(named) > 1 else []
    if len(common) < 2:
        return ()
    student = _ranks(named, common, question, lambda row: row.student.value)
    guided = _ranks(named, common, question, _guided)
    paid = _ranks(named, common, question, lambda row: row.paid.value)
    ranks = [
        MeanRank(name, len(named), student.get(name), guided.get(name), paid.get(name)) for name in common
    ]
    return tuple(sorted(ranks, key=lambda rank: (rank.student is None, rank.student)))


def _guided(row: Row) -> SeedStats | None:
    return row.student.guided.value if row.student.guided else None


def _ranks(
    named: Sequence[dict[str, Row]], common: Sequence[str], question: Question, values: Values
) -> dict[str, float]:
    """Return the mean ranks of the common rows that have a value in all tables."""
    complete = [name for name in common if all(values(rows[name]) for rows in named)]
    ranks: dict[str, list[float]] = {name: [] for name in complete}
    for rows in named:
        found = {name: stats.mean for name in complete if (stats := values(rows[name]))}
        keys = {name: nan_last(question.falling(value)) for name, value in found.items()}
        for name, key in keys.items():
            lower = sum(other < key for other in keys.values())
            equal = sum(other == key for other in keys.values())
            ranks[name].append(lower + (equal + 1) / 2)
    return {name: mean(places) for name, places in ranks.items()}
