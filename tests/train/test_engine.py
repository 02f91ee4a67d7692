"""The stage loop: pairing of seeds, resuming, continuing, reusing stages, and the files of a finished run."""

from __future__ import annotations

import inspect
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stbench.config.plan import PlannedStage, prepare
from stbench.core.errors import UserError
from stbench.core.registry import BACKBONES, RECIPES, load_builtins, lookup, names
from stbench.runs.folder import RunFolder
from stbench.runs.records import RunRecord
from stbench.train import engine
from stbench.train.hooks import Hook
from tests.conftest import Runner, tiny_spec
from tests.refusals import skip_if_refused

load_builtins()


def silenced(recipe: str) -> dict[str, float]:
    """Weights of zero for the auxiliary terms of a recipe; none for vanilla."""
    options = inspect.signature(lookup(RECIPES, recipe)).parameters
    others = ("coefficient", "structure")
    return {f"recipe__{name}": 0.0 for name in options if name in others or name.endswith("weight")}


OTHER_INPUT = {"reg", "self-flow"}
"""Recipes whose networks are trained on inputs of their own."""
SILENCED = {
    name: options for name in names(RECIPES) if (options := silenced(name)) and name not in OTHER_INPUT
}


def weights(record: RunRecord, kind: str = "raw", stage: int | None = None) -> dict[str, torch.Tensor]:
    stage = record.final_stage if stage is None else stage
    steps = record.stages[stage].steps
    (file,) = Path(record.path).glob(f"checkpoints/{stage}-*/{kind}-{steps:08d}.safetensors")
    return load_file(file)


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_one_seed_gives_one_result_and_another_seed_another(tiny: Runner) -> None:
    first, again = tiny(output="a"), tiny(output="b")
    assert same(weights(first), weights(again))
    assert first.curve[0].metrics == again.curve[0].metrics
    assert not same(weights(first), weights(tiny(output="a", seed=1)))


@pytest.mark.parametrize("recipe", SILENCED)
def test_recipes_are_paired_with_vanilla(tiny: Runner, recipe: str) -> None:
    """With a weight of zero, a recipe trains the weights of vanilla bit for bit.

    Initial weights, data, times, noise and dropped labels are the same.
    """
    silent = tiny(recipe, **SILENCED[recipe])
    trunk = {k: value for k, value in weights(silent).items() if not k.startswith("kept_heads.")}
    assert same(trunk, weights(tiny("vanilla")))
    assert not same(weights(tiny(recipe)), weights(silent))


def test_both_stages_start_from_the_same_weights(tiny: Runner) -> None:
    record = tiny("self-transcendence", recipe__coefficient=0.0)
    assert same(weights(record, stage=0), weights(record, stage=1))


def test_a_finished_run_is_not_trained_again(tiny: Runner, tmp_path: Path) -> None:
    record = tiny()
    before = {p: p.stat().st_mtime_ns for p in Path(record.path).rglob("*.safetensors")}
    again, trained = engine.run(prepare(tiny_spec()), engine.RunOptions(tmp_path / "runs"))
    assert not trained and again.curve == record.curve
    assert before == {p: p.stat().st_mtime_ns for p in Path(record.path).rglob("*.safetensors")}


def test_more_steps_continue_a_finished_run(tiny: Runner) -> None:
    short = tiny(steps=4)
    longer = tiny(steps=8)
    assert longer.path == short.path and longer.stages[0].steps == 8
    direct = tiny(output="direct", steps=8, eval__points=[4, 8])
    assert same(weights(longer), weights(direct)) and same(weights(longer, "ema"), weights(direct, "ema"))
    assert [p.step for p in longer.curve if p.guidance == 1.0] == [4, 8]
    assert longer.stages[0].flops == direct.stages[0].flops


def test_a_continued_run_may_extend_its_guidance_grid(tiny: Runner) -> None:
    tiny(steps=2, eval__guidance=[1.0, 2.0])
    longer = tiny(steps=4, eval__points=[2, 4], eval__extras=[2, 4], eval__guidance=[1.0, 2.0])
    direct = tiny(
        output="direct", steps=4, eval__points=[2, 4], eval__extras=[2, 4], eval__guidance=[1.0, 2.0]
    )
    found, expected = ([(p.step, p.guidance, p.metrics) for p in r.curve] for r in (longer, direct))
    assert found == expected and len(found) == 4


