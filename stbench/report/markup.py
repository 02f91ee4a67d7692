"""The parts of the page that are HTML before any script runs: tables, remarks and published values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from html import escape

from stbench.compare import compact
from stbench.compare.compact import Entry
from stbench.compare.format import NONE, Section
from stbench.compare.leaderboard import Leaderboard, Table
from stbench.compare.published import PublishedValue, published_section
from stbench.compare.tables import hashes, states
from stbench.core.text import visible

SORT_KEYS: dict[str, Callable[[Entry], float | None]] = {
    "n": lambda entry: len(entry.row.seeds),
    "IS": lambda entry: _mean(entry.row.student.inception),
    "guided": lambda entry: entry.row.student.guided.value.mean if entry.row.student.guided else None,
    "ratio": lambda entry: entry.row.student.plain.ratio,
    "speed-up": lambda entry: entry.row.student.reach.speedup_student if entry.row.student.reach else None,
    "paid": lambda entry: entry.row.paid.plain.ratio,
    "cost": lambda entry: entry.relative_cost,
    "FLOPs": lambda entry: entry.cost,
}
"""Column of a compact table -> the number by which it is sorted; the metric's column has its mean."""
MARK_CLASSES = {"+": "better", "-": "worse"}


def text(value: str) -> str:
    """Return `value` as HTML text or as a quoted attribute: visible, and without markup."""
    return escape(visible(value), quote=True)


def leaderboard_markup(leaderboard: Leaderboard) -> str:
    """Return the tables of the leaderboard with the lines below them."""
    tables = [table for table in leaderboard.tables if table.rows]
    titles = dict(zip(map(id, leaderboard.tables), compact.headings(leaderboard.tables), strict=True))
    sections = []
    parts = []
    for table in tables:
        section = compact.section(compact.entries(table), titles[id(table)])
        sections.append(section)
        parts.append(_compared(table, section))
    for table in leaderboard.tables:
        if not table.rows:
            section = states(table)
            parts.append(f"<article><h3>{text(titles[id(table)])}</h3>{plain_table(section)}</article>")
    if tables:
        lines = compact.legend(sections, tables)
        recipes = {row.recipe for table in tables for row in table.rows}
        ranks = [rank for rank in leaderboard.ranks if rank.recipe.partition(" [")[0] in recipes]
        if ranks and len(tables) > 1:
            lines = [compact.ranks_line(ranks), *lines]
        parts.append(_lines(lines, "legend"))
    else:
        parts.append("<p>No finished runs to compare.</p>")
    return "\n".join(parts)


def _compared(table: Table, section: Section) -> str:
    """Return a compact table. Its headings are buttons that sort it once the script runs."""
    shown = compact.entries(table)
    title = text(section.title)
    header = "".join(
        f'<th scope="col" aria-sort="none"><button type="button">{text(name)}</button></th>'
        for name in section.header
    )
    rows = [
        f"<tr>{_name(entry)}{''.join(map(partial(_cell, entry), section.header[1:], cells[1:]))}</tr>"
        for entry, cells in zip(shown, section.rows, strict=True)
    ]
    notes = compact.remarks([table], shown)
    details = (
        f"<details><summary>Protocol and notes</summary>{_lines([hashes(table), *table.notes])}</details>"
    )
    return (
        f'<article data-words="{title}"><h3>{title}</h3>'
        f'<p class="budget">{text(compact.budget_line(table))}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{title}"><table class="ranking">'
        f"<thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        f"{_lines(notes)}{details}</article>"
    )


def _name(entry: Entry) -> str:
    label = f' title="{text(entry.row.recipe)}"' if entry.row.recipe != entry.name else ""
    return f'<th scope="row"{label}>{text(entry.name)}</th>'


def _cell(entry: Entry, column: str, cell: str) -> str:
    name = column.partition(" (")[0]
    find = SORT_KEYS.get(name)
    value = find(entry) if find else _mean(entry.row.student.value)
    key = f' data-value="{value!r}"' if value is not None and math.isfinite(value) else ""
    mark = MARK_CLASSES.get(cell[-1:]) if cell != NONE and name in ("ratio", "paid", "guided") else None
    return f"<td{key}{f' class={mark}' if mark else ''}>{text(cell)}</td>"


def _mean(stats: object) -> float | None:
    value = getattr(stats, "mean", None)
    return float(value) if value is not None else None


def published_markup(values: Sequence[PublishedValue]) -> str:
    """Return the published values; "" if there are none."""
    if not values:
        return ""
    section, notes = published_section(values)
    return (
        f'<section id="published"><h2>Published numbers</h2><p class="apart">{text(section.title)}.</p>'
        f"<details><summary>{len(section.rows)} evaluations</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="Published numbers">'
        f"{plain_table(section)}</div>{_lines(notes)}</details></section>"
    )


def plain_table(section: Section) -> str:
    """Return a table of text."""
    header = "".join(f'<th scope="col">{text(name)}</th>' for name in section.header)
    rows = [
        "<tr>"
        + "".join(
            f"<td{' class=words' if i in section.left else ''}>{text(c)}</td>" for i, c in enumerate(row)
        )
        + "</tr>"
        for row in section.rows
    ]
    return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _lines(lines: Iterable[str], name: str = "notes") -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in lines if line)
    return f'<ul class="{name}">{items}</ul>' if items else ""
