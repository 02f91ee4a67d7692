"""Leaderboards and runs for people: terminal, Markdown, CSV, JSON, LaTeX and figure.

What is printed, and in which units, is in sections.py; CSV and JSON hold every figure at full precision.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stbench import sections
from stbench.compare import leaderboard
from stbench.leaderboard import Leaderboard, Row, Table
from stbench.records import SCHEMA, RunRecord
from stbench.results import RunFolder
from stbench.schema import plain
from stbench.sections import Section

if TYPE_CHECKING:
    from rich.console import Console

Format = Literal["md", "csv", "json", "tex"]
WIDTH = 100
"""Columns of the output when it is not a terminal."""


def render(board: Leaderboard, form: Format) -> str:
    """The leaderboard as one text, which ends in a newline."""
    return _WRITERS[form](board)


def plot(board: Leaderboard | Sequence[RunRecord], path: Path) -> None:
    """Draw FID against images; UserError if no run is finished or the suffix of `path` is no format."""
    from stbench.figures import draw

    draw(board if isinstance(board, Leaderboard) else leaderboard(board), path)


def print_leaderboard(board: Leaderboard, console: Console | None = None) -> None:
    """The leaderboard in the terminal."""
    console = console or _console()
    for table in board.tables:
        _print_text(f"\n{sections.heading(table)}", console, "bold")
        _print_text(sections.protocol(table), console, "dim")
        for section in sections.sections(table):
            _print(section, console)
        _print_notes(table.notes, console)
    _print_notes(board.notes, console)
    if not board.tables:
        _print_text("no finished run to compare", console)


def print_curve(record: RunRecord, console: Console | None = None) -> None:
    """One run's evaluations, all stages, in the terminal."""
    console = console or _console()
    for section in sections.curves(record):
        _print(section, console)


def show(record: RunRecord, console: Console | None = None) -> None:
    """What one run is, why it failed if it did, what its stages cost, and its curve, in the terminal."""
    console = console or _console()
    error = RunFolder(Path(record.path)).status().get("error")
    for name, fact in {**sections.facts(record), **({"error": error} if error else {})}.items():
        _print_text(f"{name:<8} {fact}", console)
    _print(sections.stages(record), console)
    print_curve(record, console)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def _print(section: Section, console: Console) -> None:
    from rich import box
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, name in enumerate(section.header):
        grid.add_column(name, justify="left" if i in section.left else "right", overflow="fold")
    for row in section.rows:
        grid.add_row(*(Text(value) for value in row))
    _print_text(f"\n{section.title}", console, "italic")
    console.print(grid)


def _print_text(text: str, console: Console, style: str = "") -> None:
    console.print(text, style=style, markup=False, highlight=False)


def _print_notes(notes: Sequence[str], console: Console) -> None:
    if notes:
        console.print()
    for note in notes:
        _print_text(f"- {note}", console)


def _markdown(board: Leaderboard) -> str:
    lines: list[str] = []
    for table in board.tables:
        lines += [f"## {sections.heading(table)}", "", sections.protocol(table), ""]
        for section in sections.sections(table):
            rule = [":--" if i in section.left else "--:" for i in range(len(section.header))]
            body = [tuple(value.replace("|", "\\|") for value in row) for row in section.rows]
            lines += [f"**{section.title}**", ""]
            lines += [f"| {' | '.join(row)} |" for row in (section.header, rule, *body)]
            lines += [""]
        lines += [*(f"- {note}" for note in table.notes), *([""] if table.notes else [])]
    return _text([*lines, *(f"- {note}" for note in board.notes)])


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def _json(board: Leaderboard) -> str:
    content = plain({"schema": SCHEMA, **asdict(board)})
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(board: Leaderboard) -> str:
    rows = [_flat_row(table, row) for table in board.tables for row in table.rows]
    columns = dict.fromkeys(name for row in rows for name in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _flat_row(table: Table, row: Row) -> dict[str, Any]:
    fields = asdict(row)
    del fields["curve"]
    common = ("dataset", "setting", "protocol", "batch", "precision")
    return {name: getattr(table, name) for name in common} | _flat(fields)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree as one level: fid.mean becomes fid_mean, several values are joined by spaces."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}_")
        elif value is not None:
            flat[prefix + name] = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return flat


def _tex(board: Leaderboard) -> str:
    lines = []
    for table in board.tables:
        lines += [f"% {sections.heading(table)}", f"% {sections.protocol(table)}"]
        for section in sections.sections(table):
            columns = "".join("l" if i in section.left else "r" for i in range(len(section.header)))
            lines += ["", f"% {section.title}", f"\\begin{{tabular}}{{{columns}}}", "\\hline"]
            lines += [_tex_line(section.header), "\\hline", *map(_tex_line, section.rows)]
            lines += ["\\hline", "\\end{tabular}"]
        lines += [f"% {note}" for note in table.notes] + [""]
    return _text([*lines, *(f"% {note}" for note in board.notes)])


def _tex_line(values: Sequence[str]) -> str:
    return " & ".join("".join(_TEX.get(letter, letter) for letter in value) for value in values) + r" \\"


_TEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "±": r"$\pm$",
    "<": "$<$",
    ">": "$>$",
}
_WRITERS: Mapping[Format, Callable[[Leaderboard], str]] = {
    "md": _markdown,
    "csv": _csv,
    "json": _json,
    "tex": _tex,
}
