"""The parts of a printed leaderboard in their order, shared by the terminal, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stbench.compare.all_backbones import combine_tables
from stbench.compare.format import Section
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.published import PublishedValue, published_section
from stbench.compare.tables import hashes, heading, needs_notes, sections


@dataclass(frozen=True)
class Block:
    """A heading with a paragraph, text tables and notes. Each part may be empty."""

    heading: str
    text: str
    sections: Sequence[Section]
    notes: Sequence[str]


def blocks(leaderboard: Leaderboard, published: Sequence[PublishedValue] = ()) -> list[Block]:
    """Return the parts of a leaderboard, followed by the `published` values, if any."""
    found = [
        Block(heading(table), hashes(table), sections(table), (*needs_notes(table), *table.notes))
        for table in leaderboard.tables
    ]
    found += [
        Block(combined.heading, combined.text, combined.sections, ())
        for combined in combine_tables(leaderboard)
    ]
    if not leaderboard.tables:
        found.append(Block("", "no finished runs to compare", (), ()))
    if leaderboard.notes:
        found.append(Block("", "", (), leaderboard.notes))
    if published:
        section, notes = published_section(published)
        found.append(Block(section.title, "", [section], notes))
    return found
