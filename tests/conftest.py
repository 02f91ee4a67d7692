"""Settings that every test shares: no network, one thread, and a run small enough for a unit test."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
# Measured speeds of tests must not reach the user's own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="stbench-test-cache-")

import pytest
import torch

from stbench.cli import app as cli
from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.config.spec import RunSpec
from stbench.core.registry import load_builtins
from stbench.runs.folder import OutputFolder
from stbench.runs.records import RunRecord
from stbench.train import engine
from tests.weights import random_dino, random_inception

TINY: dict[str, Any] = {
    "train.batch": 8,
    "train.save_every": 2,
    "backbone.width": 24,
    "backbone.depth": 3,
    "backbone.heads": 2,
    "eval.samples": 40,
    "eval.steps": 2,
    "eval.guidance": [1.0],
}
BLOCKS: dict[str, Any] = {"recipe.teacher_block": 2, "recipe.student_block": 1}

Runner = Callable[..., RunRecord]
Command = Callable[..., tuple[int, str, str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests go first: no process is left with one when the others are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


_statistics: list[Path] = []
"""Folder with the reference statistics of the test session, which take seconds to compute."""


@pytest.fixture(scope="session", autouse=True)
def _session(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)
    load_builtins()
    _statistics.append(tmp_path_factory.mktemp("statistics"))


def share_statistics(output: Path) -> Path:
    """Let the runs in an output folder use the reference statistics of the test session."""
    folder = OutputFolder(output).reference_statistics
    if not folder.exists():
        output.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(_statistics[-1], target_is_directory=True)
    return output


def tiny_spec(recipe: str = "vanilla", *, backbone: str = "sit", steps: int = 4, **more: Any) -> RunSpec:
    """A spec of a few steps; keywords are overrides with `__` for the dot, or fields of RunRequest."""
    fields = {k: more.pop(k) for k in ("seed", "objective", "precision") if k in more}
    blocks = BLOCKS if recipe == "self-transcendence" else {}
    overrides = TINY | blocks | {k.replace("__", "."): v for k, v in more.items()}
    return resolve(RunRequest(backbone, recipe, steps=steps, overrides=overrides, **fields))


def train_tiny(
    folder: Path, recipe: str = "vanilla", output: str = "runs", hooks: Any = (), **more: Any
) -> RunRecord:
    """Train a tiny spec under `folder`/`output` and return its record."""
    options = {k: more.pop(k) for k in ("keep", "reuse") if k in more}
    prepared = prepare(tiny_spec(recipe, **more))
    return engine.run(prepared, engine.RunOptions(share_statistics(folder / output), **options), hooks)[0]


@pytest.fixture()
def tiny(tmp_path: Path) -> Runner:
    """Train a tiny spec under this test's folder and return its record."""
    return partial(train_tiny, tmp_path)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one step, trained once for all tests: they must not write into it."""
    return Path(train_tiny(tmp_path_factory.mktemp("trained"), steps=1).path)


@pytest.fixture()
def stbench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Call the command line in this process; returns (exit code, standard output, standard error)."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file of random Inception weights, and its sha256."""
    return random_inception(tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="session")
def dino_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random DINOv2 weights."""
    return random_dino(tmp_path_factory.mktemp("weights") / "dino.safetensors")
