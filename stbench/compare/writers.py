"""Leaderboards as Markdown, CSV, JSON and LaTeX."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stbench.compare import published as reported
from stbench.compare import tables
from stbench.compare.all_backbones import summaries
from stbench.compare.build import leaderboard
from stbench.compare.format import Section
from stbench.compare.leaderboard import Absent, Leaderboard, Row, Table
from stbench.compare.published import Figure
from stbench.core.errors import UserError
from stbench.runs.records import SCHEMA, RunRecord
from stbench.runs.schema import plain

if TYPE_CHECKING:
    pass


Format = Literal["md", "csv", "json", "tex"]


WIDTH = 100
"""Columns of the output when it is not a terminal."""


@dataclass(frozen=True)
class Block:
    """A heading with what stands under it, the common form of all printed formats."""

    heading: str
    text: str
    sections: Sequence[Section]
    notes: Sequence[str]


def blocks(board: Leaderboard, figures: Sequence[Figure] = ()) -> list[Block]:
    """What is printed of a leaderboard, and of published `figures` if there are any."""
    found = [
        Block(tables.heading(t), tables.protocol(t), tables.sections(t), (*tables.needs(t), *t.notes))
        for t in board.tables
    ]
    found += [Block(s.heading, s.text, s.sections, ()) for s in summaries(board)]
    if not board.tables:
        found.append(Block("", "no finished run to compare", (), ()))
    if board.notes:
        found.append(Block("", "", (), board.notes))
    if figures:
        section, notes = reported.section(figures)
        found.append(Block(section.title, "", [section], notes))
    return found


def render(board: Leaderboard, form: Format, figures: Sequence[Figure] = ()) -> str:
    """The leaderboard and published `figures` as one text, which ends in a newline.

    UserError for figures in CSV, which holds one table only.
    """
    return _WRITERS[form](board, figures)


def plot(board: Leaderboard | Sequence[RunRecord], path: Path) -> None:
    """Draw FID against images; UserError if no run is finished or the suffix of `path` is no format."""
    from stbench.compare.plot import draw

    draw(board if isinstance(board, Leaderboard) else leaderboard(board), path)


def _markdown(board: Leaderboard, figures: Sequence[Figure]) -> str:
    lines: list[str] = []
    for block in blocks(board, figures):
        for text in (f"## {block.heading}" if block.heading else "", block.text):
            lines += [text, ""] if text else []
        for section in block.sections:
            rule = [":--" if i in section.left else "--:" for i in range(len(section.header))]
            body = [tuple(value.replace("|", "\\|") for value in row) for row in section.rows]
            lines += [f"**{section.title}**", ""] if section.title != block.heading else []
            lines += [f"| {' | '.join(row)} |" for row in (section.header, rule, *body)]
            lines += [""]
        lines += [*(f"- {note}" for note in block.notes), *([""] if block.notes else [])]
    return _text(lines)


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


def _json(board: Leaderboard, figures: Sequence[Figure]) -> str:
    content: dict[str, Any] = {"schema": SCHEMA, **asdict(board)}
    if figures:
        content["reported"] = {"title": reported.TITLE, "rows": [asdict(figure) for figure in figures]}
    return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _csv(board: Leaderboard, figures: Sequence[Figure]) -> str:
    if figures:
        raise UserError(
            "expected another format beside --reported: csv holds one table; "
            f"the reported numbers are a CSV file already, {reported.FILE}"
        )
    rows = [_flat_row(table, row) for table in board.tables for row in _all(table)]
    columns = dict.fromkeys(name for row in rows for name in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


_OF_TABLE = (
    *("dataset", "setting", "protocol", "backbone", "objective", "batch", "precision"),
    *("student_images", "paid_images"),
)
"""What the CSV repeats of a table in every line."""


def _all(table: Table) -> list[Row | Absent]:
    return [*table.rows, *table.absent]


def _flat_row(table: Table, row: Row | Absent) -> dict[str, Any]:
    common = {name: getattr(table, name) for name in _OF_TABLE}
    fields = common | {"state": "finished"} | asdict(row)
    fields.pop("curve", None)
    if isinstance(row, Absent):
        fields |= {"seeds": (), "unfinished": row.seeds}
    return _flat(fields)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree as one level: fid.mean becomes fid_mean, several values are joined by spaces."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}_")
        elif value is not None:
            flat[prefix + name] = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return flat


def _tex(board: Leaderboard, figures: Sequence[Figure]) -> str:
    lines: list[str] = []
    for block in blocks(board, figures):
        lines += [f"% {text}" for text in (block.heading, block.text) if text]
        for section in block.sections:
            columns = "".join("l" if i in section.left else "r" for i in range(len(section.header)))
            lines += ["", f"% {section.title}", f"\\begin{{tabular}}{{{columns}}}", "\\hline"]
            lines += [_tex_line(section.header), "\\hline", *map(_tex_line, section.rows)]
            lines += ["\\hline", "\\end{tabular}"]
        lines += [*(f"% {note}" for note in block.notes), ""]
    return _text(lines)


def _tex_line(values: Sequence[str]) -> str:
    return " & ".join("".join(_TEX.get(letter, letter) for letter in value) for value in values) + r" \\"


_TEX = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "<": "$<$",
    ">": "$>$",
}


_WRITERS: Mapping[Format, Callable[[Leaderboard, Sequence[Figure]], str]] = {
    "md": _markdown,
    "csv": _csv,
    "json": _json,
    "tex": _tex,
}
