"""Leaderboards of synthetic runs."""

from __future__ import annotations

from collections.abc import Iterable

from stbench.compare.build import build_leaderboard
from stbench.compare.leaderboard import Row, Table
from stbench.compare.question import QUESTION, Question
from stbench.runs.journal import JournalEntry
from stbench.runs.records import RunRecord


def only_table(
    records: Iterable[RunRecord], entries: Iterable[JournalEntry] = (), question: Question = QUESTION
) -> Table:
    """Return the single table of these records and journal entries."""
    (table,) = build_leaderboard(records, entries, question).tables
    return table


def only_row(records: Iterable[RunRecord], recipe: str) -> Row:
    """Return the single row of a recipe in the single table of these records."""
    (row,) = [row for row in only_table(records).rows if row.recipe == recipe]
    return row
