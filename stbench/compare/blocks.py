"""The parts of a printed leaderboard in their order, shared by the terminal, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stbench.compare import compact
from stbench.compare.all_backbones import combine_tables
from stbench.compare.compact import Entry
from stbench.compare.format import Section
from stbench.compare.grouped import Group, group_entries
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.names import needs_notes
from stbench.compare.published import PublishedValue, published_section
from stbench.compare.question import QUESTION, Question
from stbench.compare.select import GroupKey, SortKey
from stbench.compare.tables import hashes, heading, sections, states


@dataclass(frozen=True)
class Block:
    """A heading with a paragraph, text tables, lines right below them, and notes. Each part may be empty."""

    heading: str
    text: str
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    remarks: Sequence[str] = ()


@dataclass(frozen=True)
class View:
    """How a leaderboard is shown."""

    details: bool = False
    """Every number, in several tables per setting, instead of one compact table."""
    group_by: GroupKey = "setting"
    sort: SortKey | None = None
    """Order across the tables of a group; rows of one table are sorted before."""
    question: Question = QUESTION


VIEW = View()
"""The default: compact tables."""


def blocks(
    leaderboard: Leaderboard,
    published: Sequence[PublishedValue] = (),
    view: View = VIEW,
    width: int | None = None,
) -> list[Block]:
    """Return the parts of a leaderboard, followed by the `published` values, if any.

    Args:
        leaderboard: What is printed.
        published: Values of papers.
        view: How it is printed.
        width: Columns of the output, into which compact tables are fitted; None for no limit.
    """
    found = _detailed(leaderboard) if view.details else _compact(leaderboard, view, width)
    if not leaderboard.tables:
        found.append(Block("", "no finished runs to compare", ()))
    if leaderboard.notes and (view.details or not leaderboard.tables):
        found.append(Block("", "", (), leaderboard.notes))
    if published:
        section, notes = published_section(published)
        found.append(Block(section.title, "", [section], notes))
    return found


def _detailed(leaderboard: Leaderboard) -> list[Block]:
    tables = [
        Block(heading(table), hashes(table), sections(table), (*needs_notes(table), *table.notes))
        for table in leaderboard.tables
    ]
    combined = [Block(both.heading, both.text, both.sections) for both in combine_tables(leaderboard)]
    return tables + combined


def _compact(leaderboard: Leaderboard, view: View, width: int | None) -> list[Block]:
    tables = [table for table in leaderboard.tables if table.rows]
    first = "recipe" if view.group_by == "setting" else "row" if view.group_by != "recipe" else "setting"
    if view.group_by == "setting":
        titles = dict(zip(map(id, leaderboard.tables), compact.headings(leaderboard.tables), strict=True))
        groups = [Group(titles[id(table)], [table], compact.entries(table)) for table in tables]
    else:
        titles = {id(table): compact.words(table) for table in leaderboard.tables}
        groups = group_entries(tables, view.group_by, view.sort, view.question)

    # One level for all tables, so that they have the same columns
    level = max((_level(group.entries, first, width) for group in groups), default=0)
    found = [_compact_block(group, first, level) for group in groups]
    waiting = [table for table in leaderboard.tables if not table.rows]
    found += [Block(titles[id(table)], "", [states(table)]) for table in waiting]
    if tables:
        shown = [section for block in found for section in block.sections]
        found.append(Block("", "", (), remarks=_closing(leaderboard, shown)))
    return found


def _compact_block(group: Group, first: str, level: int) -> Block:
    section = compact.section(group.entries, group.heading, level, first)
    texts = list(dict.fromkeys(map(compact.budget_line, group.tables)))
    remarks = compact.remarks(group.tables, group.entries)
    return Block(group.heading, texts[0] if len(texts) == 1 else "", [section], remarks=remarks)


def _level(shown: Sequence[Entry], first: str, width: int | None) -> int:
    """Return the first level at which a compact table fits `width`, or the last one."""
    if width is None:
        return 0
    fitting = (
        level for level in compact.LEVELS if compact.section(shown, "", level, first).narrowest <= width
    )
    return next(fitting, compact.LEVELS[-1])


def _closing(leaderboard: Leaderboard, shown: Sequence[Section]) -> list[str]:
    """Return the mean ranks, the legend, and what else there is to see."""
    tables = [table for table in leaderboard.tables if table.rows]
    recipes = {row.recipe for table in tables for row in table.rows}
    ranks = [rank for rank in leaderboard.ranks if rank.recipe.partition(" [")[0] in recipes]
    lines = [compact.ranks_line(ranks)] if ranks and len(tables) > 1 else []
    notes = sum(len(table.notes) for table in leaderboard.tables) + len(leaderboard.notes)
    last = f"curves and {notes} note{'' if notes == 1 else 's'}" if notes else "and curves"
    more = f"--details adds costs, tests{',' if notes else ''} {last}"
    return [*lines, *compact.legend(shown, tables), more]
