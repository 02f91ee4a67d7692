"""scripts/migrate_records.py: run folders of schema 1 become run folders of schema 2."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from stbench.core.errors import UserError
from stbench.runs.folder import RunFolder, find_runs, read_runs
from stbench.runs.journal import read_journal

ROOT = Path(__file__).parents[2]
OLD = ROOT / "tests" / "fixtures" / "schema-1"


def migrate(folder: Path) -> int:
    """Call the script with a folder; returns its exit code."""
    spec = importlib.util.spec_from_file_location("migrate_records", ROOT / "scripts" / "migrate_records.py")
    assert spec is not None and spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return int(script.main([str(folder)]))


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two finished runs and a waiting one, migrated."""
    folder = tmp_path_factory.mktemp("migrated") / "runs"
    shutil.copytree(OLD, folder)
    assert migrate(folder) == 0
    return folder


def test_schema_1_is_refused_with_the_command_that_converts_it() -> None:
    with pytest.raises(UserError, match=r"has schema 1.*python scripts/migrate_records\.py FOLDER"):
        RunFolder(next(OLD.glob("digits-*"))).record()


def test_options_hold_the_values_that_were_used(migrated: Path) -> None:
    sra, transcendence = sorted(read_runs(find_runs(migrated)), key=lambda run: run.recipe, reverse=True)
    assert sra.recipe == "sra" and transcendence.recipe == "self-transcendence"
    assert sra.options == {"distance": "cosine"}
    assert (
        sra.spec["recipe"]["effective"]["weight"] == 0.5 and sra.spec["recipe"]["effective"]["time"] == "flow"
    )
    assert transcendence.options == {"guidance": 5.0, "teacher": "vanilla"}
    assert transcendence.spec["recipe"]["effective"]["teacher_steps"] == 400
    assert None not in sra.spec["recipe"]["effective"].values()


def test_the_run_id_names_the_folder_and_the_results_stay(migrated: Path) -> None:
    before = {}
    for folder in OLD.glob("digits-*"):
        rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
        before[folder.name.rpartition("-")[0]] = [row["metrics"] for row in rows]
    for record in read_runs(find_runs(migrated)):
        assert Path(record.path).name == record.run_id == record.spec["run_id"]
        assert record.run_id.endswith(record.train_hash)
        assert [dict(point.metrics) for point in record.curve] == before[record.run_id.rpartition("-")[0]]


def test_seeds_of_a_row_share_its_hash_with_and_without_a_folder(migrated: Path) -> None:
    rows = {entry.seed: entry for entry in read_journal(migrated) if entry.recipe == "sra"}
    (record,) = [run for run in read_runs(find_runs(migrated)) if run.recipe == "sra"]
    assert {entry.row_key for entry in rows.values()} == {record.row_key} and set(rows) == {0, 1}


def test_a_run_that_resolves_to_other_values_is_refused_and_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(OLD, folder)
    (spec,) = folder.glob("digits-*sra*/spec.json")
    content = json.loads(spec.read_text())
    content["stages"][0]["recipe"]["weight"] = 0.75  # as if another default had been in force
    spec.write_text(json.dumps(content))
    assert migrate(folder) == 2
    assert "weight=0.75, but resolves to 0.5" in capsys.readouterr().err
    assert json.loads(spec.read_text())["schema"] == 1
