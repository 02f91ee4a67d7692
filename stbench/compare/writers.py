"""A leaderboard as Markdown, CSV, JSON or LaTeX text.

Markdown and LaTeX contain what the terminal shows. CSV and JSON contain all values at full precision.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from stbench.compare.blocks import blocks
from stbench.compare.leaderboard import Leaderboard, Row, Table, UnfinishedRow
from stbench.compare.published import PUBLISHED_FILE, TITLE, PublishedValue
from stbench.core.errors import UserError
from stbench.runs.schema import plain

Format = Literal["md", "csv", "json", "tex"]

LEADERBOARD_SCHEMA = 2
"""Version of the JSON format."""


def render(leaderboard: Leaderboard, form: Format, published: Sequence[PublishedValue] = ()) -> str:
    """Return the leaderboard and the `published` values as text that ends in a newline.

    Raises:
        UserError: Published values were given for CSV, which has room for a single table.
    """
    return _WRITERS[form](leaderboard, published)


# --- Markdown ---


def _markdown(leaderboard: Leaderboard, published: Sequence[PublishedValue]) -> str:
    lines: list[str] = []
    for block in blocks(leaderboard, published):
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


# --- JSON ---


def _json(leaderboard: Leaderboard, published: Sequence[PublishedValue]) -> str:
    content: dict[str, Any] = {"schema": LEADERBOARD_SCHEMA, **asdict(leaderboard)}
    if published:
        content["reported"] = {"title": TITLE, "rows": [asdict(value) for value in published]}
    return json.dumps(plain(content), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


# --- CSV: one line per row, with the fields of its table ---

_TABLE_COLUMNS = (
    *("dataset", "setting", "protocol", "backbone", "objective", "batch", "precision"),
    *("student_images", "paid_images"),
)


def _csv(leaderboard: Leaderboard, published: Sequence[PublishedValue]) -> str:
    if published:
        raise UserError(
            "--reported is not available for csv, which contains a single table; choose another --format, "
            f"or read the published values from {PUBLISHED_FILE}, which is a CSV file"
        )
    rows: list[dict[str, Any]] = []
    for table in leaderboard.tables:
        rows += [_csv_row(table, row) for row in table.rows]
        rows += [_csv_row(table, row) for row in table.absent]
    columns = dict.fromkeys(name for row in rows for name in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def _csv_row(table: Table, row: Row | UnfinishedRow) -> dict[str, Any]:
    fields = {name: getattr(table, name) for name in _TABLE_COLUMNS} | {"state": "finished"} | asdict(row)
    fields.pop("curve", None)
    if isinstance(row, UnfinishedRow):
        fields |= {"seeds": (), "unfinished": row.seeds}
    return _flat(fields)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree: fid.mean becomes fid_mean, sequences are joined by spaces, None is omitted."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}_")
        elif value is not None:
            flat[prefix + name] = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
    return flat


# --- LaTeX: tabulars, with all other text as comments ---

_TEX_ESCAPES = {letter: f"\\{letter}" for letter in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "<": "$<$",
    ">": "$>$",
}


def _tex(leaderboard: Leaderboard, published: Sequence[PublishedValue]) -> str:
    lines: list[str] = []
    for block in blocks(leaderboard, published):
        lines += [f"% {text}" for text in (block.heading, block.text) if text]
        for section in block.sections:
            columns = "".join("l" if i in section.left else "r" for i in range(len(section.header)))
            lines += ["", f"% {section.title}", f"\\begin{{tabular}}{{{columns}}}", "\\hline"]
            lines += [_tex_line(section.header), "\\hline", *map(_tex_line, section.rows)]
            lines += ["\\hline", "\\end{tabular}"]
        lines += [*(f"% {note}" for note in block.notes), ""]
    return _text(lines)


def _tex_line(values: Sequence[str]) -> str:
    cells = ("".join(_TEX_ESCAPES.get(letter, letter) for letter in value) for value in values)
    return " & ".join(cells) + r" \\"


_WRITERS: Mapping[Format, Callable[[Leaderboard, Sequence[PublishedValue]], str]] = {
    "md": _markdown,
    "csv": _csv,
    "json": _json,
    "tex": _tex,
}
