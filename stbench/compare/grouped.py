"""Rows of several settings grouped by a field. Every ratio is that of the row's own table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from stbench.compare import compact
from stbench.compare.compact import Entry
from stbench.compare.leaderboard import Table
from stbench.compare.question import Question
from stbench.compare.select import GroupKey, SortKey, sort_value

FIELDS = ("dataset", "backbone", "objective")
"""Fields of a table that may name a row of a group."""


@dataclass(frozen=True)
class Group:
    """Rows of several tables that share a field."""

    heading: str
    tables: Sequence[Table]
    entries: Sequence[Entry]


def group_entries(
    tables: Sequence[Table], field: GroupKey, sort: SortKey | None, question: Question
) -> list[Group]:
    """Group the rows of tables by a field, in the order of their tables or sorted across them."""
    groups: dict[str, list[Entry]] = {}
    for table in tables:
        for entry in compact.entries(table):
            key = entry.row.recipe if field == "recipe" else str(getattr(table, field))
            groups.setdefault(key, []).append(entry)
    return [_group(f"{field} {key}", entries, field, sort, question) for key, entries in groups.items()]


def _group(
    heading: str, entries: Sequence[Entry], field: GroupKey, sort: SortKey | None, question: Question
) -> Group:
    tables = list({id(entry.table): entry.table for entry in entries}.values())
    names = dict(zip(map(id, tables), _setting_names(tables, field), strict=True))
    named = []
    for entry in entries:
        parts = [names[id(entry.table)], "" if field == "recipe" else entry.name]
        named.append(replace(entry, name=" ".join(filter(None, parts)) or entry.name))
    if sort:
        value = sort_value(sort, question)
        named.sort(key=lambda entry: (value(entry.row), entry.name))
    return Group(heading, tables, named)


def _setting_names(tables: Sequence[Table], field: str) -> list[str]:
    """Name tables by the fields in which they differ, or by their backbone, with hashes where those agree."""
    differing = [
        name for name in FIELDS if name != field and len({str(getattr(table, name)) for table in tables}) > 1
    ]
    shown = differing or [name for name in ("backbone",) if name != field]
    names = [" ".join(str(getattr(table, name)) for name in shown) for table in tables]
    return [
        name if names.count(name) == 1 else f"{name} [{table.setting} {table.protocol}]".strip()
        for name, table in zip(names, tables, strict=True)
    ]
