"""Names of the rows of a table."""

from __future__ import annotations

from collections import Counter

from stbench.compare.leaderboard import Row, Table, UnfinishedRow

NEEDS_MARK = "†"
"""Marks a row that needs something from outside the model."""


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
    return [f"{name} needs {row.needs}" for row, name in finished_rows(table) if row.needs]


def finished_rows(table: Table) -> list[tuple[Row, str]]:
    """Return the rows with results and their names."""
    return [(row, name) for row, name in names(table) if isinstance(row, Row)]
