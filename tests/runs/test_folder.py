"""Run folders: what is written is read back, and what is damaged is refused in one line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from stbench.core.errors import UserError
from stbench.runs.folder import RunFolder, find_runs, read_runs
from tests import fake_runs as runs

AWKWARD = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, math.nan, math.inf, -math.inf]


def refusal(path: Path) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises(UserError) as caught:
        RunFolder(path).record()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A finished two-stage run."""
    record = runs.write_run(tmp_path, "self-transcendence", 0, [7.74, 1.79, 0.75], teacher=800)
    return RunFolder(Path(record.path))


def test_points_round_trip_bit_for_bit(tmp_path: Path) -> None:
    metrics = {f"m{i}": value for i, value in enumerate(AWKWARD)}
    written = replace(
        runs.make_point(10, 1.0), metrics=metrics, val_loss=AWKWARD, seconds=0.1, interval=(0.1, 0.7)
    )
    folder = RunFolder(tmp_path)
    folder.append_points([written])
    (read,) = folder.points()
    assert [x.hex() for x in read.metrics.values()] == [x.hex() for x in AWKWARD]
    assert [x.hex() for x in read.val_loss] == [x.hex() for x in AWKWARD]
    assert replace(read, metrics={}, val_loss=[]) == replace(written, metrics={}, val_loss=[])


def test_stages_round_trip(tmp_path: Path) -> None:
    written = [replace(runs.make_stage(0, 5), reused=True, seconds=1 / 3), runs.make_stage(1, 7)]
    folder = RunFolder(tmp_path)
    for stage in reversed(written):
        folder.add_stage(stage)
    assert folder.stages() == written


def test_files_are_strict_json_with_a_schema(folder: RunFolder) -> None:
    folder.append_points([runs.make_point(900, math.nan)])
    texts = [(folder.path / f"{name}.json").read_text() for name in ("spec", "env", "status", "protocols")]
    for name in ("curve", "stages"):
        texts += (folder.path / f"{name}.jsonl").read_text().splitlines()
    for text in texts:
        assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["schema"] == 3


def test_record_reads_every_field(folder: RunFolder) -> None:
    record = folder.record()
    assert (record.backbone, record.recipe, record.steps, record.batch) == (
        "sit-ti/2",
        "self-transcendence",
        800,
        64,
    )
    assert (record.status, record.seed, record.final_stage) == ("finished", 0, 1)
    assert [point.metrics["fid"] for point in record.curve] == [1.0, 7.74, 1.79, 0.75]
    assert record.protocols == {"aaaa1111": {"samples": 1000, "sampler": "euler", "steps": 20}}


def test_a_point_that_is_there_stays(folder: RunFolder) -> None:
    before = folder.points()
    again = replace(before[-1], metrics={"fid": 99.0})
    folder.append_points([again, replace(again, guidance=1.5)])
    assert folder.points() == [*before, replace(again, guidance=1.5)]


def test_a_stage_of_the_same_index_is_replaced(folder: RunFolder) -> None:
    folder.add_stage(runs.make_stage(0, 10))
    assert [stage.steps for stage in folder.stages()] == [10, 800]


def test_a_protocol_keeps_its_fields(folder: RunFolder) -> None:
    folder.add_protocol("bbbb2222", {"samples": 50})
    assert set(folder.record().protocols) == {"aaaa1111", "bbbb2222"}


def test_create_again_keeps_what_was_measured(folder: RunFolder) -> None:
    before = folder.record()
    folder.create(folder.spec(), {"device": "cuda"})
    assert folder.record() == before
    assert json.loads((folder.path / "env.json").read_text())["device"] == "cuda"


