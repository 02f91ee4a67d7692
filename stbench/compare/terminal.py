"""Leaderboards and runs for people: terminal, Markdown, CSV, JSON, LaTeX and figure.

What is printed is in tables.py, summary.py and sections.py; CSV and JSON hold every figure at full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stbench.compare.format import Section
from stbench.compare.leaderboard import Leaderboard
from stbench.compare.published import Figure
from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord

if TYPE_CHECKING:
    from rich.console import Console
from stbench.compare import run_report
from stbench.compare.writers import WIDTH, blocks


def print_leaderboard(
    board: Leaderboard, console: Console | None = None, figures: Sequence[Figure] = ()
) -> None:
    """The leaderboard, and published `figures`, in the terminal."""
    console = console or _console()
    for block in blocks(board, figures):
        if block.heading:
            _print_text(f"\n{block.heading}", console, "bold")
        if block.text:
            _print_text(block.text, console, "dim")
        for section in block.sections:
            _print(section, console, title=section.title != block.heading)
        _print_notes(block.notes, console)


def print_curve(record: RunRecord, console: Console | None = None) -> None:
    """One run's evaluations, all stages, in the terminal."""
    console = console or _console()
    for section in run_report.curves(record):
        _print(section, console)


def show(record: RunRecord, console: Console | None = None) -> None:
    """What one run is, why it failed if it did, what its stages cost, and its curve, in the terminal."""
    console = console or _console()
    error = RunFolder(Path(record.path)).status().get("error")
    for name, fact in {**run_report.facts(record), **({"error": error} if error else {})}.items():
        _print_text(f"{name:<8} {fact}", console)
    _print(run_report.stages(record), console)
    print_curve(record, console)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _print(section: Section, console: Console, title: bool = True) -> None:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    widths = _widths(section, console.width)
    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, name in enumerate(section.header):
        words = i in section.left
        justify: Literal["left", "right"] = "left" if words else "right"
        grid.add_column(name, justify=justify, overflow="fold", no_wrap=not words, width=widths[i])
    for row in section.rows:
        grid.add_row(*(Text(value) for value in row))
    if title:
        _print_text(f"\n{section.title}", console, "italic")
    console.print(grid)


def _widths(section: Section, width: int) -> list[int]:
    """Columns of `width` in all: figures whole, words wrapped between words, and within them if they must."""
    columns = list(zip(section.header, *section.rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    words = [max(len(word) for cell in column for word in cell.split() or [""]) for column in columns]
    for least in (words, [1] * len(columns)):
        while sum(widths) + 2 * len(columns) > width:
            shrinkable = [i for i in section.left if widths[i] > least[i]]
            if not shrinkable:
                break
            widths[max(shrinkable, key=lambda i: (widths[i], i))] -= 1
    return widths


def _print_text(text: str, console: Console, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False)


def _print_notes(notes: Sequence[str], console: Console) -> None:
    if notes:
        console.print()
    for note in notes:
        _print_text(f"- {note}", console)
