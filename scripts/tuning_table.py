"""The trials of a tuning as CSV: one line a run, its settings, its FID without guidance, and what was chosen.

Usage: python scripts/tuning_table.py FOLDER > results/digits/tuning.csv. Chosen are the learning rate of
vanilla and each recipe's options with the lowest mean over the seeds, within one backbone, objective and
length; a trial of which a seed is missing or failed is not chosen.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from stbench.runs.folder import find_runs, read_runs
from stbench.runs.records import RunRecord

COLUMNS = ("backbone", "objective", "recipe", "options", "lr", "seed", "steps", "fid", "mean_fid", "chosen")


def row(record: RunRecord) -> dict[str, Any]:
    """One trial; an unfinished run has no FID."""
    final = [p for p in record.curve if p.stage_index == record.final_stage]
    points = [p for p in final if p.guidance == 1.0 and not p.guides]
    return {
        "backbone": record.backbone,
        "objective": record.objective,
        "recipe": record.recipe,
        "options": json.dumps(dict(record.options), sort_keys=True),
        "lr": record.spec["train"]["lr"],
        "seed": record.seed,
        "steps": record.steps,
        "fid": points[-1].metrics["fid"] if points and record.status == "finished" else "",
    }


def table(records: Iterable[RunRecord]) -> list[dict[str, Any]]:
    """The trials in order, each with its mean over seeds and whether its options were chosen."""
    rows = [row(record) for record in records]
    trials: dict[tuple[Any, ...], list[float]] = {}
    for one in rows:
        if one["fid"] != "":
            trials.setdefault(trial(one), []).append(one["fid"])
    most = max(map(len, trials.values()), default=0)
    best: dict[tuple[Any, ...], float] = {}
    for key, fids in trials.items():
        if len(fids) == most:
            best[key[:4]] = min(best.get(key[:4], float("inf")), mean(fids))
    for one in rows:
        fids = trials.get(trial(one), [])
        one["mean_fid"] = mean(fids) if fids else ""
        one["chosen"] = len(fids) == most and one["mean_fid"] == best[trial(one)[:4]]
    return sorted(
        rows,
        key=lambda one: [str(one[name]) for name in ("backbone", "recipe")] + [one["lr"], one["options"]],
    )


def trial(one: dict[str, Any]) -> tuple[Any, ...]:
    """What the seeds of a trial share: first what it competes within, then what it chose."""
    return one["backbone"], one["objective"], one["recipe"], one["steps"], one["lr"], one["options"]


def main(folder: Path) -> None:
    """Write the CSV to standard output."""
    writer = csv.DictWriter(sys.stdout, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table(read_runs(find_runs([folder]))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