@pytest.mark.parametrize(
    "name", ["spec.json", "status.json", "protocols.json", "curve.jsonl", "stages.jsonl"]
)
def test_a_file_cut_anywhere_in_its_last_line_is_refused(folder: RunFolder, name: str) -> None:
    file = folder.path / name
    whole = file.read_bytes()
    line = len(whole.rstrip(b"\n").split(b"\n")[-1]) + 1
    first = len(whole) - line + 1 if name.endswith("l") else 0
    last = len(whole) - (1 if name.endswith("l") else 2)
    for length in {0, first, (first + last) // 2, last}:
        file.write_bytes(whole[:length])
        message = refusal(folder.path)
        assert str(file) in message and "stbench run" in message


def test_the_line_number_is_named(folder: RunFolder) -> None:
    file = folder.path / "curve.jsonl"
    lines = file.read_text().splitlines()
    file.write_text("\n".join([lines[0], lines[1][:-9], *lines[2:]]) + "\n")
    assert "curve.jsonl line 2" in refusal(folder.path)


def edited(folder: RunFolder, name: str, **changes: object) -> None:
    """Change fields of the last record of a file, with a valid checksum; None removes one."""
    runs.edit_record(folder.path / name, **changes)


@pytest.mark.parametrize(
    "name", ["spec.json", "status.json", "protocols.json", "curve.jsonl", "stages.jsonl"]
)
def test_another_schema_is_refused(folder: RunFolder, name: str) -> None:
    edited(folder, name, schema=4)
    assert "schema '4'" in refusal(folder.path)


@pytest.mark.parametrize(
    ("name", "field"),
    [("spec.json", "setting_hash"), ("spec.json", "train"), ("status.json", "state"),
     ("curve.jsonl", "metrics"), ("stages.jsonl", "flops_heads"), ("protocols.json", "protocols")],
)  # fmt: skip
def test_a_missing_field_is_named(folder: RunFolder, name: str, field: str) -> None:
    edited(folder, name, **{field: None})
    message = refusal(folder.path)
    assert name in message and f"'{field}'" in message


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [("spec.json", "seed", "0"), ("curve.jsonl", "step", 1.5), ("curve.jsonl", "metrics", {"fid": [1]}),
     ("curve.jsonl", "interval", [0.1]), ("stages.jsonl", "reused", 1)],
)  # fmt: skip
def test_a_value_of_another_type_is_named(folder: RunFolder, name: str, field: str, value: object) -> None:
    edited(folder, name, **{field: value})
    message = refusal(folder.path)
    assert name in message and field in message


def test_an_unknown_field_of_a_point_is_refused(folder: RunFolder) -> None:
    edited(folder, "curve.jsonl", surprise=1)
    assert "'surprise'" in refusal(folder.path)


def test_a_run_without_points_is_whole(tmp_path: Path) -> None:
    record = runs.write_run(tmp_path, "vanilla", 0, [], status="running")
    assert (record.curve, record.stages, record.status) == ([], [], "running")


def test_find_runs_walks_and_counts_each_once(tmp_path: Path) -> None:
    one = Path(runs.write_run(tmp_path / "a" / "b", "vanilla", 0, [1.0]).path)
    two = Path(runs.write_run(tmp_path, "vanilla", 1, [1.0]).path)
    (tmp_path / "empty").mkdir()
    assert find_runs([tmp_path, one, two]) == sorted([one, two])
    assert [record.seed for record in read_runs(find_runs(tmp_path))] == [0, 1] if one < two else [1, 0]


@pytest.mark.parametrize("name", ["empty", "missing"])
def test_a_path_without_runs_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"{name}; create one"):
        find_runs([tmp_path / name])


HOLD = "import sys, time; from pathlib import Path; from stbench.runs.folder import RunFolder\n" \
    "with RunFolder(Path(sys.argv[1])).lock():\n    print('held', flush=True); time.sleep(60)"  # fmt: skip


def test_a_folder_in_use_is_refused_until_its_owner_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {owner.pid}; wait for it"):
            RunFolder(tmp_path).lock().__enter__()
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    with RunFolder(tmp_path).lock():
        assert (tmp_path / ".lock").read_text() == str(os.getpid())


def test_the_lock_is_free_after_the_block(tmp_path: Path) -> None:
    for _ in range(2):
        with RunFolder(tmp_path).lock():
            pass


def test_a_lock_clears_what_a_dead_writer_left(tmp_path: Path) -> None:
    leftover = tmp_path / "samples" / ".grid.png.123.tmp"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    with RunFolder(tmp_path).lock():
        assert not leftover.exists()
