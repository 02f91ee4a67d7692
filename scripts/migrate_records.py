"""Convert run folders from schema 1 or 2 to schema 3: `python scripts/migrate_records.py FOLDER`.

FOLDER contains run folders, and perhaps the journal of a sweep.

Schema 3 adds checksums to all records and records the sha256 of every weight file. The weights that are there
are taken to be undamaged, except those of finished stages, whose sha256 schema 2 recorded. Nothing else
changes.

Schema 1 stored `null` for options that were
left at a default which depends on the backbone; schema 2 stores the values that were used, and computes the
hashes from them. Every run is resolved again, and the result must agree with what schema 1 recorded of its
stages; otherwise nothing is written. Metrics, costs and weights do not change. Folders are renamed after
their new train hash.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stbench.config.plan import PreparedRun, prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.config.spec import InitSpec
from stbench.core.errors import UserError
from stbench.core.files import atomic_write, hash_file
from stbench.core.registry import load_builtins, load_plugins
from stbench.models.weights import load_weights
from stbench.runs.folder import RunFolder
from stbench.runs.journal import JOURNAL_FILE, read_journal, write_journal
from stbench.runs.records import SCHEMA
from stbench.runs.sealed import Binding, seal
from stbench.runs.stage_folder import StageFolder

SIMPLE_FILES = ("env.json", "status.json", "protocols.json")
"""Files of a run folder that change in nothing but their schema."""


@dataclass(frozen=True)
class Converted:
    """A run before and after the conversion."""

    folder: Path
    spec: Mapping[str, Any]
    """spec.json of schema 1."""
    prepared: PreparedRun
    fingerprints: Mapping[str, str]
    """Old fingerprint of each finished stage -> new fingerprint."""


def main(argv: list[str]) -> int:
    """Convert every run folder and the journal in a folder; returns the exit code."""
    if len(argv) != 1 or not Path(argv[0]).is_dir():
        print("usage: python scripts/migrate_records.py FOLDER", file=sys.stderr)
        return 2
    root = Path(argv[0])
    load_builtins()
    try:
        folders = sorted(file.parent for file in root.glob("*/spec.json") if _schema(file) == 1)
        runs = [_convert(folder) for folder in folders]
        journal = _converted_journal(root, runs)
    except UserError as error:
        print(f"error: {error}; nothing was changed", file=sys.stderr)
        return 2
    # Everything has been checked: write schema 2.
    for run in runs:
        _write(run)
    _rename_artifacts(root, runs)
    if journal is not None:
        _dump(root / "sweep.json", journal)

    # From schema 2 to schema 3.
    try:
        unsealed = sorted(file.parent for file in root.glob("*/spec.json") if _schema(file) == 2)
        for folder in unsealed:
            _require_undamaged(folder)
        for folder in unsealed:
            _seal_folder(folder)
        _seal_artifacts(root)
        write_journal(root, read_journal(root)) if (root / JOURNAL_FILE).is_file() else None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(unsealed)} run folders converted in {root}")
    return 0


def _schema(file: Path) -> Any:
    return json.loads(file.read_bytes()).get("schema")


def _convert(folder: Path) -> Converted:
    """Resolve a run again and check that its stages are those that were recorded."""
    spec = json.loads((folder / "spec.json").read_bytes())
    load_plugins([Path(file) for file in spec["plugins"] if file.endswith(".py")])
    prepared = _prepare(spec, spec["recipe"])
    _require_equal_stages(folder, spec, prepared)
    records = [json.loads(line) for line in _lines(folder / "stages.jsonl")]
    fingerprints = {row["fingerprint"]: prepared.stages[row["index"]].fingerprint for row in records}
    return Converted(folder, spec, prepared, fingerprints)


def _prepare(spec: Mapping[str, Any], recipe: Mapping[str, Any], **changes: Any) -> PreparedRun:
    """Prepare a run from a spec.json of schema 1 under a recipe; `changes` are fields of RunRequest."""
    overrides = {f"backbone.{name}": value for name, value in spec["backbone"]["options"].items()}
    overrides |= {f"recipe.{k}": v for k, v in recipe["resolved"].items() if v is not None}
    overrides |= {f"train.{k}": v for k, v in spec["train"].items() if k not in ("steps", "precision")}
    if "steps" not in changes:  # evaluation points depend on the steps, and evaluation enters no hash
        overrides |= {f"eval.{k}": v for k, v in spec["eval"].items() if k != "guidance"}
    data = spec.get("data")
    if data is not None:
        overrides |= {f"data.{k}": v for k, v in data.items() if k not in ("path", "fingerprint")}
    request: dict[str, Any] = {
        "backbone": f"{spec['backbone']['name']}-{spec['backbone']['size']}",
        "recipe": recipe["name"],
        "dataset": spec["dataset"],
        "data": None if data is None else data["path"],
        "objective": spec["objective"],
        "steps": spec["train"]["steps"],
        "seed": spec["seed"],
        "precision": spec["train"]["precision"],
        "eval_guidance": spec["eval"]["guidance"],
    }
    resolved = resolve(RunRequest(**(request | changes), overrides=overrides))
    if spec.get("init") is not None:
        resolved = resolved.model_copy(update={"init": InitSpec(**spec["init"])})
    return prepare(resolved)


def _require_equal_stages(folder: Path, spec: Mapping[str, Any], prepared: PreparedRun) -> None:
    """Check names, lengths and supervision fields; a teacher was recorded as "planned" in schema 1."""
    recorded = [{**stage, "supervision": stage["recipe"]} for stage in spec["stages"]]
    for before, now in zip(recorded, prepared.description(), strict=True):
        fields = {name: json.loads(json.dumps(value)) for name, value in now["supervision"].items()}
        for name, value in before["supervision"].items():
            if value != "planned" and value != fields.get(name):
                raise UserError(
                    f"{folder}: stage '{now['name']}' was recorded with {name}={value!r}, but resolves to "
                    f"{fields.get(name)!r} now; use the version of stbench that wrote it"
                )
        if any(before[key] != now[key] for key in ("name", "steps", "images")):
            raise UserError(f"{folder}: stage '{now['name']}' has another length now; expected {before}")


def _converted_journal(root: Path, runs: list[Converted]) -> dict[str, Any] | None:
    """The journal with new run ids and hashes.

    The journal does not contain the training settings of a run without a folder, but its setting hash says
    which run folders share them.
    """
    file = root / "sweep.json"
    if not file.is_file() or _schema(file) != 1:
        return None
    content = json.loads(file.read_bytes())
    by_id = {run.spec["run_id"]: run for run in runs}
    by_setting = {run.spec["setting_hash"]: run for run in runs}
    entries = []
    for entry in content["runs"]:
        if entry["run_id"] in by_id:
            prepared = by_id[entry["run_id"]].prepared
        elif entry["setting_hash"] in by_setting:
            spec = by_setting[entry["setting_hash"]].spec
            recipe = {"name": entry["recipe"], "resolved": entry["options"]}
            prepared = _prepare(spec, recipe, seed=entry["seed"], steps=entry["steps"])
        else:
            raise UserError(f"{file}: no run folder shares the setting of {entry['run_id']}; delete the file")
        entries.append(
            entry
            | {
                "run_id": prepared.run_id,
                "options": prepared.spec.model_dump(mode="json")["recipe"]["options"],
                "setting_hash": prepared.hashes.setting,
                "row_hash": prepared.hashes.row,
            }
        )
    return {"schema": 2, "runs": entries}


def _write(run: Converted) -> None:
    """Write the files of a run with schema 2 and rename its folder."""
    folder, prepared = run.folder, run.prepared
    for name in SIMPLE_FILES:
        if (folder / name).is_file():
            _dump(folder / name, json.loads((folder / name).read_bytes()) | {"schema": 2})
    for name in ("curve.jsonl", "stages.jsonl"):
        rows = [json.loads(line) | {"schema": 2} for line in _lines(folder / name)]
        for row in rows:
            if "fingerprint" in row:
                row["fingerprint"] = run.fingerprints[row["fingerprint"]]
        if rows:
            atomic_write(folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for state in folder.glob("checkpoints/*/state.json"):
        _dump(state, json.loads(state.read_bytes()) | {"schema": 2})
    content = {"schema": 2, **prepared.spec.model_dump(mode="json")}
    content |= {
        "run_id": prepared.run_id,
        "stage_count": len(prepared.stages),
        "stages": prepared.description(),
        "train_hash": prepared.hashes.train,
        "row_hash": prepared.hashes.row,
        "setting_hash": prepared.hashes.setting,
        "plugins": run.spec["plugins"],
    }
    _dump(folder / "spec.json", content)
    folder.rename(folder.with_name(prepared.run_id))


def _rename_artifacts(root: Path, runs: list[Converted]) -> None:
    """Give the reusable finished stages their new fingerprints."""
    for run in runs:
        for old, new in run.fingerprints.items():
            artifact = root / ".artifacts" / old[:16]
            if artifact.is_dir():
                record = json.loads((artifact / "artifact.json").read_bytes())
                _dump(artifact / "artifact.json", record | {"schema": 2, "fingerprint": new})
                artifact.rename(artifact.with_name(new[:16]))


def _require_undamaged(folder: Path) -> None:
    """Check the types of all fields, and the weights of finished stages."""
    run = RunFolder(folder)
    if not any(_schema_of_line(line) == SCHEMA for line in _lines(folder / "stages.jsonl")):
        run.record()
    for file in folder.glob("checkpoints/*/*-*.safetensors"):
        if not file.name.startswith("state-"):
            load_weights(file, run.weights_sha256(file))


def _seal_folder(folder: Path) -> None:
    """Rewrite the records of a run folder with checksums, spec.json last; can be repeated after a crash."""
    spec = json.loads((folder / "spec.json").read_bytes())
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"))
    identity = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    binding = Binding(identity)

    lines = {
        name: [_fields(line) for line in _lines(folder / name)] for name in ("curve.jsonl", "stages.jsonl")
    }
    for name, rows in lines.items():
        sealed = [seal(row, binding, f"{name}:{number}") for number, row in enumerate(rows, start=1)]
        if sealed:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in sealed)
            atomic_write(folder / name, text)
    counts = {name.partition(".")[0]: len(rows) for name, rows in lines.items()}
    for name in SIMPLE_FILES:
        if (folder / name).is_file():
            extra = {"counts": counts} if name == "status.json" else {}
            _dump(folder / name, seal(_fields((folder / name).read_text()) | extra, binding, name))
    for place in folder.glob("checkpoints/*"):
        stage = StageFolder(place, binding)
        if stage.state_index.is_file():
            stage.write(stage.state_index, _fields(stage.state_index.read_text()))
        for kind in ("raw", "ema"):
            for step, file in stage.weight_files(kind).items():
                stage.record_weights(kind, step, hash_file(file))
    _dump(
        folder / "spec.json", seal({**_fields(json.dumps(spec)), "identity": identity}, binding, "spec.json")
    )


def _seal_artifacts(root: Path) -> None:
    """Add checksums to the records of reusable finished stages."""
    for file in root.glob(".artifacts/*/artifact.json"):
        if _schema(file) == 2:
            fields = _fields(file.read_text())
            _dump(file, seal(fields, Binding(fields["fingerprint"]), file.name))


def _fields(text: str) -> dict[str, Any]:
    """The fields of a record without its schema and checksum."""
    return {k: v for k, v in json.loads(text).items() if k not in ("schema", "checksum", "counts")}


def _schema_of_line(line: str) -> Any:
    return json.loads(line).get("schema")


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.is_file() else []


def _dump(file: Path, content: Mapping[str, Any]) -> None:
    atomic_write(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
