"""Tracking: what reaches TensorBoard, W&B and MLflow, resuming there, and errors."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from stbench.config.plan import prepare
from stbench.core.errors import UserError
from stbench.runs.folder import OutputFolder, RunFolder
from stbench.runs.records import RunRecord
from stbench.train import engine, trackers
from stbench.train.tracking import flat, open_trackers
from tests.conftest import Command, share_statistics, tiny_spec

STEPS = 4


def run_tracked(
    folder: Path, *names: str, during: Callable[[Any], None] = lambda trackers: None, **more: Any
) -> RunRecord:
    """Train a tiny run that these services track; `during` gets the trackers before training."""
    prepared = prepare(tiny_spec(**{"steps": STEPS, **more}))
    output = share_statistics(folder / "runs")
    hooks = open_trackers(list(names), prepared, OutputFolder(output).run(prepared.run_id))
    during(hooks)
    try:
        return engine.run(prepared, engine.RunOptions(output), hooks)[0]
    finally:
        for hook in hooks:
            hook.close()


class FakeWandb(types.ModuleType):
    """Stands in for wandb: remembers what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = importlib.util.spec_from_loader("wandb", None)
        self.logged: list[dict[str, Any]] = []
        self.started: list[dict[str, Any]] = []
        self.axes: list[dict[str, Any]] = []
        self.key, self.finished = True, 0
        self.run: Any = None

    def login(self, *, prompt: bool, verify: bool) -> bool:
        assert not prompt and not verify
        return self.key

    def init(self, **arguments: Any) -> None:
        self.started.append(arguments)
        self.run = types.SimpleNamespace(offline=False, url="https://wandb.example/run", dir="")

    def define_metric(self, **axis: Any) -> None:
        self.axes.append(axis)

    def log(self, values: dict[str, Any], commit: bool) -> None:
        self.logged.append(values)

    def Image(self, pixels: Any) -> Any:
        return pixels

    def join(self) -> None:
        self.finished += 1


@pytest.fixture()
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    return fake


# --- TensorBoard ---


