"""Which rows of a leaderboard are shown and in which order. Changes no number.

Filters apply after all tests: Holm's correction covers the rows that were compared, not those that are shown.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from stbench.compare.leaderboard import Leaderboard, Row, Table, UnfinishedRow
from stbench.compare.question import Question
from stbench.compare.stats import SeedStats, nan_last
from stbench.core.errors import UserError
from stbench.core.text import visible

SortKey = Literal["recipe", "metric", "is", "guided", "ratio", "speed-up", "paid", "cost"]
GroupKey = Literal["setting", "recipe", "backbone", "dataset", "objective"]
SORT_KEYS: tuple[SortKey, ...] = get_args(SortKey)
GROUP_KEYS: tuple[GroupKey, ...] = get_args(GroupKey)

TABLE_FIELDS = ("dataset", "backbone", "objective", "batch", "precision", "setting", "protocol")
Where = Mapping[str, Sequence[str]]
"""Field -> patterns, one of which must match."""


# --- Filters ---


def parse_where(conditions: Sequence[str]) -> Where:
    """Parse `["recipe=sra,repa", "backbone=sit*"]`; conditions on one field add up.

    Raises:
        UserError: A condition is not of the form FIELD=PATTERN.
    """
    where: dict[str, list[str]] = {}
    for condition in conditions:
        field, equals, patterns = condition.partition("=")
        if not equals or not field or not patterns:
            raise UserError(
                f"--where must be FIELD=PATTERN, found '{visible(condition, 60)}'; try --where recipe=sra"
            )
        # Commas in brackets belong to the name of a row, such as "repa (block=1, weight=0.5)"
        alternatives = re.split(r",(?![^()]*\))", patterns)
        where.setdefault(field.strip(), []).extend(pattern.strip() for pattern in alternatives)
    return where


def select_rows(leaderboard: Leaderboard, where: Where) -> Leaderboard:
    """Return the tables with the rows that match every condition of `where`, and their baselines.

    Raises:
        UserError: A field does not exist, or no row matches.
    """
    if not where:
        return leaderboard
    _require_fields(leaderboard, where)
    tables = []
    for table in leaderboard.tables:
        matching = [row for row in table.rows if _matches(fields_of(table, row), where)]
        absent = [row for row in table.absent if _matches(fields_of(table, row), where)]
        if matching or absent:
            shown = {id(row) for row in matching}
            kept = [row for row in table.rows if id(row) in shown or row.student.plain.verdict == "baseline"]
            tables.append(replace(table, rows=tuple(kept), absent=tuple(absent)))
    if not tables:
        labels = dict.fromkeys(row.recipe for table in leaderboard.tables for row in table.rows)
        raise UserError(f"no row matches --where; the rows are {visible('; '.join(labels), 400) or 'none'}")
    return replace(leaderboard, tables=tuple(tables))


def fields_of(table: Table, row: Row | UnfinishedRow) -> dict[str, Any]:
    """Return the fields of a row that `--where` can name."""
    fields: dict[str, Any] = {name: getattr(table, name) for name in TABLE_FIELDS}
    fields |= {f"train.{name}": value for name, value in table.training.items()}
    fields |= {f"eval.{name}": value for name, value in table.protocol_fields.items()}
    fields |= {"recipe": row.recipe, "steps": row.length}
    if isinstance(row, Row):
        fields |= {f"recipe.{name}": value for name, value in row.options.items()} | {"needs": row.needs}
    return fields


def _require_fields(leaderboard: Leaderboard, where: Where) -> None:
    known: dict[str, None] = {}
    for table in leaderboard.tables:
        for row in table.rows + table.absent:
            known |= dict.fromkeys(fields_of(table, row))
    for field in where:
        if known and field not in known:
            names = [name for name in known if "." not in name]
            more = [name for name in known if "." in name and name.startswith(field.partition(".")[0])]
            raise UserError(
                f"--where {visible(field, 60)}: no such field; choose one of "
                f"{visible(', '.join([*names, *more]), 400)}"
            )


def _matches(fields: Mapping[str, Any], where: Where) -> bool:
    return all(
        field in fields and any(_match(field, fields[field], pattern) for pattern in patterns)
        for field, patterns in where.items()
    )


def _match(field: str, value: Any, pattern: str) -> bool:
    """Whether a value has this text, or matches it as a pattern with * and ?; numbers by value."""
    text = value if isinstance(value, str) else json.dumps(value)
    texts = {text, text.partition(" (")[0]} if field == "recipe" else {text}
    if type(value) in (int, float):
        try:
            return float(pattern) == value
        except ValueError:
            return False
    return pattern in texts or any(fnmatchcase(text, pattern) for text in texts)


# --- Order ---


def sort_rows(leaderboard: Leaderboard, key: SortKey, question: Question) -> Leaderboard:
    """Return the leaderboard with the rows of each table sorted, best or cheapest first, unknown last."""
    value = sort_value(key, question)
    tables = [
        replace(table, rows=tuple(sorted(table.rows, key=lambda row: (value(row), row.recipe, row.length))))
        for table in leaderboard.tables
    ]
    return replace(leaderboard, tables=tuple(tables))


def sort_value(key: SortKey, question: Question) -> Callable[[Row], float]:
    """Return the number by which rows are sorted, ascending. It is the same for all rows for "recipe"."""

    def value(row: Row) -> float:
        here, reach = row.student, row.student.reach
        if key == "metric":
            return question.falling(_mean(here.value))
        if key == "guided":
            return question.falling(_mean(here.guided.value if here.guided else None))
        if key == "is":
            return -_mean(here.inception)
        if key == "cost":
            return _mean(here.flops_total)
        if key == "speed-up":
            return -(reach.speedup_student if reach and reach.speedup_student else math.nan)
        if key in ("ratio", "paid"):
            ratio = (row.paid if key == "paid" else here).plain.ratio
            return math.nan if ratio is None else question.falling(ratio)
        return 0.0

    return lambda row: nan_last(value(row))


def _mean(stats: SeedStats | None) -> float:
    return stats.mean if stats else math.nan


# --- The baseline ---


def require_baseline(leaderboard: Leaderboard, question: Question) -> None:
    """Check that the asked baseline is a row of some table.

    Raises:
        UserError: A baseline other than the default is a row of no table.
    """
    rows = [row for table in leaderboard.tables for row in table.rows]
    if question.baseline == Question().baseline or not rows:
        return
    if not any(row.recipe == table.baseline for table in leaderboard.tables for row in table.rows):
        labels = dict.fromkeys(row.recipe for row in rows)
        raise UserError(
            f"--baseline: no row is named '{visible(question.baseline, 100)}'; "
            f"choose one of {visible('; '.join(labels), 400)}"
        )
