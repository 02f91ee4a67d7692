"""Resuming: settings after an early failure, other threads, finished runs without a lock, and schema 2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stbench.config.plan import PlannedStage, prepare
from stbench.core.errors import UserError
from stbench.runs.folder import RunFolder
from stbench.train import engine
from stbench.train.hooks import Hook
from tests.conftest import Command, Runner, tiny_spec
from tests.runs.test_migration import migrate
from tests.train.test_engine import StopAt, same, weights


class Fail(Hook):
    """Raises before the first step."""

    def on_stage(self, stage: PlannedStage, step: int) -> None:
        raise RuntimeError("out of memory")


class Notices(Hook):
    """Collects notices."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_notice(self, text: str) -> None:
        self.found.append(text)


@pytest.fixture()
def _two_threads() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


def test_a_run_that_failed_before_its_first_save_restricts_nothing(tiny: Runner) -> None:
    with pytest.raises(RuntimeError):
        tiny(steps=8, hooks=[Fail()])
    record = tiny(steps=4, eval__samples=50)
    assert record.status == "finished" and record.steps == 4


@pytest.mark.usefixtures("_two_threads")
def test_another_number_of_threads_is_noticed(tiny: Runner) -> None:
    with pytest.raises(engine.Interrupted):
        tiny(hooks=[StopAt(2)])
    notices = Notices()
    torch.set_num_threads(2)
    tiny(hooks=[notices])
    (text,) = notices.found
    assert "1 threads (now " in text and "2 threads)" in text and "\n" not in text


def test_the_same_environment_gives_no_notice(tiny: Runner) -> None:
    notices = Notices()
    with pytest.raises(engine.Interrupted):
        tiny(hooks=[notices, StopAt(2)])
    tiny(hooks=[notices])
    assert not notices.found


def test_a_finished_run_needs_no_lock(tiny: Runner, tmp_path: Path) -> None:
    """The lock cannot be taken on a read-only disk."""
    record = tiny()
    lock = Path(record.path) / ".lock"
    lock.unlink()
    options = engine.RunOptions(tmp_path / "runs")
    assert engine.run(prepare(tiny_spec()), options) == (record, False)
    assert not lock.exists()


def test_a_finished_run_with_damaged_weights_is_reported(tiny: Runner) -> None:
    record = tiny()
    (file,) = Path(record.path).glob("checkpoints/0-*/raw-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"{file} is damaged: expected sha256 \w+, found"):
        tiny()


# --- Schema 2 ---


def downgrade(run: Path) -> None:
    """Rewrite a run folder as schema 2 did: without checksums, identity and hashes of earlier weights."""
    (run / "checkpoints" / "0-vanilla" / "weights.json").unlink()
    for file in (*run.glob("*.json*"), *run.glob("checkpoints/*/state.json")):
        whole = [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines()
        rows = [{**json.loads(text), "schema": 2} for text in whole]
        for row in rows:
            for name in ("checksum", "identity", "counts"):
                row.pop(name, None)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_of_schema_2_continues_in_schema_2(tiny: Runner, stbench: Command) -> None:
    run = Path(tiny(steps=2).path)
    downgrade(run)
    before = RunFolder(run).record()
    assert before.schema == 2
    record = tiny(steps=4)
    assert record.schema == 2 and record.curve[:1] == before.curve
    assert same(weights(record), weights(tiny(steps=4, output="fresh")))
    code, out, _ = stbench("show", run)
    assert code == 0 and "schema 2: these records have no checksums" in out


def test_migration_adds_checksums_and_changes_nothing_else(tiny: Runner, stbench: Command) -> None:
    run = Path(tiny(steps=2).path)
    downgrade(run)
    before = RunFolder(run).record()
    assert migrate(run.parent) == 0
    after = RunFolder(run).record()
    assert after.schema == 3
    assert {**vars(after), "schema": 2} == vars(before)
    assert tiny(steps=4).schema == 3
    code, out, _ = stbench("show", run)
    assert code == 0 and "schema 2" not in out


def test_migration_refuses_damaged_weights(tiny: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(tiny(steps=2).path)
    downgrade(run)
    (file,) = run.glob("checkpoints/0-*/ema-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert migrate(run.parent) == 2
    assert "is damaged" in capsys.readouterr().err and RunFolder(run).binding.schema == 2
