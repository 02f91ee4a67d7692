"""Divergence: nothing that is not finite is saved, published or measured, and the last good state is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.recipe import Stage, Step, Supervision, Term
from stbench.core.registry import RECIPES
from stbench.evaluate.again import evaluate_again
from stbench.evaluate.past_run import open_run
from stbench.models.weights import save_weights
from stbench.runs.folder import OutputFolder, RunFolder
from stbench.train import engine
from tests.conftest import Command, Runner
from tests.train.test_engine import StopAt

BATCH = 8


@dataclass
class Poison(Supervision):
    """A term that is not finite, or whose gradient is not, from a step on."""

    step: int
    gradient_only: bool

    @property
    def taps(self) -> Sequence[int]:
        return (0,)

    def terms(self, step: Step) -> Mapping[str, Term]:
        tokens = step.features[0].mean(dim=(1, 2))
        zero = 0.0 * tokens
        if step.images_seen < self.step * BATCH:
            return {"poison": Term(zero, 1.0)}
        # The derivative of the square root is infinite at zero.
        return {"poison": Term(zero.square().sqrt() if self.gradient_only else zero / 0.0, 1.0)}


def poison(info: BackboneInfo, *, step: int = 3, gradient_only: bool = False, stages: int = 1) -> list[Stage]:
    """A recipe whose first stage diverges."""
    first = Stage("first", lambda earlier: Poison(step, gradient_only))
    return [first, Stage("second", lambda earlier: Poison(10**6, False))][:stages]


@pytest.fixture(autouse=True)
def _recipe() -> Iterator[None]:
    RECIPES.register_module(name="poison", module=poison)
    yield
    del RECIPES.module_dict["poison"]


def the_run(tmp_path: Path) -> Path:
    (spec,) = (tmp_path / "runs").glob("*/spec.json")
    return spec.parent


def require_good_state(run: Path, step: int) -> None:
    """Exactly the state after `step` steps is kept, and it is finite."""
    (state,) = run.glob("checkpoints/0-*/state-*.safetensors")
    assert state.name == f"state-{step:08d}.safetensors"
    assert all(bool(value.isfinite().all()) for value in load_file(state).values())


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_last_good_state_is_kept_and_the_same_command_fails_the_same_way(
    tiny: Runner, tmp_path: Path, gradient_only: bool, clip: float | None
) -> None:
    """Points at 2 and 8, a state every 2 steps; step 4 is the first bad one."""
    options = {
        "steps": 8,
        "eval__points": [2, 8],
        "recipe__gradient_only": gradient_only,
        "train__clip": clip,
    }
    messages = []
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            tiny("poison", **options)
        messages.append(str(caught.value))
    run = the_run(tmp_path)
    require_good_state(run, 2)
    assert messages[0] == messages[1] and "\n" not in messages[0]
    assert "step 4" in messages[0] and "state-00000002.safetensors" in messages[0]
    assert f"EMA weights after step 2 with `stbench sample {run}`" in messages[0]
    assert [point.step for point in RunFolder(run).points()] == [2]
    assert RunFolder(run).status()["state"] == "failed"


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_last_step_that_is_not_finite_does_not_finish(
    tiny: Runner, tmp_path: Path, gradient_only: bool
) -> None:
    with pytest.raises(UserError, match="step 4 .*smaller learning rate"):
        tiny("poison", steps=4, recipe__gradient_only=gradient_only, train__clip=None)
    run = the_run(tmp_path)
    require_good_state(run, 2)
    assert not list(run.glob("checkpoints/*/raw-*")) and not RunFolder(run).stages()
    assert not OutputFolder(tmp_path / "runs").artifacts.exists()


def test_a_teacher_that_is_not_finite_ends_the_run(tiny: Runner, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stage 'first'.*`stbench show"):
        tiny("poison", steps=4, recipe__stages=2)
    assert not RunFolder(the_run(tmp_path)).stages()
    assert not list(the_run(tmp_path).glob("checkpoints/1-*"))


def test_ctrl_c_does_not_save_a_bad_state(tiny: Runner, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not finite at step 4"):
        tiny("poison", steps=20, train__save_every=100, hooks=[StopAt(4)])
    assert not list(the_run(tmp_path).glob("checkpoints/0-*/state-*"))


def test_a_saved_state_with_nan_is_refused(tiny: Runner, tmp_path: Path) -> None:
    """Revisions before the check could save one."""
    with pytest.raises(engine.Interrupted):
        tiny(hooks=[StopAt(3)])
    (index,) = the_run(tmp_path).glob("checkpoints/0-*/state.json")
    folder = RunFolder(the_run(tmp_path)).stage(0, "vanilla")
    content, state = folder.read(index), folder.state(3)
    tensors = load_file(state)
    next(iter(tensors.values())).fill_(torch.nan)
    folder.write(index, {**content, "sha256": save_weights(tensors, state)})
    with pytest.raises(UserError, match=r"contains NaN in .*; delete .*0-vanilla to train this stage again"):
        tiny()


def test_weights_with_nan_have_no_numbers(tiny: Runner, stbench: Command, tmp_path: Path) -> None:
    """A run of a revision that did not check: `evaluate` writes nan, `sample` refuses."""
    run = Path(tiny(steps=2).path)
    folder = RunFolder(run).stage(0, "vanilla")
    file = folder.weights("ema", 2)
    tensors = {name: torch.full_like(value, torch.nan) for name, value in load_file(file).items()}
    sha256 = save_weights(tensors, file)
    folder.record_weights("ema", 2, sha256)
    (stage,) = RunFolder(run).stages()
    RunFolder(run).add_stage(type(stage)(**{**stage.__dict__, "sha256": {**stage.sha256, "ema": sha256}}))

    past = open_run(run)
    settings = past.prepared.spec.eval.model_copy(update={"steps": 3})
    (point,) = evaluate_again(past, settings, torch.device("cpu"))
    assert len(point.metrics) > 3 and all(value != value for value in point.metrics.values())
    assert all(value != value for value in point.val_loss)
    code, _, err = stbench("sample", run, "-n", 2, "--steps", 2, "--output", tmp_path / "x.npz")
    assert code == 2 and "NaN" in err and not (tmp_path / "x.npz").exists()