def test_a_longer_teacher_is_another_run(tiny: Runner) -> None:
    assert tiny("self-transcendence", steps=2).path != tiny("self-transcendence", steps=3).path
    kept = tiny("self-transcendence", steps=3, recipe__teacher_steps=2)
    assert kept.path == tiny("self-transcendence", steps=2, recipe__teacher_steps=2).path


class StopAt(Hook):
    """Sends SIGINT after a step."""

    every = 1

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, stage: PlannedStage, step: int, losses: Mapping[str, float]) -> None:
        if step == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_and_the_same_command_resumes(tiny: Runner, tmp_path: Path) -> None:
    with pytest.raises(engine.Interrupted):
        tiny(hooks=[StopAt(3)])
    (folder,) = (p.parent for p in (tmp_path / "runs").glob("*/spec.json"))
    assert RunFolder(folder).status()["state"] == "stopped"
    assert json.loads((folder / "checkpoints/0-vanilla/state.json").read_text())["step"] == 3
    assert same(weights(tiny()), weights(tiny(output="plain")))


FAST = {("dit", "sra"), ("uvit", "repa")}
"""Combinations of the default run; the others are slow."""
COMBINATIONS = [
    pytest.param(backbone, recipe, marks=[] if (backbone, recipe) in FAST else pytest.mark.slow)
    for backbone in names(BACKBONES)
    for recipe in names(RECIPES)
]


@pytest.mark.parametrize(("backbone", "recipe"), COMBINATIONS)
def test_every_recipe_resumes_to_the_same_bits(tiny: Runner, backbone: str, recipe: str) -> None:
    """Interrupted once in each stage, on every backbone under its published objective."""
    options = {"backbone": backbone, "steps": 3, "train__save_every": 10}
    with skip_if_refused():
        plain = tiny(recipe, output="plain", reuse=False, **options)
    for _ in plain.stages:
        with pytest.raises(engine.Interrupted):
            tiny(recipe, output="stopped", reuse=False, hooks=[StopAt(2)], **options)
    stopped = tiny(recipe, output="stopped", reuse=False, **options)
    assert same(weights(plain), weights(stopped)) and same(weights(plain, "ema"), weights(stopped, "ema"))
    assert [p.metrics for p in plain.curve] == [p.metrics for p in stopped.curve]
    assert [s.flops for s in plain.stages] == [s.flops for s in stopped.stages]


def test_an_equal_stage_is_reused_and_still_paid(tiny: Runner) -> None:
    alone = tiny("vae-align")
    taught = tiny("self-transcendence")
    assert taught.stages[0].reused and not taught.stages[1].reused
    assert (
        taught.stages[0].flops == alone.stages[0].flops
        and taught.stages[0].seconds == alone.stages[0].seconds
    )
    fresh = tiny("self-transcendence", output="fresh")
    assert not fresh.stages[0].reused
    assert same(weights(taught), weights(fresh))
    keys = ("stage", "step", "guidance", "metrics", "val_loss", "flops")
    assert [[getattr(p, k) for k in keys] for p in taught.curve] == [
        [getattr(p, k) for k in keys] for p in fresh.curve
    ]


def test_a_last_stage_is_trained_for_its_curve(tiny: Runner) -> None:
    """The artifact of the teacher exists, but this run has evaluation points that the teacher lacks."""
    tiny("self-transcendence", eval__points=[2, 4])
    alone = tiny("vae-align", eval__points=[2, 4])
    assert [p.step for p in alone.curve] == [2, 4] and not alone.stages[0].reused


def test_no_reuse_trains_the_teacher_again(tiny: Runner) -> None:
    tiny("vae-align")
    assert not tiny("self-transcendence", reuse=False).stages[0].reused


def test_the_vanilla_teacher_is_the_vanilla_run(tiny: Runner) -> None:
    tiny("vanilla")
    assert tiny("self-transcendence", recipe__teacher="vanilla").stages[0].reused


def test_other_options_are_other_stages(tiny: Runner) -> None:
    tiny("vae-align", recipe__coefficient=0.25)
    assert not tiny("self-transcendence").stages[0].reused


def test_micro_batches_add_up_to_the_batch(tiny: Runner) -> None:
    whole, parts = weights(tiny(steps=2)), weights(tiny(steps=2, train__accumulate=3))
    assert all(torch.allclose(whole[k], parts[k], atol=2e-5) for k in whole)


