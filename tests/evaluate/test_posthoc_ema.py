"""EMA decays after training: the formulas against direct averages, and rows of a run with stored averages."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from stbench.config.plan import prepare
from stbench.config.spec import TrainSpec
from stbench.core.errors import UserError
from stbench.evaluate import posthoc_ema
from stbench.evaluate.posthoc_ema import POSTHOC, Average, EmaWeighting, fit, power_decay, power_weighting
from stbench.runs.folder import RunFolder
from stbench.train import engine
from stbench.train.step import ema_decay, update_ema
from tests.conftest import Command, Runner, tiny_spec
from tests.train.test_engine import StopAt, same, weights

STEPS, EVERY = 400, 40


def train_spec(decay: float = 0.98, *, warmup: bool = False) -> TrainSpec:
    return tiny_spec(train__ema_decay=decay, train__ema_warmup=warmup).train


def trajectory(steps: int = STEPS) -> np.ndarray:
    """Three weights (steps + 1, 3): a random walk, a decay towards a limit, and a constant."""
    walk = np.cumsum(np.random.default_rng(0).normal(size=steps + 1))
    return np.stack([walk, np.exp(-np.arange(steps + 1) / 50), np.full(steps + 1, 1.25)], axis=1)


def averaged(theta: np.ndarray, decays: list[float]) -> list[np.ndarray]:
    """The running average after every step, as training computes it."""
    found = [theta[0]]
    for value, decay in zip(theta[1:], decays, strict=True):
        found.append(decay * found[-1] + (1 - decay) * value)
    return found


# --- Formulas ---


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_the_exponents_of_the_paper(length: float, gamma: float) -> None:
    found = posthoc_ema.power_exponent(length)
    assert found == pytest.approx(gamma, abs=0.005)
    assert math.sqrt((found + 1) / ((found + 2) ** 2 * (found + 3))) == pytest.approx(length)


def test_weightings_are_those_of_the_running_averages() -> None:
    theta = trajectory()
    times = np.arange(STEPS + 1, dtype=np.float64)
    power = averaged(theta, [power_decay(step) for step in range(1, STEPS + 1)])
    for step in (1, 7, STEPS):
        weighting = power_weighting(step, times)
        assert weighting.sum() == pytest.approx(1.0)
        np.testing.assert_allclose(weighting @ theta, power[step], rtol=1e-9)
    for warmup in (False, True):
        train = train_spec(0.98, warmup=warmup)
        exponential = averaged(theta, [ema_decay(train, step) for step in range(STEPS)])
        found = EmaWeighting(0.98, STEPS, warmup=warmup)
        for step in (0, 1, 7, STEPS):
            np.testing.assert_allclose(found(step, times) @ theta, exponential[step], rtol=1e-9)


def test_a_decay_of_zero_is_the_last_weight() -> None:
    times = np.arange(11, dtype=np.float64)
    assert EmaWeighting(0.0, 10, warmup=False)(10, times).tolist() == pytest.approx([0.0] * 10 + [1.0])


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.97, 0.98, 0.99])
def test_a_reconstruction_is_close_to_the_direct_average(decay: float, warmup: bool) -> None:
    """The error in a random walk is bounded by the error of the weighting."""
    theta, train = trajectory(), train_spec(0.98, warmup=warmup)
    stored = {
        "ema": averaged(theta, [ema_decay(train, step) for step in range(STEPS)]),
        POSTHOC: averaged(theta, [power_decay(step) for step in range(1, STEPS + 1)]),
    }
    wanted = train.model_copy(update={"ema_decay": decay})
    direct = averaged(theta, [ema_decay(wanted, step) for step in range(STEPS)])[-1]
    averages = [Average(kind, step) for step in range(EVERY, STEPS + 1, EVERY) for kind in (POSTHOC, "ema")]
    coefficients, error = fit(averages, train, decay, STEPS)
    found = sum(value * stored[average.kind][average.step] for average, value in coefficients.items())
    assert error < 0.05 and sum(coefficients.values()) == pytest.approx(1.0)
    scale = np.abs(theta[1:, :2] - stored["ema"][-1][:2]).max(axis=0)
    assert (np.abs(found - direct)[:2] <= 0.05 * scale).all()
    assert found[2] == pytest.approx(1.25, rel=1e-9)
    if decay == train.ema_decay:
        assert error < 1e-9


def test_parts_give_the_solution_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    averages = [Average(kind, step) for step in (100, 200, 400) for kind in (POSTHOC, "ema")]
    whole = fit(averages, train_spec(), 0.985, STEPS)
    monkeypatch.setattr(posthoc_ema, "CHUNK", 37)
    parts = fit(averages, train_spec(), 0.985, STEPS)
    assert parts[1] == pytest.approx(whole[1], rel=1e-6)
    assert list(parts[0].values()) == pytest.approx(list(whole[0].values()), rel=1e-6)


def test_the_network_average_follows_its_formula() -> None:
    student, average = torch.nn.Linear(2, 2, bias=False).double(), torch.nn.Linear(2, 2, bias=False).double()
    history = [student.weight.detach().clone()]
    for step in range(1, 6):
        torch.nn.init.normal_(student.weight)
        history.append(student.weight.detach().clone())
        update_ema(average, student, power_decay(step))
    weighting = torch.from_numpy(power_weighting(5, np.arange(6, dtype=np.float64)))
    expected = torch.einsum("t,tij->ij", weighting, torch.stack(history))
    torch.testing.assert_close(average.weight.detach(), expected)


# --- Runs ---

AVERAGES = {"train__posthoc_ema": True, "train__ema_decay": 0.9, "train__ema_warmup": False}
POINTS = {"steps": 8, "eval__points": [2, 4, 6, 8], "train__ema_decay": 0.9, "train__ema_warmup": False}


def test_the_second_average_changes_no_weight_and_no_hash(tiny: Runner) -> None:
    without, record = tiny(output="a"), tiny(output="b", train__posthoc_ema=True)
    assert Path(record.path).name == Path(without.path).name
    assert (record.train_hash, record.setting_hash) == (without.train_hash, without.setting_hash)
    assert same(weights(record), weights(without)) and same(weights(record, "ema"), weights(without, "ema"))
    assert record.curve[0].metrics == without.curve[0].metrics
    assert not list(Path(without.path).glob("checkpoints/*/posthoc-*"))


@pytest.mark.slow
def test_only_the_last_stage_keeps_it(tiny: Runner) -> None:
    path = Path(tiny("self-transcendence", train__posthoc_ema=True, recipe__teacher_steps=2).path)
    assert [file.parent.name[0] for file in path.glob("checkpoints/*/posthoc-*")] == ["1"]


def test_a_resumed_run_has_the_same_averages(tiny: Runner) -> None:
    more = {**POINTS, "train__posthoc_ema": True}
    whole = tiny(output="a", **more)
    with pytest.raises(engine.Interrupted):
        tiny(output="b", hooks=[StopAt(5)], **more)
    assert same(weights(tiny(output="b", **more), POSTHOC), weights(whole, POSTHOC))


@pytest.mark.parametrize("before", [False, True])
def test_it_cannot_be_switched_within_a_run(tiny: Runner, before: bool) -> None:
    tiny(steps=2, train__posthoc_ema=before)
    for steps in (2, 4):
        with pytest.raises(UserError, match=f"was started with train.posthoc_ema={str(before).lower()}; add"):
            tiny(steps=steps, train__posthoc_ema=not before)


def test_evaluate_adds_a_row_that_names_the_decay(tiny: Runner, stbench: Command) -> None:
    record = tiny(**POINTS, train__posthoc_ema=True)
    path = Path(record.path)
    pictures = {file.name: file.read_bytes() for file in path.glob("samples/*")}
    code, out, err = stbench("evaluate", path, "--ema-decay", 0.9, "--ema-decay", 0.85)
    assert code == 0, err
    assert "ema 0.85 (post hoc)" in out and "2 rows added" in out
    folder = RunFolder(path)
    rows = {folder.record().protocols[p.protocol]["weights"]: p for p in folder.points() if p.step == 8}
    assert rows.keys() == {"ema", "ema 0.9 (post hoc)", "ema 0.85 (post hoc)"}
    # The run's own decay gives its own weights.
    assert rows["ema 0.9 (post hoc)"].metrics == rows["ema"].metrics
    assert rows["ema 0.85 (post hoc)"].metrics["fid"] != rows["ema"].metrics["fid"]
    assert {file.name: file.read_bytes() for file in path.glob("samples/*")} == pictures
    assert "0 rows added" in stbench("evaluate", path, "--ema-decay", 0.85)[1]


@pytest.mark.slow
def test_the_weights_of_a_reconstruction_are_near_those_of_a_run_with_that_decay(tiny: Runner) -> None:
    from stbench.evaluate.past_run import PastRun

    settings = {"steps": 6, "eval__points": list(range(1, 7)), **AVERAGES}
    record = tiny(**settings)
    other = tiny(output="other", **{**settings, "train__ema_decay": 0.8})
    run = PastRun(RunFolder(Path(record.path)), prepare(tiny_spec(**settings)))
    (planned,) = posthoc_ema.plan(run, [0.8])
    assert planned.error < 1e-5  # every step has its averages
    found = posthoc_ema.reconstruct(run, planned)
    near, far = weights(other, "ema"), weights(record, "ema")
    assert found.keys() == near.keys()
    distance = sum(float((found[name] - near[name]).norm() ** 2) for name in near) ** 0.5
    between = sum(float((far[name] - near[name]).norm() ** 2) for name in near) ** 0.5
    assert distance < 1e-3 * between


def test_a_run_without_averages_is_refused(stbench: Command, trained_run: Path) -> None:
    code, _, err = stbench("evaluate", trained_run, "--ema-decay", 0.9)
    assert code == 2 and "train it with --set train.posthoc_ema=true" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ema-decay", 1.0), "must be in [0, 1), got 1"),
        (("--ema-decay", "nan"), "must be in [0, 1), got nan"),
        (("--ema-decay", 0.9, "--reference", "r.npz"), "drop --reference, or drop --ema-decay"),
    ],
)
def test_bad_options(
    stbench: Command, trained_run: Path, arguments: tuple[object, ...], message: str
) -> None:
    code, _, err = stbench("evaluate", trained_run, *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_decay_that_the_averages_do_not_determine_is_refused(tiny: Runner, stbench: Command) -> None:
    path = tiny(steps=64, eval__points=[64], **AVERAGES).path
    code, _, err = stbench("evaluate", path, "--ema-decay", 0.99)
    assert code == 2 and "choose a decay nearer to 0.9, which the run was trained with" in err


@pytest.mark.slow
def test_a_damaged_average_is_refused(tiny: Runner, stbench: Command) -> None:
    path = Path(tiny(**POINTS, train__posthoc_ema=True).path)
    file = sorted(path.glob("checkpoints/0-vanilla/posthoc-*"))[0]
    changed = {name: value + 1 for name, value in load_file(file).items()}
    save_file(changed, file)
    code, _, err = stbench("evaluate", path, "--ema-decay", 0.85)
    assert code == 2 and f"{file} is damaged" in err
