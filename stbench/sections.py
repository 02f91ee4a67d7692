"""What is printed of a leaderboard and of a run, as titled tables of text, and the units of its figures.

A leaderboard's table makes four sections of at most 100 columns: quality, curve, against the baseline, cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from stbench.compare import BASELINE
from stbench.leaderboard import Against, Row, Table
from stbench.records import CurvePoint, RunRecord
from stbench.stats import Cell, mean

Columns = dict[str, Callable[[CurvePoint], str]]
NONE = "-"
"""Stands for a figure that there is not."""
MOMENTS = 5
"""Points of a curve that fit in 100 columns."""


@dataclass(frozen=True)
class Section:
    """A titled table of text, the common form of all printed formats; the columns in `left` hold words."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})


def heading(table: Table) -> str:
    """What the runs of a table have in common, in one line."""
    return f"{table.dataset}, {table.backbone}, {table.objective}, batch {table.batch}, {table.precision}"


def count(number: float) -> str:
    """A number of images in four digits at most: 800, 51.2k, 1.28M."""
    return _scaled(number)


def flop(number: float) -> str:
    """A number of FLOPs in four digits at most: 1.23 PFLOP."""
    return _scaled(number, " KMGTPE", " ") + "FLOP"


def _scaled(number: float, prefixes: str = " kMGTPE", gap: str = "") -> str:
    power = 0
    while 999.95 <= abs(number) < math.inf and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.3g}" if abs(number) < 100 else f"{number:.4g}"
    return digits + gap + prefixes[power].strip()


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    for size, unit in ((3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def number(value: float) -> str:
    """A metric with four decimals below 0.1, three below 10, two below 100, one above."""
    return f"{value:.{_decimals(value)}f}"


def _decimals(value: float) -> int:
    size = abs(value)
    return 4 if 0 < size < 0.1 else 3 if size < 10 else 2 if size < 100 else 1


def spread(cell: Cell | None) -> str:
    """Mean ± standard deviation, or the one value."""
    if cell is None:
        return NONE
    if cell.std is None:
        return number(cell.mean)
    return f"{number(cell.mean)} ± {cell.std:.{_decimals(cell.mean)}f}"


def protocol(table: Table) -> str:
    """The hashes of a table, and what the evaluation protocol's stands for."""
    fields = ", ".join(f"{name} {_short(value)}" for name, value in table.protocol_fields.items())
    return f"setting {table.setting}, protocol {table.protocol}{': ' if fields else ''}{fields}"


def _short(value: Any) -> str:
    """A digest by its first 8 digits, everything else as it is."""
    text = str(value)
    return text[:8] if len(text) >= 40 and " " not in text else text


def sections(table: Table) -> list[Section]:
    """The four sections of one table."""
    quality = [_quality(row) for row in table.rows]
    against = [line for row in table.rows for line in _versus(row)]
    cost = [_cost(row) for row in table.rows]
    return [
        Section(
            "Quality at the budget",
            ("recipe", "seeds", "images", "FID", "IS", "FID, best guidance", "val loss"),
            tuple(quality),
            frozenset({0, 1}),
        ),
        _along(table),
        Section(
            f"Against {BASELINE} at equal images",
            ("recipe", "counted", "images", "its FID", "ratio", "verdict", "images to its FID", "speed-up"),
            tuple(against),
            frozenset({0, 1, 5}),
        ),
        Section(
            "Cost of training: last stage / all stages",
            ("recipe", "needs", "images", "FLOPs", "time"),
            tuple(cost),
            frozenset({0, 1}),
        ),
    ]


def _quality(row: Row) -> tuple[str, ...]:
    seeds = " ".join(map(str, row.seeds)) + "".join(f" ({seed})" for seed in row.unfinished)
    best = NONE
    if row.guided:
        best = f"{spread(row.guided.fid)} @{row.guided.scale:g}{'*' if row.guided.edge else ''}"
    figures = (spread(row.fid), spread(row.inception), best, number(row.val_loss.mean))
    return row.recipe, seeds, count(row.images), *figures


def _along(table: Table) -> Section:
    """FID at the last images and, going back, at the nearest points to their half, quarter and eighth."""
    chosen: list[int] = []
    for images in sorted({point.images for row in table.rows for point in row.curve}, reverse=True):
        if len(chosen) < MOMENTS and (not chosen or images <= chosen[-1] / 2):
            chosen.append(images)
    moments = chosen[::-1]
    rows = []
    for row in table.rows:
        known = {point.images: point.fid for point in row.curve}
        rows.append((row.recipe, *(spread(known.get(images)) for images in moments)))
    header = ("recipe", *(f"at {count(images)}" for images in moments))
    return Section("FID along training, images of the last stage", header, tuple(rows))


def _versus(row: Row) -> list[tuple[str, ...]]:
    if not row.earlier_images:
        return [(row.recipe, "both", *_axis(row.student, row))]
    return [
        (row.recipe, "student", *_axis(row.student, row)),
        ("", "all paid", *_axis(row.paid, row)),
    ]


def _axis(against: Against, row: Row) -> tuple[str, ...]:
    theirs = number(against.fid.mean) if against.fid else NONE
    ratio = NONE if against.ratio is None else f"{against.ratio:.2f}"
    reach, arrival, speed = against.reach, NONE, NONE
    if reach and reach.images is not None:
        arrival, speed = count(reach.images), f"{reach.speedup:.2f}x"
    elif reach:
        some = f" ({reach.arrived} of {len(row.seeds)} seeds)" if reach.arrived else ""
        arrival = f"> {count(reach.limit)}{some}"
    return count(against.images), theirs, ratio, against.verdict, arrival, speed


def _cost(row: Row) -> tuple[str, ...]:
    return (
        row.recipe,
        row.needs or NONE,
        _pair(count(row.student.images), count(row.paid.images)),
        _pair(flop(row.flops_student.mean), flop(row.flops_total.mean)),
        _pair(duration(row.seconds_student.mean), duration(row.seconds_total.mean)),
    )


def _pair(last: str, total: str) -> str:
    return last if last == total else f"{last} / {total}"


def facts(record: RunRecord) -> dict[str, str]:
    """What one run is, by name."""
    options = record.spec["recipe"].get("resolved", {})
    named = ", ".join(f"{name}={value}" for name, value in options.items())
    return {
        "run": f"{record.run_id} ({record.status})",
        "folder": record.path,
        "setting": f"{record.dataset}, {record.backbone}, {record.objective}, {record.steps} steps of "
        f"{record.batch} images, {record.precision}, seed {record.seed}",
        "recipe": f"{record.recipe}: {named}" if named else record.recipe,
        "needs": record.needs or "nothing from outside",
        "hashes": f"setting {record.setting_hash}, train {record.train_hash}, protocol "
        f"{', '.join(record.protocols) or 'none yet'}",
    }


def curves(record: RunRecord) -> list[Section]:
    """One run's evaluations, all stages; metrics beyond four, or lacking at some points, come apart."""
    points = sorted(record.curve, key=lambda p: (p.stage_index, p.protocol, p.step, p.guidance, p.interval))
    names = list(dict.fromkeys(name for point in points for name in point.metrics))
    everywhere = [name for name in names if all(name in point.metrics for point in points)]
    some = [name for name in names if name not in everywhere[:4]]
    place: Columns = {
        "stage": lambda p: p.stage,
        "step": lambda p: str(p.step),
        "images": lambda p: count(p.images),
        "guidance": lambda p: "none" if p.guidance == 1.0 else f"{p.guidance:g}",
    }
    if len({point.protocol for point in points}) > 1:
        place = {"protocol": lambda p: p.protocol, **place}
    cost: Columns = {
        "val loss": lambda p: number(mean(p.val_loss)) if p.val_loss else NONE,
        "time": lambda p: duration(p.seconds),
    }
    main = place | {name: _metric(name) for name in names if name not in some} | cost
    found = [_listing(f"Curve of {record.run_id}", points, main)]
    further = [point for point in points if any(name in point.metrics for name in some)]
    columns = place | {name: _metric(name) for name in some}
    return found + ([_listing("Further metrics", further, columns)] if further else [])


def _metric(name: str) -> Callable[[CurvePoint], str]:
    return lambda point: number(point.metrics[name]) if name in point.metrics else NONE


def _listing(title: str, points: Sequence[CurvePoint], columns: Columns) -> Section:
    rows = tuple(tuple(column(point) for column in columns.values()) for point in points)
    return Section(title, tuple(name.replace("_", " ") for name in columns), rows)


def stages(record: RunRecord) -> Section:
    """What the finished stages of one run did and cost."""
    header = ("stage", "steps", "images", "time", "student", "heads", "teachers", "made")
    rows = [
        (
            stage.name,
            str(stage.steps),
            count(stage.images),
            duration(stage.seconds),
            flop(stage.flops_student),
            flop(stage.flops_heads),
            flop(stage.flops_teachers),
            "reused" if stage.reused else "here",
        )
        for stage in record.stages
    ]
    return Section("Stages", header, tuple(rows), frozenset({0, 7}))