def test_the_guidance_grid_is_evaluated_where_it_is_due(tiny: Runner) -> None:
    options = {"eval__points": [1, 2, 3], "eval__guidance": [1.0, 2.0]}
    due = {"last": [4], "all": [1, 2, 3, 4], "[2]": [2, 4]}
    for name, extras in (("last", "last"), ("all", "all"), ("[2]", [2])):
        record = tiny(output=name, eval__extras=extras, **options)
        assert [p.step for p in record.curve if p.guidance == 1.0] == [1, 2, 3, 4]
        assert [p.step for p in record.curve if p.guidance == 2.0] == due[name]
    with pytest.raises(
        UserError, match=r"eval\.extras must be a subset of the evaluation points \[2, 4\], got \[3\]"
    ):
        tiny(eval__points=[2], eval__extras=[3])


def test_keep_last_leaves_one_ema(tiny: Runner) -> None:
    record = tiny(eval__points=[2, 4], keep="last")
    assert [f.name for f in Path(record.path).glob("checkpoints/*/ema-*")] == ["ema-00000004.safetensors"]
    every = tiny(output="all", eval__points=[2, 4])
    assert len(list(Path(every.path).glob("checkpoints/*/ema-*"))) == 2


def test_training_does_not_change_the_global_generator(tiny: Runner) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny("self-transcendence")
    assert torch.equal(torch.rand(3), expected)


def test_training_restores_the_precision_switches(tiny: Runner) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    tiny(precision="tf32", steps=1)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_costs_add_up(tiny: Runner) -> None:
    record = tiny("self-transcendence")
    teacher, student = record.stages
    assert teacher.flops_teachers == 0 and student.flops_teachers > 0
    assert student.flops_student == teacher.flops_student
    assert [p.flops for p in record.curve] == [teacher.flops, student.flops]
    assert record.curve[-1].seconds == student.seconds > student.warmup_seconds > 0


def test_divergence_is_reported_in_one_line(tiny: Runner, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not finite.* `stbench .*smaller learning rate"):
        tiny(steps=60, train__lr=1e9, train__clip=None, train__warmup=0)
    (folder,) = (p.parent for p in (tmp_path / "runs").glob("*/spec.json"))
    assert RunFolder(folder).status()["state"] == "failed"


def test_other_evaluation_settings_are_refused(tiny: Runner, tmp_path: Path) -> None:
    with pytest.raises(engine.Interrupted):
        tiny(hooks=[StopAt(2)])
    with pytest.raises(UserError, match="started with other evaluation settings"):
        tiny(eval__samples=50)
    tiny()
    with pytest.raises(
        UserError, match=r"other evaluation settings.*`stbench evaluate` after it has finished"
    ):
        tiny(eval__guidance=[1.0, 3.0])


def _damaged(tiny: Runner, tmp_path: Path) -> Path:
    with pytest.raises(engine.Interrupted):
        tiny(hooks=[StopAt(3)])
    (place,) = (tmp_path / "runs").glob("*/checkpoints/0-vanilla")
    return place


def test_a_truncated_checkpoint_is_reported_in_one_line(tiny: Runner, tmp_path: Path) -> None:
    place = _damaged(tiny, tmp_path)
    (file,) = place.glob("state-*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(
        UserError, match=r"is damaged: expected sha256 .* delete .*0-vanilla to train this stage again"
    ):
        tiny()


def test_a_truncated_state_file_is_reported_in_one_line(tiny: Runner, tmp_path: Path) -> None:
    place = _damaged(tiny, tmp_path)
    (place / "state.json").write_text('{"schema": 2, "fi')
    with pytest.raises(UserError, match="state.json is not complete JSON"):
        tiny()


def test_a_folder_in_use_is_refused(tiny: Runner, tmp_path: Path) -> None:
    record = tiny()
    with RunFolder(Path(record.path)).lock(), pytest.raises(UserError, match="is in use by process"):
        tiny(steps=8)


@pytest.mark.parametrize(
    ("recipe", "changed", "message"),
    [
        ("vanilla", {}, r"train\.label_drop=0\.1 needs a null label"),
        ("vanilla", {"train__label_drop": 0, "eval__guidance": [1.0, 1.5]}, r"eval\.guidance=1\.5 needs"),
        ("self-transcendence", {"train__label_drop": 0}, r"recipe\.guidance=.* needs a null label"),
    ],
)
def test_a_network_without_a_null_label_cannot_drop_labels(
    tiny: Runner, recipe: str, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        tiny(recipe, backbone="uvit", backbone__label_rows=10, **changed)
    assert tiny(backbone="uvit", backbone__label_rows=10, train__label_drop=0).status == "finished"
