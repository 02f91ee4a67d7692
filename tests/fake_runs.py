"""Synthetic runs of one setting for tests and benchmarks of what reads them. Nothing is trained.

`make_record` builds a record in memory, `write_run` writes a run folder and reads it back, and `make_entry`
builds the journal entry of a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stbench.runs.folder import RunFolder, State
from stbench.runs.journal import JournalEntry
from stbench.runs.records import CurvePoint, RunRecord, StageRecord
from stbench.runs.sealed import seal

BATCH = 64
STEPS = (200, 400, 800)
LONG_STEPS = (*STEPS, 1600)
PROTOCOL = "aaaa1111"
SETTING = "5e771a60"
PROTOCOL_FIELDS = {"samples": 1000, "sampler": "euler", "steps": 20}


def make_spec(recipe: str, seed: int, steps: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a complete spec.json of a one-stage run."""
    return {
        "run_id": "-".join(["digits-sit", recipe, *map(str, options.values()), f"s{seed}", str(steps)]),
        "dataset": "digits",
        "backbone": {"name": "sit", "size": "ti/2", "options": {}},
        "objective": "linear",
        "recipe": {"name": recipe, "options": dict(options), "effective": dict(options), "needs": ""},
        "train": {"steps": steps, "batch": BATCH, "precision": "fp32", "lr": 2e-3},
        "eval": {"samples": 1000},
        "seed": seed,
        "stage_count": 1,
        "setting_hash": SETTING,
        "train_hash": f"{recipe}{seed}",
        "plugins": {},
    }


def make_point(step: int, fid: float, guidance: float = 1.0) -> CurvePoint:
    """Return an evaluation of a one-stage run."""
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


def make_stage(index: int, steps: int) -> StageRecord:
    """Return a finished stage: the teacher (index 0) or the student (index 1)."""
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


def make_record(
    recipe: str,
    seed: int,
    fids: Sequence[float],
    *,
    root: Path = Path("runs"),
    steps: Sequence[int] = STEPS,
    teacher: int = 0,
    status: State = "finished",
    protocol: str = PROTOCOL,
    guided: Mapping[float, float] | None = None,
    guided_at: Mapping[int, Mapping[float, float]] | None = None,
    options: Mapping[str, Any] | None = None,
    changes: Mapping[str, Any] | None = None,
) -> RunRecord:
    """Return the record of a run with these FIDs in its last stage.

    Args:
        recipe: Name of the recipe.
        seed: Seed of the run.
        fids: FID without guidance at `steps`; fewer than `steps` if the run is not finished.
        root: Directory of the run folder.
        steps: Steps of the evaluations; the last one is the length of the last stage.
        teacher: Steps of an earlier stage; 0 for none.
        status: State of the run.
        protocol: Hash of the evaluation protocol.
        guided: Guidance scale -> FID at the last of `steps`.
        guided_at: Step -> guidance scale -> FID.
        options: Recipe options.
        changes: Replacements for keys of spec.json.
    """
    last = 1 if teacher else 0
    spec = make_spec(recipe, seed, steps[-1], options or {}) | {"stage_count": last + 1, **(changes or {})}

    # Curve: the teacher's evaluation, those without guidance, those with guidance
    curve = [make_point(step, fid) for step, fid in zip(steps, fids, strict=False)]
    scales = {steps[-1]: guided or {}, **(guided_at or {})}
    curve += [make_point(step, fid, scale) for step, fids in scales.items() for scale, fid in fids.items()]
    curve = [replace(point, stage_index=last, protocol=protocol) for point in curve]
    if teacher:
        curve.insert(0, replace(make_point(teacher, 1.0), stage="teacher"))

    stages = [make_stage(0, teacher)] if teacher else []
    stages += [make_stage(last, steps[-1])] if status == "finished" else []
    return RunRecord(
        run_id=spec["run_id"],
        path=str(root / spec["run_id"]),
        status=status,
        dataset=spec["dataset"],
        backbone=f"{spec['backbone']['name']}-{spec['backbone']['size']}",
        objective=spec["objective"],
        recipe=spec["recipe"]["name"],
        options=spec["recipe"]["options"],
        needs=spec["recipe"]["needs"],
        seed=spec["seed"],
        steps=spec["train"]["steps"],
        batch=spec["train"]["batch"],
        precision=spec["train"]["precision"],
        setting_hash=spec["setting_hash"],
        train_hash=spec["train_hash"],
        stages=stages,
        curve=curve,
        protocols={protocol: PROTOCOL_FIELDS},
        spec=spec,
    )


