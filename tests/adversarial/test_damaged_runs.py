"""Damaged run folders: every seeded damage is reported in one line, or changes nothing.

A damage is silent if the commands succeed and their result differs from that of the undamaged folder. Bits
are flipped, files are cut off, zeroed, deleted, swapped with those of another step, stage or kind, and
replaced by those of another seed and of the same run trained elsewhere.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from stbench.config.plan import prepare
from stbench.core.errors import UserError
from stbench.evaluate.past_run import open_run
from stbench.runs.folder import RunFolder
from stbench.train import engine
from tests.conftest import share_statistics, tiny_spec, train_tiny
from tests.train.test_engine import StopAt

pytestmark = pytest.mark.slow

RECIPE = "self-transcendence"
OPTIONS: dict[str, Any] = {"eval__points": [2, 4], "reuse": False}

FINISHED_FILES = {
    "spec.json": "spec.json",
    "env.json": "env.json",
    "status.json": "status.json",
    "stages.jsonl": "stages.jsonl",
    "curve.jsonl": "curve.jsonl",
    "protocols.json": "protocols.json",
    "teacher weights.json": "checkpoints/0-*/weights.json",
    "weights.json": "checkpoints/1-*/weights.json",
    "teacher raw": "checkpoints/0-*/raw-00000004.safetensors",
    "teacher ema": "checkpoints/0-*/ema-00000004.safetensors",
    "raw": "checkpoints/1-*/raw-00000004.safetensors",
    "earlier ema": "checkpoints/1-*/ema-00000002.safetensors",
    "ema": "checkpoints/1-*/ema-00000004.safetensors",
}
"""Files of a finished run by a short name; pictures are shown to people only."""
STATE_FILES = {
    "spec.json": "spec.json",
    "env.json": "env.json",
    "status.json": "status.json",
    "stages.jsonl": "stages.jsonl",
    "curve.jsonl": "curve.jsonl",
    "protocols.json": "protocols.json",
    "state.json": "checkpoints/1-*/state.json",
    "state": "checkpoints/1-*/state-*.safetensors",
    "teacher ema": "checkpoints/0-*/ema-00000004.safetensors",
    "teacher raw": "checkpoints/0-*/raw-00000004.safetensors",
}
"""Files of an interrupted run that a resumed run reads."""

Runs = dict[str, Path]
Damage = Callable[[Path, Path, random.Random, Runs], None]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Output folders with one run each: finished, the same trained elsewhere, another seed, interrupted."""
    root = tmp_path_factory.mktemp("damaged")
    for name, more in (("finished", {}), ("elsewhere", {}), ("seed", {"seed": 1})):
        train_tiny(root, RECIPE, output=name, **OPTIONS, **more)
    for name, more in (("interrupted", {}), ("interrupted seed", {"seed": 1})):
        for _ in range(2):  # once in each stage
            with pytest.raises(engine.Interrupted):
                train_tiny(root, RECIPE, output=name, hooks=[StopAt(3)], **OPTIONS, **more)
    return {path.name: _folder(path) for path in root.iterdir()}


def _folder(output: Path) -> Path:
    (spec,) = output.glob("*/spec.json")
    return spec.parent


# --- Damages: `file` is changed in the copied folder `run` ---


def flip(file: Path, run: Path, draw: random.Random, runs: Runs) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, run: Path, draw: random.Random, runs: Runs) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.randrange(len(data))])


def drop_lines(file: Path, run: Path, draw: random.Random, runs: Runs) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    start = draw.randrange(len(lines))
    stop = draw.randrange(start, len(lines)) + 1
    file.write_bytes(b"".join(lines[:start] + lines[stop:]))


def zero(file: Path, run: Path, draw: random.Random, runs: Runs) -> None:
    data = bytearray(file.read_bytes())
    start, size = draw.randrange(len(data)), draw.choice((16, 512, 4096))
    data[start : start + size] = bytes(len(data[start : start + size]))
    file.write_bytes(data)


def delete(file: Path, run: Path, draw: random.Random, runs: Runs) -> None:
    file.unlink()


def swap(file: Path, run: Path, draw: random.Random, runs: Runs) -> None:
    others = [path for path in sorted(run.rglob(f"*{file.suffix}")) if path != file]
    other = draw.choice(others)
    data = other.read_bytes()
    other.write_bytes(file.read_bytes())
    file.write_bytes(data)


def of_another_seed(file: Path, run: Path, draw: random.Random, runs: Runs) -> None:
    other = runs["seed" if RunFolder(run).status()["state"] == "finished" else "interrupted seed"]
    shutil.copyfile(_same(file, run, other), file)


def trained_elsewhere(file: Path, run: Path, draw: random.Random, runs: Runs) -> None:
    shutil.copyfile(_same(file, run, runs["elsewhere"]), file)


def _same(file: Path, run: Path, other: Path) -> Path:
    return other / file.relative_to(run)


ANY: dict[Damage, int] = {flip: 8, truncate: 4, zero: 3, swap: 2, delete: 1, of_another_seed: 1}
"""Damage -> seeds per file."""


