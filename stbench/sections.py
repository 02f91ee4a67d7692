"""Titled tables of text, the units of their figures, and what is printed of one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stbench.records import CurvePoint, RunRecord
from stbench.stats import Cell, mean

Columns = dict[str, Callable[[CurvePoint], str]]
NONE = "-"
"""Stands for a figure that there is not."""


@dataclass(frozen=True)
class Section:
    """A titled table of text, the common form of all printed formats; the columns in `left` hold words."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: frozenset[int] = frozenset({0})


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
