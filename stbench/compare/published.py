"""Numbers that papers and repositories report, read from a CSV file. None of them was measured here."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from stbench.compare.format import NONE, Section, count
from stbench.core.errors import UserError

FILE = Path("results/reported.csv")
"""Where a clone of stbench has it."""
TITLE = "Reported by papers and repositories; not measured here"


@dataclass(frozen=True)
class Figure:
    """One published number, all fields as text; "" is not stated."""

    model: str
    recipe: str
    backbone: str
    dataset: str
    resolution: str
    steps: str
    epochs: str
    guidance: str
    sampler: str
    metric: str
    value: str
    n_samples: str
    source: str
    certainty: str
    note: str

    @property
    def setting(self) -> tuple[str, ...]:
        """What figures of one model, training and sampling share."""
        apart = ("metric", "value")
        return tuple(getattr(self, field.name) for field in fields(self) if field.name not in apart)


def read_reported(path: Path | None = None) -> list[Figure]:
    """The figures of `path`, without one those of the clone that is worked in, or of stbench's own.

    UserError if there is no such file, or for a line that is no figure.
    """
    path = path or next(filter(Path.is_file, (FILE, Path(__file__).parents[2] / FILE)), FILE)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"expected published numbers in {path}, cannot read it ({getattr(error, 'strerror', error)}); "
            "run inside a clone of stbench, or name a file with --reported-file FILE"
        ) from None
    reader = csv.DictReader(io.StringIO(text), strict=True)
    wanted = [field.name for field in fields(Figure)]
    if list(reader.fieldnames or ()) != wanted:
        raise UserError(f"{path} line 1: expected the columns {','.join(wanted)}; restore the file")
    return [_figure(row, f"{path} line {reader.line_num}") for row in reader]


def _figure(row: dict[str, str], where: str) -> Figure:
    if None in row or None in row.values():
        raise UserError(f"{where}: expected {len(fields(Figure))} columns; quote values that hold a comma")
    try:
        float(row["value"])
    except ValueError:
        raise UserError(f"{where}: expected a number as value, found {row['value']!r}") from None
    for name in ("model", "metric", "source", "certainty"):
        if not row[name]:
            raise UserError(f"{where}: expected a {name}, found none")
    return Figure(**row)


def section(figures: Sequence[Figure]) -> tuple[Section, list[str]]:
    """The figures as one table, those of one model, training and sampling in one line; notes by number."""
    lines: dict[tuple[str, ...], list[Figure]] = {}
    for figure in figures:
        lines.setdefault(figure.setting, []).append(figure)
    numbers: dict[str, int] = {}
    rows = [_line(group, numbers) for group in lines.values()]
    header = ("model", "data", "training", "sampling", "figures", "source", "certainty")
    notes = [f"[{number}] {note}" for note, number in numbers.items()]
    return Section(TITLE, header, tuple(rows), frozenset(range(7))), notes


def _line(figures: Sequence[Figure], numbers: dict[str, int]) -> tuple[str, ...]:
    first = figures[0]
    mark = f" [{numbers.setdefault(first.note, len(numbers) + 1)}]" if first.note else ""
    steps = f"{count(int(first.steps))} steps" if first.steps.isdigit() else first.steps
    guidance = "no guidance" if first.guidance == "none" else first.guidance
    return (
        first.model + mark,
        f"{first.dataset} {first.resolution}",
        _joined(steps, f"{first.epochs} epochs" if first.epochs else ""),
        _joined(guidance, first.sampler),
        ", ".join(f"{_metric(figure)} {figure.value}" for figure in figures),
        first.source,
        first.certainty,
    )


def _metric(figure: Figure) -> str:
    """FID with the number of samples that it depends on: FID-50k."""
    known = figure.metric == "FID" and figure.n_samples.isdigit()
    return f"FID-{count(int(figure.n_samples))}" if known else figure.metric


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part) or NONE
