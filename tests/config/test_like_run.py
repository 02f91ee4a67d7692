"""`--config RUN_FOLDER`: the same settings with another seed, recipe or length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stbench.config.overrides import read_config
from stbench.config.plan import PreparedRun, prepare
from stbench.config.resolve import resolve_options
from stbench.core.registry import load_builtins

RUNS = Path(__file__).parents[2] / "results" / "digits" / "runs"


def prepared(folder: Path, **typed: Any) -> PreparedRun:
    load_builtins()
    values = read_config(folder, typed)
    settings = values.pop("set")
    return prepare(resolve_options(values | typed, settings))


def run_folder(name: str) -> Path:
    (folder,) = RUNS.glob(f"{name}*")
    return folder


@pytest.mark.parametrize(
    "name",
    ["digits-dit-ti-2-self-transcendence-s0-1996b393", "digits-uvit-ti-2-repa-s2", "digits-sit-ti-2-sra-s1"],
)
def test_the_same_run_has_the_same_hashes(name: str) -> None:
    spec = json.loads((run_folder(name) / "spec.json").read_text())
    hashes = prepared(run_folder(name)).hashes
    recorded = (spec["train_hash"], spec["row_hash"], spec["setting_hash"])
    assert (hashes.train, hashes.row, hashes.setting) == recorded


def test_another_recipe_and_seed_are_the_run_of_the_sweep() -> None:
    other = prepared(run_folder("digits-dit-ti-2-repa-s0"), recipe="vanilla", seed=1)
    assert other.run_id == run_folder("digits-dit-ti-2-vanilla-s1").name


def test_another_length_has_its_own_evaluation_points() -> None:
    spec = prepared(run_folder("digits-sit-ti-2-vanilla-s0"), steps=1000).spec
    assert spec.train.steps == 1000 and spec.eval.points[-1] == 1000


def test_the_precision_of_teachers_follows_another_precision_of_the_student() -> None:
    """Runs of earlier versions do not record it; their teachers computed in fp32."""
    folder = run_folder("digits-sit-ti-2-sra-s1")
    assert prepared(folder).spec.train.teacher_precision == "fp32"
    assert prepared(folder, precision="bf16").spec.train.teacher_precision == "bf16"