def test_tensorboard_gets_curves_samples_settings_and_cost(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = run_tracked(tmp_path, "tensorboard")
    (point,) = record.curve
    events = EventAccumulator(str(Path(record.path) / "tensorboard" / "vis_data")).Reload()
    assert [event.step for event in events.Scalars("vanilla/loss/denoise")] == [STEPS]
    (fid,) = events.Scalars("vanilla/g1/fid")
    assert fid.step == point.step and fid.value == pytest.approx(point.metrics["fid"])
    assert events.Scalars("vanilla/cost/TFLOPs")[-1].value == pytest.approx(record.stages[0].flops / 1e12)
    assert events.Scalars("vanilla/cost/images")[0].value == STEPS * 8
    assert events.Images("vanilla/samples/g1")[0].step == STEPS
    settings = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    train.batch = 8" in settings and "    recipe.name = vanilla" in settings


def test_the_command_line_accepts_the_old_and_the_new_option(stbench: Command, tmp_path: Path) -> None:
    share_statistics(tmp_path)
    options = ("--set", "train.batch=8", "--set", "eval.samples=40", "--set", "eval.steps=2")
    run = ("run", "--backbone", "sit", "--recipe", "vanilla", *options, "--output", tmp_path)
    code, _, err = stbench(*run, "--steps", 1, "--tensorboard", "--track", "tensorboard")
    assert code == 0 and err.count("tracking: tensorboard --logdir") == 1
    assert len(list(tmp_path.glob("*/tensorboard/vis_data/events*"))) == 1


def test_tracking_changes_no_weight_and_a_finished_run_is_not_tracked(
    tmp_path: Path, wandb: FakeWandb
) -> None:
    plain = run_tracked(tmp_path / "plain")
    tracked = run_tracked(tmp_path / "tracked", "tensorboard", "wandb")
    file = f"checkpoints/0-vanilla/raw-{STEPS:08d}.safetensors"
    before, after = load_file(Path(plain.path) / file), load_file(Path(tracked.path) / file)
    assert all((before[name] == after[name]).all() for name in before)
    run_tracked(tmp_path / "tracked", "wandb")
    assert len(wandb.started) == wandb.finished == 1


# --- W&B ---


def test_wandb_gets_values_with_their_step(tmp_path: Path, wandb: FakeWandb) -> None:
    record = run_tracked(tmp_path, "wandb")
    (arguments,) = wandb.started
    assert arguments["project"] == "stbench" and arguments["name"] == Path(record.path).name
    assert arguments["config"]["train.batch"] == 8 and arguments["config"]["train_hash"] == record.train_hash
    assert wandb.axes == [{"name": "vanilla/*", "step_metric": "vanilla/step"}]
    losses, metrics, picture, cost = wandb.logged
    assert losses["vanilla/step"] == metrics["vanilla/step"] == STEPS and "vanilla/loss/denoise" in losses
    assert metrics["vanilla/g1/fid"] == record.curve[0].metrics["fid"]
    assert isinstance(picture["vanilla/samples/g1"], np.ndarray)
    assert cost["vanilla/cost/TFLOPs"] == record.stages[0].flops / 1e12


def test_a_continued_run_is_the_same_run_at_wandb(tmp_path: Path, wandb: FakeWandb) -> None:
    run_tracked(tmp_path, "wandb")
    run_tracked(tmp_path, "wandb", steps=2 * STEPS)
    run_tracked(tmp_path, "wandb", seed=1)
    first, continued, other = (arguments["id"] for arguments in wandb.started)
    assert first == continued != other and wandb.started[1]["resume"] == "allow"


def test_a_missing_login_is_found_before_training(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.key = False
    with pytest.raises(UserError, match="no API key; type `wandb login`"):
        run_tracked(tmp_path, "wandb")
    assert not list(tmp_path.glob("runs/*/spec.json"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_tracked(tmp_path, "wandb")


def test_wrong_settings_of_wandb_are_one_line(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*, prompt: bool, verify: bool) -> bool:
        raise ValueError("mode\n is unknown")

    monkeypatch.setattr(wandb, "login", wrong)
    with pytest.raises(UserError, match="cannot check the login: ValueError: mode is unknown; correct"):
        run_tracked(tmp_path, "wandb")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_one_line_before_training(
    stbench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *rest: None if n == name else find(n, *rest))
    run = ("run", "--backbone", "sit", "--recipe", "vanilla", "--steps", 1, "--output", tmp_path)
    code, _, err = stbench(*run, "--track", name)
    assert code == 2 and f"type `pip install 'stbench[{name}]'`" in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*/spec.json"))


def test_a_service_that_cannot_be_reached_stops_the_run_before_training(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**arguments: Any) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(wandb, "init", unreachable)
    with pytest.raises(UserError, match="--track wandb cannot start: ConnectionError: no route; check"):
        run_tracked(tmp_path, "wandb")
    assert not list(tmp_path.glob("runs/*/spec.json"))


def test_a_connection_lost_later_stops_the_tracking_only(
    tmp_path: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def lost(values: dict[str, Any], commit: bool) -> None:
        calls.append(values)
        raise ConnectionError("gone")

    monkeypatch.setattr(wandb, "log", lost)
    record = run_tracked(tmp_path, "wandb")
    assert record.steps == STEPS and len(calls) == 1
    assert capsys.readouterr().err.count("tracking with wandb stopped: ConnectionError: gone") == 1


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (STEPS, 2 * STEPS):
        path = Path(run_tracked(tmp_path, "wandb", steps=steps).path)
    name = (path / "wandb" / "run-id").read_text().strip()
    assert list(path.glob(f"wandb/offline-run-*-{name}/run-{name}.wandb"))
    assert list(path.glob("wandb/offline-run-*/files/media/images/vanilla/samples/*.png"))


# --- MLflow ---


@pytest.mark.slow
def test_mlflow_in_a_local_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_tracked(tmp_path, "mlflow")
    record = run_tracked(tmp_path, "mlflow", steps=2 * STEPS)
    path = Path(record.path)
    client = mlflow.MlflowClient(f"sqlite:///{path / 'mlflow' / 'mlflow.db'}")
    name = (path / "mlflow" / "run-id").read_text().strip()
    run = client.get_run(name)
    assert run.data.params["train.batch"] == "8" and run.info.status == "FINISHED"
    history = client.get_metric_history(name, "vanilla/g1/fid")
    assert [(m.step, m.value) for m in history] == [(p.step, p.metrics["fid"]) for p in record.curve]
    pictures = list(path.glob(f"mlflow/artifacts/{name}/artifacts/samples/*.png"))
    assert len(pictures) == len(record.curve) == 2


def test_names_for_mlflow() -> None:
    assert trackers.mlflow_name("a/b_c-1.5: d") == "a/b_c-1.5: d"
    assert trackers.mlflow_name("µ[loss]") == "__loss_"


# --- Settings ---


def test_settings_are_flat() -> None:
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": {}, "f": None}) == {"a.b": 1, "a.c.d": [2], "f": None}


def test_files_of_services_belong_to_the_run_folder(tmp_path: Path) -> None:
    from stbench.runs.own_files import RUN_FILES

    assert {RunFolder(tmp_path).tracking(name).name for name in trackers.SERVICES} <= RUN_FILES
