"""One run as text: settings, stages, costs and learning curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stbench.compare.format import NONE, Section, count, duration, flop, number
from stbench.compare.stats import mean
from stbench.runs.records import CurvePoint, RunRecord

SECTION_METRICS = 4
"""Metrics that fit in a table of a curve."""

Columns = dict[str, Callable[[CurvePoint], str]]
"""Heading of a column -> the text of its cells."""


def facts(record: RunRecord) -> dict[str, str]:
    """Return the settings of a run, by name."""
    options = record.spec["recipe"].get("effective", {})
    options_text = ", ".join(f"{name}={value}" for name, value in options.items())
    return {
        "run": f"{record.run_id} ({record.status})",
        "folder": record.path,
        "setting": f"{record.dataset}, {record.backbone}, {record.objective}, {record.steps} steps of "
        f"{record.batch} images, {record.precision}, seed {record.seed}",
        "recipe": f"{record.recipe}: {options_text}" if options_text else record.recipe,
        "needs": record.needs or "nothing from outside the model",
        "hashes": f"setting {record.setting_hash}, train {record.train_hash}, protocol "
        f"{', '.join(record.protocols) or 'none yet'}",
    }


def stages(record: RunRecord) -> Section:
    """Return length and cost of the finished stages of a run."""
    header = ("stage", "steps", "images", "time", "student", "heads", "teachers", "origin")
    rows = [
        (
            stage.name,
            str(stage.steps),
            count(stage.images),
            duration(stage.seconds),
            flop(stage.flops_student),
            flop(stage.flops_heads),
            flop(stage.flops_teachers),
            "reused" if stage.reused else "trained",
        )
        for stage in record.stages
    ]
    return Section("Stages", header, tuple(rows), frozenset({0, 7}))


def curves(record: RunRecord) -> list[Section]:
    """Return the evaluations of all stages of a run.

    The first section has up to four metrics that every point has. The others follow, four in a section.
    """
    points = sorted(
        record.curve, key=lambda p: (p.stage_index, p.protocol, p.step, p.guidance, p.guides, p.interval)
    )

    # Metrics of the sections
    metrics = list(dict.fromkeys(name for point in points for name in point.metrics))
    everywhere = [name for name in metrics if all(name in point.metrics for point in points)]
    main = everywhere[:SECTION_METRICS]
    further = [name for name in metrics if name not in main]

    # Columns that identify a point; the protocol only where there are several
    position: Columns = {
        "stage": lambda p: p.stage,
        "step": lambda p: str(p.step),
        "images": lambda p: count(p.images),
        "guidance": _guidance,
    }
    if len({point.protocol for point in points}) > 1:
        position = {"protocol": lambda p: p.protocol, **position}

    # Sections
    cost: Columns = {
        "val loss": lambda p: number(mean(p.val_loss)) if p.val_loss else NONE,
        "time": lambda p: duration(p.seconds),
    }
    main_columns = position | {name: _metric(name) for name in main} | cost
    sections = [_curve_section(f"Curve of {record.run_id}", points, main_columns)]
    for start in range(0, len(further), SECTION_METRICS):
        names = further[start : start + SECTION_METRICS]
        its_points = [point for point in points if any(name in point.metrics for name in names)]
        columns = position | {name: _metric(name) for name in names}
        sections.append(_curve_section("Further metrics", its_points, columns))
    return sections


def _guidance(point: CurvePoint) -> str:
    scale = [] if point.guidance == 1.0 else [f"{point.guidance:g}"]
    return ", ".join([*scale, *([point.guides] if point.guides else [])]) or "none"


def _metric(name: str) -> Callable[[CurvePoint], str]:
    return lambda point: number(point.metrics[name]) if name in point.metrics else NONE


def _curve_section(title: str, points: Sequence[CurvePoint], columns: Columns) -> Section:
    rows = tuple(tuple(column(point) for column in columns.values()) for point in points)
    return Section(title, tuple(name.replace("_", " ") for name in columns), rows)
