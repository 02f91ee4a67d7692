"""The data of a report page: settings with their rows, and runs with curves, costs and settings, for JSON.

Equal parts of many runs, such as the environment, are stored once in `shared` and named by their index.
All text is made visible here; the page shows it as text and never as markup.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stbench.compare.compact import Entry, entries, headings
from stbench.compare.leaderboard import Leaderboard, Table
from stbench.compare.stats import mean
from stbench.core.text import visible
from stbench.report.features import features_content
from stbench.report.numbers import short
from stbench.report.pictures import Album, read_samples
from stbench.runs.folder import RunFolder
from stbench.runs.records import CurvePoint, RunRecord

Tree = dict[str, Any]


class Shared:
    """Values that occur in many runs, each stored once."""

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._index: dict[str, int] = {}

    def add(self, value: Any) -> int:
        """Return the index of `value`, which is added if it is new."""
        value = to_plain(value)
        key = json.dumps(value, sort_keys=True)
        if key not in self._index:
            self._index[key] = len(self.values)
            self.values.append(value)
        return self._index[key]


def to_plain(value: Any) -> Any:
    """Return `value` for JSON: visible text, and null for numbers that are not finite."""
    if isinstance(value, Mapping):
        return {visible(str(key)): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def page_content(
    leaderboard: Leaderboard,
    records: Sequence[RunRecord],
    *,
    pictures: bool = True,
    inspection: Path | None = None,
) -> Tree:
    """Return the data of the page.

    Args:
        leaderboard: The tables that are shown.
        records: The runs, including those that are in no table.
        pictures: Whether to embed sample pictures of the rows and the maps of the inspection.
        inspection: A file written by `stbench inspect`, to be shown with its figures.

    Raises:
        UserError: If the environment of a run, or the inspection, is damaged.
    """
    shared = Shared()
    index_of = {record.path: index for index, record in enumerate(records)}
    titles = headings(leaderboard.tables)
    tables = [
        _table(table, title, index_of)
        for table, title in zip(leaderboard.tables, titles, strict=True)
        if table.rows
    ]
    album = Album() if pictures else None
    rows = [_first_run(entry, index_of, records) for entry in _entries(leaderboard)]
    return {
        "tables": tables,
        "runs": [_run(record, shared) for record in records],
        "shared": shared.values,
        "samples": read_samples(rows, album) if album else [],
        "features": features_content(inspection, album) if inspection else None,
        "pictures_left_out": album.left_out if album else 0,
    }


def _entries(leaderboard: Leaderboard) -> list[Entry]:
    return [entry for table in leaderboard.tables for entry in _own_entries(table)]


def _own_entries(table: Table) -> list[Entry]:
    """Return the rows with a curve of their own: those that another network guides have none."""
    return [entry for entry in entries(table) if entry.row.curve]


def _first_run(
    entry: Entry, index_of: Mapping[str, int], records: Sequence[RunRecord]
) -> tuple[str, RunRecord]:
    """Return the title of a row's samples and its first run."""
    record = records[index_of[entry.row.paths[0]]]
    return visible(f"{entry.name}, {record.backbone}, seed {record.seed}"), record


def _table(table: Table, title: str, index_of: Mapping[str, int]) -> Tree:
    """Return a table of the leaderboard as the curves need it."""
    rows = [
        {
            "name": visible(entry.name),
            "style": visible(entry.row.recipe),
            "baseline": entry.row.student.plain.verdict == "baseline",
            "runs": [index_of[path] for path in entry.row.paths],
        }
        for entry in _own_entries(table)
    ]
    return {
        "title": visible(title),
        "metric": visible(table.metric),
        "protocol": visible(table.protocol),
        "unit": table.at.unit if table.at else "images",
        "budgets": [table.at.value] * 2 if table.at else [table.student_images, table.paid_images],
        "rows": rows,
    }


def _run(record: RunRecord, shared: Shared) -> Tree:
    """Return the section of a run."""
    spec = record.spec
    earlier = [stage for stage in record.stages if stage.index < record.final_stage]
    return {
        "id": visible(record.run_id),
        "folder": visible(record.path),
        "state": visible(record.status),
        "label": visible(record.label),
        "backbone": visible(record.backbone),
        "setting": visible(f"{record.dataset}, {record.objective} objective"),
        "seed": record.seed,
        "steps": record.steps,
        "batch": record.batch,
        "precision": visible(record.precision),
        "needs": visible(record.needs),
        "hashes": [visible(record.setting_hash), visible(record.train_hash)],
        "recipe": shared.add(spec["recipe"].get("effective", record.options)),
        "train": shared.add(spec["train"]),
        "eval": shared.add(spec.get("eval", {})),
        "network": shared.add(spec["backbone"].get("effective", spec["backbone"].get("options", {}))),
        "environment": shared.add(RunFolder(Path(record.path)).environment()),
        "protocols": {visible(name): shared.add(fields) for name, fields in record.protocols.items()},
        "command": visible(f"stbench run --config {shlex.quote(record.path)} --output reproduced"),
        "stages": [
            [
                visible(stage.name), stage.steps, stage.images, short(stage.seconds),
                short(stage.flops_student), short(stage.flops_heads), short(stage.flops_teachers),
                stage.reused,
            ]
            for stage in record.stages
        ],
        "earlier": [
            sum(stage.images for stage in earlier),
            short(sum(stage.seconds for stage in earlier)),
            short(sum(stage.flops for stage in earlier)),
        ],
        "curves": _curves(record.final_points),
    }  # fmt: skip


def _curves(points: Sequence[CurvePoint]) -> Tree:
    """Return the points as columns: protocol -> guidance -> column -> values in the order of steps."""
    groups: dict[str, dict[str, list[CurvePoint]]] = {}
    for point in sorted(points, key=lambda point: point.step):
        groups.setdefault(visible(point.protocol), {}).setdefault(_guidance(point), []).append(point)
    return {
        protocol: {guidance: _columns(found) for guidance, found in by_guidance.items()}
        for protocol, by_guidance in groups.items()
    }


def _guidance(point: CurvePoint) -> str:
    """Return the name of a guidance scale, its interval and the guides; "none" at scale 1 without guides."""
    interval = tuple(point.interval)
    everywhere = point.guidance == 1.0 or interval == (0.0, 1.0)
    where = "" if everywhere else " in [{:g}, {:g}]".format(*interval)
    guides = f", {visible(point.guides)}" if point.guides else ""
    return "none" if point.guidance == 1.0 and not guides else f"{point.guidance:g}{where}{guides}"


def _columns(points: Sequence[CurvePoint]) -> Tree:
    metrics = dict.fromkeys(name for point in points for name in point.metrics)
    values = {visible(name): [short(point.metrics.get(name)) for point in points] for name in metrics}
    if all(point.val_loss for point in points):
        values["val_loss"] = [short(mean(point.val_loss)) for point in points]
    return {
        "step": [point.step for point in points],
        "images": [point.images for point in points],
        "seconds": [short(point.seconds) for point in points],
        "flops": [short(point.flops) for point in points],
        "metrics": values,
    }