def cases(files: dict[str, str], more: dict[Damage, int]) -> list[Any]:
    found = []
    for name in files:
        damages = ANY | more | ({drop_lines: 3} if name.endswith("l") else {})
        found += [
            pytest.param(name, damage, seed, id=f"{name}-{damage.__name__}-{seed}")
            for damage, seeds in damages.items()
            for seed in range(seeds)
        ]
    return found


def test_there_are_enough_cases() -> None:
    assert len(FINISHED_CASES) + len(STATE_CASES) >= 400


FINISHED_CASES = cases(FINISHED_FILES, {trained_elsewhere: 1})
STATE_CASES = cases(STATE_FILES, {})


def damaged(run: Path, target: Path, pattern: str, damage: Damage, seed: int, runs: Runs) -> Path:
    """Copy a run folder into `target` and damage a file."""
    copy = share_statistics(target) / run.name
    shutil.copytree(run, copy)
    (file,) = copy.glob(pattern)
    damage(file, copy, random.Random(f"{pattern}/{damage.__name__}/{seed}"), runs)
    return copy


def results(run: Path, *, resume: bool = False) -> dict[str, Any]:
    """Everything that show, compare, evaluate, sample, export and a resumed run read or produce."""
    if resume or RunFolder(run).status()["state"] == "finished":
        train_tiny(run.parent.parent, RECIPE, output=run.parent.name, **OPTIONS)
    record = RunFolder(run).record()
    found: dict[str, Any] = dataclasses.asdict(record) | {"path": ""}
    for row in (*found["stages"], *found["curve"]):
        row |= {name: 0.0 for name in row if "seconds" in name}
    if not resume:
        found["environment"] = RunFolder(run).environment()
    past = open_run(run)
    found["raw"] = past.load(past.final_file("raw")).state_dict()
    past.final_file("ema")
    for step, file in past.point_files().items():
        found[f"ema-{step}"] = past.load(file).state_dict()
    return found


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def require_not_silent(
    run: Path, expected: dict[str, Any], capsys: pytest.CaptureFixture[str], *, resume: bool
) -> None:
    capsys.readouterr()
    try:
        found = results(run, resume=resume)
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 1200
        assert run.name in message or str(run) in message, "the message must name the file"
    else:
        differing = [key for key in expected if not same(found.get(key), expected[key])]
        named = "is missing" in capsys.readouterr().err
        assert not differing or named, f"silent damage: {differing} differ"


@pytest.fixture(scope="session")
def finished(runs: Runs) -> dict[str, Any]:
    return results(runs["finished"])


@pytest.mark.parametrize(("name", "damage", "seed"), FINISHED_CASES)
def test_a_damaged_finished_run_is_not_used_silently(
    runs: Runs,
    finished: dict[str, Any],
    tmp_path: Path,
    name: str,
    damage: Damage,
    seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = damaged(runs["finished"], tmp_path / "runs", FINISHED_FILES[name], damage, seed, runs)
    require_not_silent(run, finished, capsys, resume=False)


@pytest.mark.parametrize(("name", "damage", "seed"), STATE_CASES)
def test_a_damaged_interrupted_run_is_not_resumed_silently(
    runs: Runs,
    finished: dict[str, Any],
    tmp_path: Path,
    name: str,
    damage: Damage,
    seed: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = damaged(runs["interrupted"], tmp_path / "runs", STATE_FILES[name], damage, seed, runs)
    expected = {key: value for key, value in finished.items() if key != "environment"}
    require_not_silent(run, expected, capsys, resume=True)


def test_an_undamaged_copy_gives_the_expected_results(
    runs: Runs, finished: dict[str, Any], tmp_path: Path
) -> None:
    """The test above can fail: without damage nothing is refused and nothing differs."""
    copy = share_statistics(tmp_path / "moved") / runs["interrupted"].name
    shutil.copytree(runs["interrupted"], copy)
    found = results(copy, resume=True)
    assert all(same(found[key], value) for key, value in finished.items() if key != "environment")


def test_a_downgrade_of_one_record_is_reported(runs: Runs, tmp_path: Path) -> None:
    for name in ("spec.json", "status.json", "curve.jsonl", "stages.jsonl", "protocols.json"):
        for old, new in (('"schema": 3', '"schema": 2'), ('"checksum"', '"checksums"')):
            copy = tmp_path / f"{name}-{new[1:6]}" / "run"
            shutil.copytree(runs["finished"], copy)
            text = (copy / name).read_text()
            assert old in text
            (copy / name).write_text(text.replace(old, new, 1))
            with pytest.raises(UserError, match="damaged"):
                RunFolder(copy).record()


def test_continuing_and_moving_a_run_keeps_its_records_valid(runs: Runs, tmp_path: Path) -> None:
    copy = share_statistics(tmp_path / "moved") / runs["finished"].name
    shutil.copytree(runs["finished"], copy)
    options = {"recipe__teacher_steps": 4, **OPTIONS, "eval__points": [2, 4, 6]}
    record = train_tiny(tmp_path, RECIPE, output="moved", steps=6, **options)
    assert Path(record.path) == copy and [point.step for point in record.curve] == [4, 2, 4, 6]
    assert prepare(tiny_spec(RECIPE, steps=6, recipe__teacher_steps=4)).run_id == copy.name