def write_run(
    root: Path, recipe: str, seed: int, fids: Sequence[float], *, status: State = "finished", **options: Any
) -> RunRecord:
    """Write the run folder of `make_record` with the same arguments, and return the record read from it."""
    record = make_record(recipe, seed, fids, root=root, status=status, **options)
    folder = RunFolder(Path(record.path))
    folder.create(record.spec, {"device": "cpu"})
    folder.append_points(record.curve)
    for digest, fields in record.protocols.items():
        folder.add_protocol(digest, fields)
    for stage in record.stages:
        folder.add_stage(stage)
    folder.write_status(status)
    return folder.record()


def make_entry(recipe: str, seed: int = 0, **changes: Any) -> JournalEntry:
    """Return the journal entry of a waiting run of 800 steps; `changes` replaces fields."""
    entry = JournalEntry(
        run_id=f"digits-sit-{recipe}-s{seed}-800",
        dataset="digits",
        backbone="sit-ti/2",
        objective="linear",
        recipe=recipe,
        options={},
        seed=seed,
        steps=800,
        setting_hash=SETTING,
        row_hash=f"row-{recipe}",
    )
    return replace(entry, **changes)


def make_seeds(recipe: str, last_fids: Sequence[float], **options: Any) -> list[RunRecord]:
    """Return one record per seed, with FID 16 at 200 steps, 4 at 400 steps and `last_fids` at 800 steps."""
    return [make_record(recipe, seed, [16.0, 4.0, fid], **options) for seed, fid in enumerate(last_fids)]


def make_digits_records() -> list[RunRecord]:
    """Return three recipes with three seeds and realistic FIDs; the one-stage recipes have 1600 steps."""
    records = []
    for seed, f in enumerate((1.0, 1.06, 0.97)):
        plain = [10.27 * f, 2.68 * f, 0.9 * f, 0.429 * f]
        aligned = [10.39 * f, 2.80 * f * f, 0.961 * f, 0.45 * f]
        taught = [7.74 * f, 1.79 * f, 0.75 * f * (1 + 0.02 * seed)]
        records += [
            make_record(
                "vanilla",
                seed,
                plain,
                steps=LONG_STEPS,
                guided={1.5: 0.21 * f, 2.0: 0.4 * f},
                guided_at={800: {1.5: 0.46 * f, 2.0: 0.6 * f}},
            ),
            make_record(
                "vae-align",
                seed,
                aligned,
                steps=LONG_STEPS,
                guided={1.5: 0.23 * f, 2.0: 0.39 * f},
                guided_at={800: {1.5: 0.5 * f, 2.0: 0.7 * f}},
            ),
            make_record(
                "self-transcendence", seed, taught, teacher=800, guided={1.5: 0.5 * f, 2.0: 0.48 * f}
            ),
        ]
    return records


def edit_record(path: Path, line: int = -1, *, reseal: bool = True, **changes: Any) -> None:
    """Change fields of a record of a run folder; None removes one.

    `line` is the index of the line of a jsonl file. The checksum is computed anew unless `reseal` is false.
    """
    folder = RunFolder(path.parent)
    binding = folder.binding
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    line %= len(lines)
    content = json.loads(lines[line]) | changes
    content = {key: value for key, value in content.items() if value is not None}
    if reseal:
        place = f"{path.name}:{line + 1}" if path.suffix == ".jsonl" else path.name
        fields = {key: value for key, value in content.items() if key not in ("schema", "checksum")}
        content = seal(fields, binding, place) | {key: content[key] for key in changes if key == "schema"}
    lines[line] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n")
