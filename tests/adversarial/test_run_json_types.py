"""Wrong JSON types in the records of a run: every value of every file is replaced, and nothing crashes.

The checksums are computed anew, so that the types themselves are checked. Every command either works or
raises UserError with one line.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stbench.compare import terminal
from stbench.compare.build import build_leaderboard
from stbench.config.plan import PreparedRun, prepare
from stbench.core.errors import UserError
from stbench.evaluate.past_run import open_run
from stbench.runs.folder import RunFolder
from stbench.runs.journal import JOURNAL_FILE, read_journal, reconcile, write_journal
from stbench.runs.records import StageRecord
from stbench.runs.sealed import Binding, seal
from stbench.runs.stage_folder import StageFolder
from stbench.train import engine
from stbench.train.state import (
    TrainingState,
    load_state,
    read_artifact,
    save_state,
    state_tensors,
    write_artifact,
)
from tests.conftest import tiny_spec
from tests.fake_runs import make_entry, make_stage

pytestmark = pytest.mark.slow

DEEP: Any = "x"
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 10**30, "", "x", "../x", "a\nb\x1b[31m", [], [1], ["x", None], {}, {"a": 1}, DEEP,
)  # fmt: skip
"""What every value is replaced by; DEEP is nested beyond the limit."""

Place = tuple[str | int, ...]


def places(value: Any, at: Place = ()) -> Iterator[Place]:
    """Every key and index of nested JSON."""
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield (*at, key)
        yield from places(child, (*at, key))


def variants(record: dict[str, Any]) -> Iterator[tuple[Place, dict[str, Any]]]:
    """The record with each value replaced by each of VALUES, or removed."""
    fields = {key: value for key, value in record.items() if key not in ("schema", "checksum")}
    for place in places(fields):
        for value in (*VALUES, ...):
            changed = copy.deepcopy(fields)
            parent: Any = changed
            for key in place[:-1]:
                parent = parent[key]
            if value is not ...:
                parent[place[-1]] = value
            elif isinstance(parent, dict):
                del parent[place[-1]]
            yield place, changed


class Crashes:
    """Calls commands and collects everything that is not a UserError with a single line."""

    def __init__(self) -> None:
        self.tried = 0
        self.found: list[str] = []

    def check(self, what: str, *commands: Callable[[], Any]) -> None:
        for command in commands:
            self.tried += 1
            try:
                command()
            except UserError as error:
                if "\n" in str(error):
                    self.found.append(f"{what}: the message has several lines: {error}")
            except Exception as error:
                self.found.append(f"{what}: {type(error).__name__}: {error}")

    def require_none(self) -> None:
        assert self.tried > 30
        assert not self.found, f"{len(self.found)} of {self.tried}: {self.found[:40]}"


@pytest.fixture()
def crashes() -> Iterator[Crashes]:
    """The crashes of a test, of which there must be none."""
    crashes = Crashes()
    yield crashes
    crashes.require_none()


@pytest.fixture(scope="module")
def prepared() -> PreparedRun:
    return prepare(tiny_spec(steps=1))


@pytest.fixture()
def run(trained_run: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(trained_run, tmp_path / trained_run.name)
    return tmp_path / trained_run.name


def commands(run: Path, prepared: PreparedRun, name: str) -> list[Callable[[], Any]]:
    """What show, compare, run and, for spec.json, the other commands read of a run."""
    folder = RunFolder(run)

    def compare() -> None:
        record = folder.record()
        terminal.print_run(record)
        terminal.print_leaderboard(build_leaderboard([record]))

    found: list[Callable[[], Any]] = [
        compare,
        folder.environment,
        lambda: engine.is_done(folder, prepared.spec),
    ]
    if name == "env.json":
        found.append(lambda: engine.other_environment(folder, engine.RunOptions(run.parent)))
    return [*found, lambda: open_run(run)] if name == "spec.json" else found


@pytest.mark.parametrize(
    "name", ["spec.json", "status.json", "env.json", "protocols.json", "curve.jsonl", "stages.jsonl"]
)
def test_wrong_types_in_a_run_folder(
    run: Path, prepared: PreparedRun, name: str, crashes: Crashes, capsys: pytest.CaptureFixture[str]
) -> None:
    file, binding = run / name, RunFolder(run).binding
    whole = file.read_text()
    line = whole.splitlines()[-1] if name.endswith("l") else whole
    number = len(whole.splitlines())
    place = f"{name}:{number}" if name.endswith("l") else name
    for where, fields in variants(json.loads(line)):
        text = json.dumps(seal(fields, binding, place))
        file.write_text("\n".join([*whole.splitlines()[:-1], text, ""]) if name.endswith("l") else text)
        crashes.check(f"{name} {where}", *commands(run, prepared, name))
    capsys.readouterr()


def test_wrong_types_in_the_state_of_a_stage(tmp_path: Path, crashes: Crashes) -> None:
    folder = StageFolder(tmp_path / "0-vanilla", Binding("a"))
    folder.path.mkdir()
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    save_state(folder, TrainingState(3), state_tensors({"student": network}, optimizer))
    for where, fields in variants(json.loads(folder.state_index.read_text())):
        text = json.dumps(seal(fields, folder.binding, "checkpoints/0-vanilla/state.json"))
        folder.state_index.write_text(text)
        crashes.check(f"state.json {where}", lambda: load_state(folder, {"student": network}, optimizer))


def test_wrong_types_in_the_hashes_of_weights(tmp_path: Path, crashes: Crashes) -> None:
    folder = StageFolder(tmp_path / "0-vanilla", Binding("a"))
    folder.record_weights("ema", 2, "0" * 64)
    for where, fields in variants(json.loads(folder.weight_index.read_text())):
        text = json.dumps(seal(fields, folder.binding, "checkpoints/0-vanilla/weights.json"))
        folder.weight_index.write_text(text)
        crashes.check(f"weights.json {where}", folder.weight_hashes)


def test_wrong_types_in_an_artifact(tmp_path: Path, crashes: Crashes) -> None:
    stage = StageRecord(**{**asdict(make_stage(0, 4)), "sha256": {"raw": "0" * 64, "ema": "0" * 64}})
    write_artifact(tmp_path, stage)
    file = tmp_path / "artifact.json"
    for where, fields in variants(json.loads(file.read_text())):
        file.write_text(json.dumps(seal(fields, Binding(stage.fingerprint), file.name)))
        crashes.check(f"artifact.json {where}", lambda: read_artifact(tmp_path, stage.fingerprint))


def test_wrong_types_in_a_journal(tmp_path: Path, crashes: Crashes) -> None:
    write_journal(tmp_path, [make_entry("vanilla", options={"weight": 0.5})])
    file = tmp_path / JOURNAL_FILE

    def read() -> None:
        for entry in reconcile(read_journal(tmp_path), []):
            hash((entry.row_key, entry.label))

    for where, fields in variants(json.loads(file.read_text())):
        file.write_text(json.dumps(seal(fields, Binding(), JOURNAL_FILE)))
        crashes.check(f"sweep.json {where}", read)
