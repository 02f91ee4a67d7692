"""`stbench bench`: the plain loop computes the same losses, and the figures are those of the steps taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from stbench.bench.measure import Measurement, first_losses, measure, peak_memory, reset_peak_memory
from stbench.bench.plain import PlainLoop
from stbench.bench.report import label
from stbench.bench.workload import Case, Workload
from stbench.core.errors import UserError
from stbench.core.phases import PHASES
from stbench.core.registry import load_builtins
from stbench.train.cost import expected_cost
from tests.conftest import Command

load_builtins()

CPU = torch.device("cpu")
SMALL = {"backbone.depth": 3, "backbone.width": 24, "backbone.heads": 2}


def small(recipe: str, **options: object) -> Case:
    blocks = {"recipe.teacher_block": 2, "recipe.student_block": 1} if recipe == "self-transcendence" else {}
    return Case("sit", recipe, batch=8, overrides={**SMALL, **blocks, **options})


@pytest.fixture(scope="module")
def measured() -> Measurement:
    return measure(small("self-transcendence"), CPU, seconds=0.1, rounds=1, against_plain=True)


@pytest.mark.parametrize("recipe", ["vanilla", "vae-align", "self-transcendence", "sra", "repa"])
def test_engine_and_plain_loop_compute_the_same_losses(recipe: str) -> None:
    engine = first_losses(Workload(small(recipe), CPU).step)
    plain = first_losses(PlainLoop(Workload(small(recipe), CPU)).step)
    assert engine.keys() == plain.keys() and len(engine) == (1 if recipe == "vanilla" else 2)
    assert plain == pytest.approx(engine, rel=1e-5, abs=1e-7)


def test_the_losses_depend_on_the_weights_that_were_updated() -> None:
    workload = Workload(small("vanilla"), CPU)
    first, second = (float(workload.step()["denoise"]) for _ in range(2))
    again = Workload(small("vanilla", **{"train.lr": 0.0001}), CPU)
    assert float(again.step()["denoise"]) == first
    assert float(again.step()["denoise"]) != second


@pytest.mark.parametrize(
    ("recipe", "options"),
    [("layersync", {}), ("vae-align", {"recipe.mask": "released"}), ("irepa", {}), ("sara", {})],
)
def test_a_recipe_without_a_plain_loop_is_refused(recipe: str, options: dict[str, object]) -> None:
    with pytest.raises(UserError, match="drop --against-plain"):
        PlainLoop(Workload(small(recipe, **options), CPU))


def test_shares_of_the_phases_add_up(measured: Measurement) -> None:
    assert list(measured.phases) == [*PHASES, "other"]
    assert sum(measured.phases.values()) == pytest.approx(1.0, abs=0.05)
    assert min(measured.phases[name] for name in ("student", "teachers", "heads", "backward")) > 0.0


def test_flops_are_those_of_the_cost_model(measured: Measurement) -> None:
    workload = Workload(small("vanilla"), CPU)
    with workload.counting() as counted:
        workload.step()
    expected = expected_cost(workload.prepared, workload.stage).total / workload.stage.steps
    assert sum(counted.values()) == expected
    assert measured.flops_per_image > expected / workload.batch


def test_ratio_and_peak_share_follow_from_the_times(measured: Measurement) -> None:
    assert measured.plain_step_seconds is not None
    assert measured.ratio == measured.plain_step_seconds / measured.step_seconds
    assert measured.images_per_second == 8 / measured.step_seconds
    assert 0.0 < measured.peak_share < 1.0
    assert measured.peak_memory > 2**20


def test_peak_memory_does_not_include_what_was_freed_before() -> None:
    if not reset_peak_memory(CPU):
        pytest.skip("the system cannot reset the peak memory of a process")
    large = torch.ones(2**25)
    with_large = peak_memory(CPU, was_reset=True)
    del large
    assert reset_peak_memory(CPU)
    assert peak_memory(CPU, was_reset=True) < with_large - 2**26


def test_the_command_prints_tables_and_writes_json(stbench: Command, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    settings = [f"--set={name}={value}" for name, value in SMALL.items()]
    sizes = ["--batch", "4", "--batch", "8"]
    code, out, err = stbench(
        "bench", "--recipe", "vanilla", *sizes, "--seconds", "0.1", *settings, "--output", file
    )
    assert code == 0, err
    content = json.loads(file.read_text())
    assert [row["batch"] for row in content["results"]] == [4, 8]
    assert content["environment"]["device"] == "cpu"
    assert "images/s" in out and "backward" in out


def test_a_case_in_words() -> None:
    case = Case("sit-b/2", "sra", precision="bf16", compile=True)
    m = Measurement(case, 1, 256, 0.5, 3, {}, 1, True, 1.0, 1.0)
    assert label(m) == "sit-b/2 sra, batch 256, bf16, compiled"
