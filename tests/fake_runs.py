"""Synthetic run folders, for tests and timings of what reads them: one setting, no training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stbench.runs.folder import RunFolder, State
from stbench.runs.records import CurvePoint, RunRecord, StageRecord

BATCH = 64
STEPS = (200, 400, 800)
LONG = (*STEPS, 1600)
PROTOCOL = "aaaa1111"


def spec(recipe: str, seed: int, steps: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """A whole spec.json of a one-stage run."""
    return {
        "run_id": "-".join(["digits-sit", recipe, *map(str, options.values()), f"s{seed}", str(steps)]),
        "dataset": "digits",
        "backbone": {"name": "sit", "size": "ti/2", "options": {}},
        "objective": "linear",
        "recipe": {"name": recipe, "options": dict(options), "resolved": dict(options), "needs": ""},
        "train": {"steps": steps, "batch": BATCH, "precision": "fp32", "lr": 2e-3},
        "eval": {"samples": 1000},
        "seed": seed,
        "stage_count": 1,
        "setting_hash": "5e771a60",
        "train_hash": f"{recipe}{seed}",
        "plugins": {},
    }


def point(step: int, fid: float, guidance: float = 1.0) -> CurvePoint:
    """An evaluation of a one-stage run."""
    return CurvePoint(
        stage="student",
        stage_index=0,
        step=step,
        images=step * BATCH,
        guidance=guidance,
        interval=(0.0, 1.0),
        protocol=PROTOCOL,
        metrics={"fid": fid, "is": 5.0},
        val_loss=[0.4] * 10,
        seconds=step / 16,
        flops=step * 1e12,
    )


def stage(index: int, steps: int) -> StageRecord:
    """A finished stage."""
    return StageRecord(
        name="student" if index else "teacher",
        index=index,
        steps=steps,
        images=steps * BATCH,
        seconds=steps / 16,
        warmup_seconds=0.5,
        flops_student=steps * 1e12,
        flops_heads=0.0,
        flops_teachers=0.0,
        fingerprint="f" * 64,
        sha256={"ema": "0" * 64},
        reused=False,
    )


def build(
    root: Path,
    recipe: str,
    seed: int,
    fids: Sequence[float],
    *,
    steps: Sequence[int] = STEPS,
    teacher: int = 0,
    status: State = "finished",
    protocol: str = PROTOCOL,
    guided: Mapping[float, float] | None = None,
    guided_at: Mapping[int, Mapping[float, float]] | None = None,
    options: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Write a run folder with these FIDs in its last stage, after a teacher of `teacher` steps, and read it.

    `guided` maps a scale to the FID at the last of `steps`, `guided_at` does so for other steps; `changes`
    replaces keys of spec.json.
    """
    last = 1 if teacher else 0
    content = spec(recipe, seed, steps[-1], options or {}) | {"stage_count": last + 1, **(changes or {})}
    folder = RunFolder(root / content["run_id"])
    folder.create(content, {"device": "cpu"})
    if teacher:
        folder.add_stage(stage(0, teacher))
        folder.append_points([replace(point(teacher, 1.0), stage="teacher")])
    points = [point(step, fid) for step, fid in zip(steps, fids, strict=False)]
    scales = {steps[-1]: guided or {}, **(guided_at or {})}
    points += [point(step, fid, scale) for step, fids in scales.items() for scale, fid in fids.items()]
    folder.append_points([replace(p, stage_index=last, protocol=protocol) for p in points])
    folder.add_protocol(protocol, {"samples": 1000, "sampler": "euler", "steps": 20})
    if status == "finished":
        folder.add_stage(stage(last, steps[-1]))
    folder.write_status(status)
    return folder.record()


def digits(root: Path) -> list[RunRecord]:
    """Three recipes of three seeds, near real figures; the one-stage recipes go on to 1600 steps."""
    runs = []
    for seed, f in enumerate((1.0, 1.06, 0.97)):
        plain = [10.27 * f, 2.68 * f, 0.9 * f, 0.429 * f]
        aligned = [10.39 * f, 2.80 * f * f, 0.961 * f, 0.45 * f]
        taught = [7.74 * f, 1.79 * f, 0.75 * f * (1 + 0.02 * seed)]
        runs += [
            build(
                root,
                "vanilla",
                seed,
                plain,
                steps=LONG,
                guided={1.5: 0.21 * f, 2.0: 0.4 * f},
                guided_at={800: {1.5: 0.46 * f, 2.0: 0.6 * f}},
            ),
            build(
                root,
                "vae-align",
                seed,
                aligned,
                steps=LONG,
                guided={1.5: 0.23 * f, 2.0: 0.39 * f},
                guided_at={800: {1.5: 0.5 * f, 2.0: 0.7 * f}},
            ),
            build(
                root, "self-transcendence", seed, taught, teacher=800, guided={1.5: 0.5 * f, 2.0: 0.48 * f}
            ),
        ]
    return runs
