"""Values that papers and repositories report, read from a CSV file. None was measured by stbench."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from stbench.compare.format import NONE, Section, count
from stbench.core.errors import UserError
from stbench.core.safe_load import MalformedError, parse_finite, read_text, shorten

PUBLISHED_FILE = Path("results/reported.csv")
"""Path within a clone of stbench."""
MAX_BYTES = 1 << 22
"""Size of such a file."""
TITLE = "Reported by papers and repositories; not measured here"


@dataclass(frozen=True)
class PublishedValue:
    """One published value. All fields are text; "" means not stated."""

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
    def evaluation(self) -> tuple[str, ...]:
        """All fields except metric and value: equal for the metrics of one evaluation of one model."""
        return tuple(
            getattr(self, field.name) for field in fields(self) if field.name not in ("metric", "value")
        )


def read_published(path: Path | None = None) -> list[PublishedValue]:
    """Read published values from a CSV file.

    Args:
        path: The file. By default, results/reported.csv in the working directory, or else in the clone that
            stbench is installed from.

    Raises:
        UserError: The file cannot be read or a line is invalid.
    """
    if path is None:
        candidates = (PUBLISHED_FILE, Path(__file__).parents[2] / PUBLISHED_FILE)
        path = next(filter(Path.is_file, candidates), PUBLISHED_FILE)
    try:
        text = read_text(path, limit=MAX_BYTES)
    except (OSError, MalformedError) as error:
        raise UserError(
            f"cannot read published values from {path} ({getattr(error, 'strerror', None) or error}); "
            "run inside a clone of stbench, or name a file with --reported-file FILE"
        ) from None
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    columns = [field.name for field in fields(PublishedValue)]
    try:
        if list(reader.fieldnames or ()) != columns:
            raise UserError(f"{path} line 1: expected the columns {','.join(columns)}; restore the file")
        return [_parse(row, f"{path} line {reader.line_num}") for row in reader]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num + 1}: {error}; restore the file") from None


def _parse(row: dict[str, str], where: str) -> PublishedValue:
    # csv stores surplus cells under the key None, and None for missing cells.
    if None in row or None in row.values():
        raise UserError(f"{where}: expected {len(fields(PublishedValue))} columns; quote values with commas")
    try:
        parse_finite(row["value"])
    except ValueError:
        found = shorten(row["value"])
        raise UserError(f"{where}: expected a finite number in column 'value', found {found}") from None
    for name in ("model", "metric", "source", "certainty"):
        if not row[name]:
            raise UserError(f"{where}: column '{name}' must not be empty")
    return PublishedValue(**row)


def published_section(values: Sequence[PublishedValue]) -> tuple[Section, list[str]]:
    """Return the values as a text table, one line per evaluation of a model, and the numbered notes."""
    evaluations: dict[tuple[str, ...], list[PublishedValue]] = {}
    for value in values:
        evaluations.setdefault(value.evaluation, []).append(value)
    notes = dict.fromkeys(metrics[0].note for metrics in evaluations.values() if metrics[0].note)
    numbers = {note: number for number, note in enumerate(notes, start=1)}
    rows = [_line(metrics, numbers) for metrics in evaluations.values()]
    header = ("model", "data", "training", "sampling", "values", "source", "certainty")
    section = Section(TITLE, header, tuple(rows), frozenset(range(len(header))))
    return section, [f"[{number}] {note}" for note, number in numbers.items()]


def _line(metrics: Sequence[PublishedValue], numbers: dict[str, int]) -> tuple[str, ...]:
    """Format the metrics of one evaluation."""
    first = metrics[0]
    mark = f" [{numbers[first.note]}]" if first.note else ""
    steps = f"{count(int(first.steps))} steps" if _is_count(first.steps) else first.steps
    guidance = "no guidance" if first.guidance == "none" else first.guidance
    return (
        first.model + mark,
        f"{first.dataset} {first.resolution}",
        _joined(steps, f"{first.epochs} epochs" if first.epochs else ""),
        _joined(guidance, first.sampler),
        ", ".join(f"{_metric(metric)} {metric.value}" for metric in metrics),
        first.source,
        first.certainty,
    )


def _metric(value: PublishedValue) -> str:
    """Add the number of samples to FID, which depends on it: FID-50k."""
    if value.metric == "FID" and _is_count(value.n_samples):
        return f"FID-{count(int(value.n_samples))}"
    return value.metric


def _is_count(text: str) -> bool:
    """Whether a cell is a plain number such as 400000, rather than "400K" or a range."""
    return text.isascii() and text.isdecimal() and len(text) <= 15


def _joined(*parts: str) -> str:
    return ", ".join(part for part in parts if part) or NONE
