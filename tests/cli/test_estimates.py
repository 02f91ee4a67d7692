"""`stbench run --dry-run`: the memory of each stage, and the time at the speed that was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stbench.bench import throughput
from tests.conftest import Command

SETTINGS = ["--set", "backbone.depth=3", "--set", "backbone.width=24", "--set", "backbone.heads=2"]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return throughput.store()


def plan(stbench: Command, *options: str) -> str:
    code, out, err = stbench("run", "--backbone", "sit", "--dry-run", "--device", "cpu", *SETTINGS, *options)
    assert code == 0, err
    return out


def measure(stbench: Command, *options: str) -> None:
    code, _, err = stbench("bench", "--device", "cpu", "--seconds", "0.1", *SETTINGS, *options)
    assert code == 0, err


def test_the_plan_shows_the_memory_of_each_stage(stbench: Command) -> None:
    settings = ("--set", "recipe.student_block=1", "--set", "recipe.teacher_block=2")
    out = plan(stbench, "--recipe", "self-transcendence", *settings)
    assert "memory per device, MiB, with 64 images at a time" in out
    for part in ("parameters", "gradients", "optimizer", "EMA", "activations", "total"):
        numbers = re.search(rf"│ {part} +│ +([0-9.]+) │ +([0-9.]+) │", out)
        assert numbers is not None and float(numbers[1]) > 0.0 and float(numbers[2]) > 0.0
    assert re.search(r"│ teachers +│ +0.00 │ +[0-9.]+ │", out)


def test_devices_and_shards_take_less_memory_each(stbench: Command) -> None:
    totals = []
    for options in ([], ["--devices", "4"], ["--devices", "4", "--shard"]):
        out = plan(stbench, "--recipe", "vanilla", *options)
        totals.append(float(re.findall(r"│ total +│ +([0-9.]+) │", out)[0]))
        assert f"with {16 if options else 64} images at a time" in out
        assert ("gathered" in out) == ("--shard" in options)
    assert totals[0] > totals[1]


def test_a_measured_speed_gives_the_time(stbench: Command, store: Path) -> None:
    command = plan(stbench, "--recipe", "vanilla")
    assert "expected time: not known; measure the speed with `stbench bench --backbone sit-ti/2" in command
    measure(stbench, "--recipe", "vanilla", "--batch", "8", "--batch", "64")
    assert store.is_file()
    out = plan(stbench, "--recipe", "vanilla")
    assert re.search(r"expected time: \d+ s without evaluation, at the speed of sit vanilla, batch 64", out)
    # A network, precision or device that was not measured has no time.
    assert "not known" in plan(stbench, "--recipe", "vanilla", "--set", "backbone.qk_norm=false")
    assert "not known" in plan(stbench, "--recipe", "vanilla", "--precision", "bf16")


def test_the_time_is_that_of_the_flops_at_the_measured_rate(stbench: Command, store: Path) -> None:
    measure(stbench, "--recipe", "vanilla", "--batch", "64")
    content = json.loads(store.read_text())
    content["rates"][0]["flops_per_second"] = 1e6
    store.write_text(json.dumps(content))
    plans = [plan(stbench, "--recipe", "vanilla", "--steps", steps) for steps in ("1000", "2000")]
    hours = [float(re.findall(r"expected time: ([0-9.]+) h", found)[0]) for found in plans]
    assert hours[1] == pytest.approx(2 * hours[0], rel=0.05)


def test_measuring_again_replaces_a_rate_and_damage_is_ignored(stbench: Command, store: Path) -> None:
    for _ in range(2):
        measure(stbench, "--recipe", "vanilla", "--batch", "8")
    assert len(throughput.read_rates()) == 1
    store.write_text("{")
    assert throughput.read_rates() == []
    assert "not known" in plan(stbench, "--recipe", "vanilla")
