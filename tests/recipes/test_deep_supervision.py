"""The family of deep supervision: targets, losses, heads, masks, and the head that stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from stbench.config.build import build_objective
from stbench.core.backbone import Backbone, attach_heads
from stbench.core.errors import UserError
from stbench.core.guides import HeadGuide
from stbench.core.recipe import Stage, Step
from stbench.core.registry import OBJECTIVES, load_builtins, names
from stbench.diffusion import LinearFlow
from stbench.models import align
from stbench.recipes.deep_supervision import (
    DeepSupervision,
    deep_supervision,
    internal_guidance,
    sra2,
    vae_align,
)
from tests.steps import BATCH, info, network, only, step_of, value

SOME_INSIDE = 16
"""A position of the run at which some times of the batch are inside [0.4, 0.7]."""

load_builtins()


def with_head(stage: Stage, backbone: str = "sit", objective: str = "linear") -> Backbone:
    """A network with the kept head of a stage, whose parameters are random."""
    net = network(backbone, objective)
    assert stage.heads is not None
    torch.manual_seed(0)
    head = stage.heads(net)["head"]
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    attach_heads(net, {"head": head})
    return net


def step_with_head(stage: Stage, backbone: str = "sit", objective: str = "linear") -> tuple[Any, Step]:
    """The supervision of a stage with a kept head, and a step of it."""
    supervision = stage.supervision({})
    net = with_head(stage, backbone, objective)
    return supervision, step_of(supervision, net, build_objective(objective), images_seen=SOME_INSIDE)


def test_sra2_regresses_the_clean_latent_with_five_linear_layers_and_a_final_one() -> None:
    net = network()
    supervision = only(sra2(net.info))
    step = step_of(supervision, net, LinearFlow())
    mlp, final = step.heads["x0"]
    assert [type(layer).__name__ for layer in mlp] == ["Linear", "SiLU"] * 4 + ["Linear"]
    assert [layer.out_features for layer in mlp[::2]] == [96] * 5
    predicted = final(mlp(step.features[supervision.block]))
    error = F.smooth_l1_loss(predicted, step.noised.x0, reduction="none", beta=0.05).mean((1, 2, 3))
    (term,) = supervision.terms(step).values()
    torch.testing.assert_close(term.value, error)
    assert term.weight == 1.0


@pytest.mark.parametrize(
    ("size", "depth", "sra2_block", "head_block"),
    [("b/2", 12, 1, 2), ("l/2", 24, 7, 6), ("xl/2", 28, 7, 7), ("ti/2", 6, 0, 1)],
)
def test_default_blocks(size: str, depth: int, sra2_block: int, head_block: int) -> None:
    where = info("sit", size, depth)
    assert only(sra2(where)).block == sra2_block
    assert only(internal_guidance(where)).block == head_block
    assert only(deep_supervision(where)).block == only(vae_align(where)).block


def test_vae_align_is_the_family_with_its_own_values() -> None:
    net = network()
    general, published = only(deep_supervision(net.info, interval=(0.4, 0.7))), only(vae_align(net.info))
    step = step_of(published, net, LinearFlow(), images_seen=SOME_INSIDE)
    assert isinstance(general, DeepSupervision)
    assert torch.equal(value(general, step), value(published, step))
    assert list(general.terms(step)) == ["deep-supervision"] and list(published.terms(step)) == ["vae-align"]


@pytest.mark.parametrize("backbone", ["sit", "dit", "uvit"])
@pytest.mark.parametrize("objective", names(OBJECTIVES))
def test_an_output_head_is_trained_with_the_loss_of_the_objective(backbone: str, objective: str) -> None:
    stage = only_stage(interval=(0.4, 0.7))
    supervision, step = step_with_head(stage, backbone, objective)
    inside = align.in_interval(step.objective, step.noised.t_host, supervision.interval)
    head = step.heads["head"](step.features[supervision.block], step.condition)
    assert head.shape == step.prediction.shape
    error = step.objective.loss(head, step.noised)
    torch.testing.assert_close(value(supervision, step), torch.where(inside, error, 0.0))


def only_stage(**options: Any) -> Stage:
    """The stage of deep supervision of the second block by an output layer."""
    (stage,) = deep_supervision(network().info, block=1, head="output", **options)
    return stage


def test_the_output_head_starts_at_zero_and_its_gradient_reaches_the_trunk() -> None:
    (stage,) = internal_guidance(network().info)
    net = network()
    assert stage.heads is not None
    attach_heads(net, stage.heads(net))
    supervision = stage.supervision({})
    step = step_of(supervision, net, LinearFlow())
    torch.testing.assert_close(
        value(supervision, step), step.noised.noise.sub(step.noised.x0).square().mean((1, 2, 3))
    )
    supervision, step = step_with_head(stage)
    tokens = step.features[supervision.block]
    (gradient,) = torch.autograd.grad(value(supervision, step).mean(), tokens)
    assert tokens.requires_grad and gradient.abs().max() > 0


def test_an_output_head_may_predict_the_clean_latent() -> None:
    stage = only_stage(target="x0", loss="smooth-l1", beta=0.1)
    supervision, step = step_with_head(stage, "dit", "iddpm")
    head = step.heads["head"](step.features[1], step.condition)
    assert head.shape[1] == 8
    error = F.smooth_l1_loss(head[:, :4], step.noised.x0, reduction="none", beta=0.1).mean((1, 2, 3))
    torch.testing.assert_close(value(supervision, step), error)
    assert stage.guides == {}


def test_only_the_samples_inside_are_paid_for() -> None:
    costs = []
    for interval in ((0.0, 1.0), (0.4, 0.7)):
        supervision, step = step_with_head(only_stage(interval=interval))
        value(supervision, step)
        costs.append(step.cost.heads)
    inside = int(align.in_interval(LinearFlow(), step.noised.t_host, (0.4, 0.7)).sum())
    assert 0 < inside < BATCH and costs[1] == pytest.approx(costs[0] * inside / BATCH)


def test_the_network_can_be_guided_by_a_head_that_predicts_what_it_does() -> None:
    where = info("sit", "xl/2", 28)
    (stage,) = internal_guidance(where)
    assert stage.guides == {"head": HeadGuide("head", 7, scale=1.4)}
    for (other,) in (sra2(where), vae_align(where), deep_supervision(where)):
        assert other.guides == {} and other.heads is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.1}, r"recipe\.beta=0\.1 has no effect with recipe\.loss=mse; leave it out"),
        ({"head": "output", "layers": 4}, r"recipe\.layers=4 have no effect with recipe\.head=output"),
        ({"head": "output", "hidden": 8}, r"recipe\.hidden=8 and .* use --set recipe\.head=mlp"),
        ({"head": "output", "loss": "smooth-l1"}, r"recipe\.loss=smooth-l1 has no effect with recipe\.head"),
        ({"interval": (0.7, 0.4)}, r"recipe\.interval must be \[low,high\]"),
        ({"block": 6}, r"recipe\.block=6 is out of range"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        deep_supervision(info("sit", "ti/2", 6), **options)


@pytest.mark.parametrize("backbone", ["sit", "dit", "uvit"])
@pytest.mark.parametrize("objective", ["linear", "iddpm"])
@pytest.mark.parametrize("head", ["mlp", "output"])
def test_without_a_sample_inside_the_loss_is_zero_and_can_be_differentiated(
    backbone: str, objective: str, head: str
) -> None:
    (stage,) = deep_supervision(network().info, block=1, head=head, interval=(1.0, 1.0), mask="inside-mean")
    net = with_head(stage, backbone, objective) if stage.heads else network(backbone, objective)
    supervision = stage.supervision({})
    step = step_of(supervision, net, build_objective(objective))
    loss = value(supervision, step)
    assert torch.equal(loss, torch.zeros(BATCH)) and step.cost.heads == 0.0
    loss.mean().backward()
