"""A leaderboard as Markdown, CSV, JSON or LaTeX text.

Markdown and LaTeX contain what the terminal shows. CSV and JSON contain all values at full precision. Each
writer escapes all text with the function of its format in stbench/core/text.py.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from stbench.compare.blocks import blocks
from stbench.compare.leaderboard import Leaderboard, Row, Table, UnfinishedRow
from stbench.compare.published import PUBLISHED_FILE, TITLE, PublishedValue
from stbench.core.errors import UserError
from stbench.core.text import to_csv, to_latex, to_latex_comment, to_markdown
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


_OWN = re.compile(
    rb"## .+\n\nsetting |no finished runs to compare\n|% .+\n% setting |% no finished runs to compare\n"
    rb"|\{\s*\"schema\":\s*\d+,\s*\"tables\":\s*\[|dataset,setting,protocol,backbone,|\s*\Z"
)
"""The beginning of a leaderboard in any format."""


def is_leaderboard(path: Path) -> bool:
    """Whether a file begins as the files with leaderboards do, in any format."""
    with path.open("rb") as file:
        return _OWN.match(file.read(4096)) is not None


# --- Markdown ---


def _markdown(leaderboard: Leaderboard, published: Sequence[PublishedValue]) -> str:
    lines: list[str] = []
    for block in blocks(leaderboard, published):
        lines += [f"## {to_markdown(block.heading)}", ""] if block.heading else []
        lines += [to_markdown(block.text, block=True), ""] if block.text else []
        for section in block.sections:
            rule = [":--" if i in section.left else "--:" for i in range(len(section.header))]
            header, *body = [tuple(map(to_markdown, row)) for row in (section.header, *section.rows)]
            title = f"**{to_markdown(section.title)}**"
            lines += [title, ""] if section.title != block.heading else []
            lines += [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
            lines += [""]
        lines += [f"- {to_markdown(note, block=True)}" for note in block.notes]
        lines += [""] if block.notes else []
    return _text(lines)


def _text(lines: Sequence[str]) -> str:
    return "\n".join(lines).rstrip("\n") + "\n"


# --- JSON ---


def _json(leaderboard: Leaderboard, published: Sequence[PublishedValue]) -> str:
    content: dict[str, Any] = {"schema": LEADERBOARD_SCHEMA, **asdict(leaderboard)}
    if published:
        content["reported"] = {"title": TITLE, "rows": [asdict(value) for value in published]}
    return json.dumps(plain(content), indent=1, allow_nan=False) + "\n"


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
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(to_csv, columns))
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    return file.getvalue()


def _csv_row(table: Table, row: Row | UnfinishedRow) -> dict[str, Any]:
    fields = {name: getattr(table, name) for name in _TABLE_COLUMNS} | {"state": "finished"} | asdict(row)
    fields.pop("curve", None)
    if isinstance(row, UnfinishedRow):
        fields |= {"seeds": (), "unfinished": row.seeds}
    return _flat(fields)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a tree: fid.mean becomes fid_mean, sequences are joined by spaces, None is omitted.

    Text is escaped, numbers are not.
    """
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}_")
        elif value is not None:
            flat[prefix + name] = (
                " ".join(map(_cell, value)) if isinstance(value, (list, tuple)) else _cell(value)
            )
    return flat


def _cell(value: Any) -> str:
    return str(value) if isinstance(value, (int, float)) else to_csv(str(value))


# --- LaTeX: tabulars, with all other text as comments ---


def _tex(leaderboard: Leaderboard, published: Sequence[PublishedValue]) -> str:
    lines: list[str] = []
    for block in blocks(leaderboard, published):
        lines += [to_latex_comment(text) for text in (block.heading, block.text) if text]
        for section in block.sections:
            columns = "".join("l" if i in section.left else "r" for i in range(len(section.header)))
            lines += ["", to_latex_comment(section.title), f"\\begin{{tabular}}{{{columns}}}", "\\hline"]
            lines += [_tex_line(section.header), "\\hline", *map(_tex_line, section.rows)]
            lines += ["\\hline", "\\end{tabular}"]
        lines += [*map(to_latex_comment, block.notes), ""]
    return _text(lines)


def _tex_line(values: Sequence[str]) -> str:
    return " & ".join(map(to_latex, values)) + r" \\"


_WRITERS: Mapping[Format, Callable[[Leaderboard, Sequence[PublishedValue]], str]] = {
    "md": _markdown,
    "csv": _csv,
    "json": _json,
    "tex": _tex,
}
