"""The facts of one run as sections: settings, stages, costs, curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stbench.compare.format import NONE, Columns, Section, count, duration, flop, number
from stbench.compare.stats import mean
from stbench.runs.records import CurvePoint, RunRecord


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
