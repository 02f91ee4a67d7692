"""VAE alignment and Self-Transcendence: defaults, the interval mask, guided features and the two stages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.errors import UserError
from stbench.core.recipe import Artifact, NoSupervision, Stage
from stbench.diffusion import LinearFlow
from stbench.models import align
from stbench.recipes.deep_supervision import VaeAlign, vae_align
from stbench.recipes.self_transcendence import SelfTranscendence, self_transcendence
from tests.steps import BATCH, info, network, only, step_of, value

SOME_INSIDE = 16
"""A position of the run at which some times of the batch are inside [0.4, 0.7]."""


def artifact(net: Backbone | None = None) -> Artifact:
    """A finished teacher stage that loads `net`."""
    return Artifact(
        name="vae-align",
        fingerprint="test",
        checkpoint="",
        sha256={},
        steps=1,
        images_seen=BATCH,
        seconds=0.0,
        flops=0.0,
        loader=lambda weights: net if net is not None else network(),
    )


def second(stages: Sequence[Stage], teacher: Artifact) -> Any:
    """The supervision of the second stage, taught by `teacher`."""
    return stages[1].supervision({stages[0].name: teacher})


@pytest.mark.parametrize(
    ("where", "blocks", "hidden", "guidance", "weights", "length"),
    [
        (info("sit", "b/2", 12), (1, 5, 7), 2048, 30.0, "raw", 0.5),
        (info("sit", "xl/2", 28), (4, 13, 18), 2048, 30.0, "raw", 0.5),
        (info("sit", "ti/2", 6), (0, 2, 3), 384, 10.0, "ema", 1.0),
    ],
)
def test_defaults_by_size(
    where: BackboneInfo,
    blocks: tuple[int, int, int],
    hidden: int,
    guidance: float,
    weights: str,
    length: float,
) -> None:
    stages = self_transcendence(where)
    first, last = stages[0].supervision({}), second(stages, artifact())
    assert isinstance(first, VaeAlign) and first == only(vae_align(where))
    assert (first.block, last.student_block, last.teacher_block) == blocks
    assert (first.hidden, last.hidden) == (hidden, hidden)
    assert (last.guidance, last.weights, stages[0].length) == (guidance, weights, length)


def test_options_reach_both_stages() -> None:
    shared: dict[str, Any] = dict(
        coefficient=0.1, interval=(0.2, 0.6), hidden=64, mask="released", time="native"
    )
    stages = self_transcendence(info("sit", "ti/2", 6), teacher_steps=7, guidance_stop=9, **shared)
    for supervision in (stages[0].supervision({}), second(stages, artifact())):
        assert {name: getattr(supervision, name) for name in shared} == shared
    assert stages[0].steps == 7 and second(stages, artifact()).guidance_stop == 9


def test_a_vanilla_teacher_has_no_supervision() -> None:
    stages = self_transcendence(info("sit", "ti/2", 6), teacher="vanilla")
    assert [stage.name for stage in stages] == ["vanilla", "self-transcendence"]
    assert stages[0].supervision({}) == NoSupervision()


def test_the_loss_selects_samples_inside_the_interval() -> None:
    net, objective = network(), LinearFlow()
    supervision = only(vae_align(net.info))
    step = step_of(supervision, net, objective, images_seen=SOME_INSIDE)
    inside = align.in_interval(objective, step.noised.t_host, supervision.interval)
    assert 0 < inside.sum() < BATCH
    velocity = step.heads["velocity"](step.features[supervision.block])
    error = align.mse(velocity, objective.velocity_target(step.noised))
    torch.testing.assert_close(value(supervision, step), torch.where(inside, error, 0.0))
    released = dataclasses.replace(supervision, mask="released")
    torch.testing.assert_close(value(released, step), error * inside.float().mean())
    mean = dataclasses.replace(supervision, mask="inside-mean")
    torch.testing.assert_close(value(mean, step).mean(), error[inside].mean())


def test_the_teacher_is_guided_with_the_true_label() -> None:
    net, teacher = network(), network().eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(0.9)
    supervision = second(self_transcendence(net.info, guidance=3.0), artifact(teacher))
    step = step_of(supervision, net, LinearFlow())
    y, null = step.batch.y_true, torch.full((BATCH,), net.info.classes)
    assert (step.batch.y != y).any()
    conditional, unconditional = (
        teacher.features(step.noised.x_t, step.noised.t, labels, indices=(3,))[3] for labels in (y, null)
    )
    guided = unconditional + 3.0 * (conditional - unconditional)
    projected = step.heads["projector"](step.features[supervision.student_block])
    everywhere = dataclasses.replace(supervision, interval=(0.0, 1.0))
    everywhere.setup(torch.device("cpu"))
    torch.testing.assert_close(value(everywhere, step), align.mse(projected, guided))


def test_only_selected_samples_are_paid_for() -> None:
    net = network()
    supervision = second(self_transcendence(net.info), artifact())
    step = step_of(supervision, net, LinearFlow(), images_seen=SOME_INSIDE)
    value(supervision, step)
    inside = int(align.in_interval(LinearFlow(), step.noised.t_host, (0.4, 0.7)).sum())
    assert 0 < inside < BATCH
    assert step.cost.teachers == 2 * inside * net.flops(supervision.teacher_block)


def test_an_empty_interval_costs_nothing_and_gives_a_zero_loss() -> None:
    net = network()
    for mask in ("samples", "inside-mean"):
        supervision = second(self_transcendence(net.info, interval=(1.0, 1.0), mask=mask), artifact())
        step = step_of(supervision, net, LinearFlow())
        assert torch.equal(value(supervision, step), torch.zeros(BATCH))
        assert step.cost.total == 0.0


def test_the_alignment_ends_after_guidance_stop() -> None:
    net = network()
    supervision = second(self_transcendence(net.info, guidance_stop=2), artifact())
    last, after = (step_of(supervision, net, LinearFlow(), images_seen=n * BATCH) for n in (1, 2))
    assert list(supervision.terms(last)) == ["self-transcendence"]
    assert supervision.terms(after) == {}


def test_guidance_needs_a_null_label() -> None:
    without = dataclasses.replace(info("uvit", "ti/2", 7), null_label=False)
    with pytest.raises(UserError, match=r"recipe\.guidance=10\.0 needs a null label, but uvit-ti/2 has none"):
        self_transcendence(without)
    assert second(self_transcendence(without, guidance=1.0), artifact()).guidance == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"interval": (0.7, 0.4)},
            r"recipe\.interval must be \[low,high\] with low <= high, got \[0\.7, 0\.4\]",
        ),
        ({"align_block": 6}, r"recipe\.align_block=6 is out of range: sit-ti/2 has blocks 0\.\.5"),
        ({"student_block": -1}, r"recipe\.student_block=-1 is out of range"),
        ({"teacher_block": 9}, r"recipe\.teacher_block=9 is out of range"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        self_transcendence(info("sit", "ti/2", 6), **options)


def test_a_supervision_needs_its_teacher() -> None:
    net = network()
    supervision = second(self_transcendence(net.info), artifact())
    step = step_of(only(vae_align(net.info)), net, LinearFlow())
    assert isinstance(supervision, SelfTranscendence)
    with pytest.raises(AssertionError, match="setup"):
        supervision.guided(step, torch.arange(2))
