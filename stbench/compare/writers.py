"""A leaderboard as Markdown, CSV, JSON or LaTeX text.

Markdown and LaTeX contain what the terminal shows. CSV and JSON contain all values at full precision. Each
writer escapes all text with the function of its format in stbench/core/text.py.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from stbench.compare.blocks import VIEW, Block, View, blocks
from stbench.compare.leaderboard import Leaderboard, MeanRank, Row, Table, UnfinishedRow
from stbench.compare.published import PUBLISHED_FILE, TITLE, PublishedValue
from stbench.compare.ranks import rank_names
from stbench.core.errors import UserError
from stbench.core.text import to_csv, to_latex, to_latex_comment, to_markdown
from stbench.runs.schema import plain

Format = Literal["md", "csv", "json", "tex"]

LEADERBOARD_SCHEMA = 3
"""Version of the JSON format; docs/leaderboard.schema.json describes it."""
PREAMBLE = r"written by stbench compare; needs \usepackage{booktabs}"
"""First line of a LaTeX file."""


def render(
    leaderboard: Leaderboard,
    form: Format,
    published: Sequence[PublishedValue] = (),
    view: View = VIEW,
) -> str:
    """Return the leaderboard and the `published` values as text that ends in a newline.

    `view` selects between the forms of Markdown and LaTeX; CSV and JSON always contain all values.

    Raises:
        UserError: Published values were given for CSV, which has room for a single table.
    """
    if form == "csv":
        return _csv(leaderboard, published)
    if form == "json":
        return _json(leaderboard, published)
    parts = blocks(leaderboard, published, view)
    return _markdown(parts) if form == "md" else _tex(parts)


_OWN = re.compile(
    rb"## .+\n\n(?:setting |at .+ images|\| recipe)|no finished runs to compare\n"
    rb"|% written by stbench compare|% .+\n% setting |% no finished runs to compare\n"
    rb"|\{\s*\"schema\":\s*\d+,\s*\"tables\":\s*\[|dataset,setting,protocol,backbone,|\s*\Z"
)
"""The beginning of a leaderboard in any format."""


def is_leaderboard(path: Path) -> bool:
    """Whether a file begins as the files with leaderboards do, in any format."""
    with path.open("rb") as file:
        return _OWN.match(file.read(4096)) is not None


# --- Markdown ---


def _markdown(parts: Sequence[Block]) -> str:
    lines: list[str] = []
    for block in parts:
        lines += [f"## {to_markdown(block.heading)}", ""] if block.heading else []
        lines += [to_markdown(block.text, block=True), ""] if block.text else []
        for section in block.sections:
            rule = [":--" if i in section.left else "--:" for i in range(len(section.header))]
            header, *body = [tuple(map(to_markdown, row)) for row in (section.header, *section.rows)]
            title = f"**{to_markdown(section.title)}**"
            lines += [title, ""] if section.title != block.heading else []
            lines += [f"| {' | '.join(row)} |" for row in (header, rule, *body)]
            lines += [""]
        notes = (*block.remarks, *block.notes)
        lines += [f"- {to_markdown(note, block=True)}" for note in notes]
        lines += [""] if notes else []
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
    *("metric", "baseline", "student_images", "paid_images"),
)


def _csv(leaderboard: Leaderboard, published: Sequence[PublishedValue]) -> str:
    if published:
        raise UserError(
            "--reported is not available for csv, which contains a single table; choose another --format, "
            f"or read the published values from {PUBLISHED_FILE}, which is a CSV file"
        )
    ranks = {rank.recipe: rank for rank in leaderboard.ranks}
    rows: list[dict[str, Any]] = []
    for table in leaderboard.tables:
        for row, name in rank_names(table):
            rows.append(_csv_row(table, row) | _csv_ranks(ranks.get(name)))
        rows += [_csv_row(table, row) for row in table.absent]
    columns = dict.fromkeys(name for row in rows for name in row)
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(map(to_csv, columns))
    writer.writerows([row.get(name, "") for name in columns] for row in rows)
    return file.getvalue()


def _csv_row(table: Table, row: Row | UnfinishedRow) -> dict[str, Any]:
    fields = {name: getattr(table, name) for name in _TABLE_COLUMNS} | {"state": "finished"} | asdict(row)
    for name in ("curve", "options"):  # the options are part of the name
        fields.pop(name, None)
    if table.at:
        fields |= {"at_unit": table.at.unit, "at_value": table.at.value}
    if isinstance(row, UnfinishedRow):
        fields |= {"seeds": (), "unfinished": row.seeds}
    return _flat(fields)


def _csv_ranks(rank: MeanRank | None) -> dict[str, Any]:
    if rank is None:
        return {}
    means = {"mean_rank": rank.student, "mean_rank_guided": rank.guided, "mean_rank_paid": rank.paid}
    return {name: value for name, value in means.items() if value is not None}


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


def _tex(parts: Sequence[Block]) -> str:
    lines: list[str] = [to_latex_comment(PREAMBLE)]
    for block in parts:
        lines += [to_latex_comment(text) for text in (block.heading, block.text) if text]
        for section in block.sections:
            columns = "".join("l" if i in section.left else "r" for i in range(len(section.header)))
            lines += ["", to_latex_comment(section.title), f"\\begin{{tabular}}{{{columns}}}", "\\toprule"]
            lines += [_tex_line(section.header), "\\midrule", *map(_tex_line, section.rows)]
            lines += ["\\bottomrule", "\\end{tabular}"]
        lines += [*map(to_latex_comment, (*block.remarks, *block.notes)), ""]
    return _text(lines)


def _tex_line(values: Sequence[str]) -> str:
    return " & ".join(map(to_latex, values)) + r" \\"
