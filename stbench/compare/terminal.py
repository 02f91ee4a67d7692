"""Leaderboards and single runs in the terminal.

All text is made visible and printed without markup: names come from run folders and may contain anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stbench.compare.blocks import VIEW, View, blocks
from stbench.compare.format import GAP, Section
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.published import PublishedValue
from stbench.compare.run_report import curves, facts, stages
from stbench.core.text import visible
from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord

if TYPE_CHECKING:
    from rich.console import Console

REPLACEMENTS = {"±": "+-", "†": "^"}
"""For terminals whose encoding lacks these letters."""
WIDTH = 100
"""Columns of the output if it is not a terminal."""


def print_leaderboard(
    leaderboard: Leaderboard,
    *,
    published: Sequence[PublishedValue] = (),
    view: View = VIEW,
    console: Console | None = None,
) -> None:
    """Print a leaderboard and the `published` values."""
    console = console or _console()
    for block in blocks(leaderboard, published, view, console.width):
        if block.heading:
            console.print()
            print_text(block.heading, console, "bold")
        if block.text:
            print_text(block.text, console, "dim")
        for section in block.sections:
            print_section(section, console, title=section.title != block.heading)
        if block.remarks and not block.heading:
            console.print()
        for remark in block.remarks:
            print_text(remark, console, "dim")
        if block.notes:
            console.print()
        for note in block.notes:
            print_text(f"- {note}", console)


def print_run(record: RunRecord, *, console: Console | None = None) -> None:
    """Print the settings of a run, its error if it failed, the cost of its stages, and its curve."""
    console = console or _console()
    error = RunFolder(Path(record.path)).status().get("error")
    for name, fact in {**facts(record), **({"error": error} if error else {})}.items():
        print_text(f"{name:<8} {fact}", console)
    print_section(stages(record), console)
    print_curve(record, console=console)


def print_curve(record: RunRecord, *, console: Console | None = None) -> None:
    """Print the evaluations of all stages of a run."""
    console = console or _console()
    for section in curves(record):
        print_section(section, console)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def terminal_width() -> int:
    """Return the columns of the terminal, or `WIDTH` if the output is not a terminal."""
    return _console().width


def print_text(text: str, console: Console | None = None, style: str = "") -> None:
    """Print a paragraph without markup."""
    from rich.text import Text

    console = console or _console()
    console.print(Text(_shown(text, console), style))  # a str would be searched for markup and emoji codes


def print_section(section: Section, console: Console | None = None, title: bool = True) -> None:
    """Print a table of text."""
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    console = console or _console()
    section = _visible(section, console)
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, (name, width) in enumerate(zip(section.header, _widths(section, console.width), strict=True)):
        words = i in section.left
        justify: Literal["left", "right"] = "left" if words else "right"
        grid.add_column(Text(name), justify=justify, overflow="fold", no_wrap=not words, width=width)
    for row in section.rows:
        grid.add_row(*map(Text, row))
    if title:
        console.print()
        print_text(section.title, console, "italic")
    console.print(grid)


def _visible(section: Section, console: Console) -> Section:
    header, *rows = [tuple(_shown(cell, console) for cell in row) for row in (section.header, *section.rows)]
    return replace(section, header=header, rows=tuple(rows))


def _shown(text: str, console: Console) -> str:
    """Return visible text in letters that the encoding of the terminal has."""
    text = visible(text)
    try:
        text.encode(console.encoding)
    except UnicodeEncodeError:
        for letter, replacement in REPLACEMENTS.items():
            text = text.replace(letter, replacement)
        text = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    return text


def _widths(section: Section, width: int) -> list[int]:
    """Return column widths that fit into `width`: numbers are never wrapped, words are.

    Words are wrapped between words first, and within words only if that is not enough.
    """
    columns = list(zip(section.header, *section.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    longest_words = [max(len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    for minimum in (longest_words, [1] * len(columns)):
        while sum(widths) + GAP * (len(columns) - 1) > width:
            shrinkable = [i for i in section.left if widths[i] > minimum[i]]
            if not shrinkable:
                break
            widths[max(shrinkable, key=lambda i: (widths[i], i))] -= 1
    return widths
