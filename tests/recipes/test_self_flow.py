"""Self-Flow: groups and times, inputs of student and teacher, separated attention, cost, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, BackboneInfo
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.core.recipe import Step
from stbench.core.rng import Rng
from stbench.diffusion import ImprovedDdpm, LinearFlow, VpDiscrete
from stbench.models import align
from stbench.recipes.self_flow import SelfFlow, self_flow
from stbench.testing import check_recipe
from tests.steps import BATCH, info, network, only, step_of, value


def made(**options: Any) -> tuple[SelfFlow, Backbone, Step]:
    """A supervision and a step of it whose EMA differs from the student."""
    net = network()
    supervision = cast(SelfFlow, only(self_flow(net.info, **options)))
    step = step_of(supervision, net, LinearFlow())
    with torch.no_grad():
        for parameter in step.ema.parameters():
            parameter.mul_(0.9)
    return supervision, net, step


def patches(x: Tensor) -> Tensor:
    """The pixels of each token (B,N,C*4) of latents (B,C,8,8)."""
    return torch.nn.functional.unfold(x, 2, stride=2).mT


@pytest.mark.parametrize(
    ("where", "blocks"),
    [
        (info("sit", "xl/2", 28), (7, 19)),
        (info("sit", "b/2", 12), (2, 7)),
        (info("dit", "l/2", 24), (6, 16)),
        (info("sit", "ti/2", 6), (1, 3)),
    ],
)
def test_the_published_blocks_scale_with_the_depth(where: BackboneInfo, blocks: tuple[int, int]) -> None:
    able = dataclasses.replace(where, capabilities=("token-time",))
    supervision = only(self_flow(able))
    assert (supervision.student_block, supervision.teacher_block) == blocks


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 4), (0.3, 5), (0.28, 4), (0.5, 8), (0.9, 14)])
def test_a_share_of_the_tokens_is_in_group_0(ratio: float, count: int) -> None:
    supervision = only(self_flow(network().info, ratio=ratio))
    first = supervision.first_group(Rng(0, 0, 64))
    assert first.shape == (64, 16) and (first.sum(1) == count).all()
    assert len({tuple(row) for row in first.tolist()}) > 32
    assert first.double().mean(0) == pytest.approx([count / 16] * 16, abs=0.25)


@pytest.mark.parametrize("objective", [LinearFlow(), ImprovedDdpm(), VpDiscrete()])
def test_the_times_of_the_groups_are_independent_and_distributed_as_the_objective_s(
    objective: Objective,
) -> None:
    supervision = only(self_flow(network().info))
    first, second = supervision.times(objective, Rng(0, 0, 4096))
    for t in (first, second):
        assert t.mean().item() == pytest.approx(0.5, abs=0.02)
        assert torch.equal(objective.snap(t), t)
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1].item()) < 0.05
    assert 0.45 < (first < second).double().mean().item() < 0.55


def test_each_token_is_noised_at_the_time_of_its_group() -> None:
    supervision, _, step = made()
    first = supervision.first_group(step.batch.rng)
    t0, t1 = supervision.times(step.objective, step.batch.rng)
    times = torch.where(first, t0[:, None], t1[:, None])
    assert torch.equal(step.noised.t_host, times)
    weights = times.float()[..., None]
    expected = (1 - weights) * patches(step.batch.x0) + weights * patches(step.noised.noise)
    torch.testing.assert_close(patches(step.noised.x_t), expected)
    vanilla = LinearFlow().draw(step.batch)
    assert torch.equal(step.noised.noise, vanilla.noise)


def test_half_a_batch_draws_the_same_numbers() -> None:
    supervision, objective = only(self_flow(network().info)), LinearFlow()
    whole, part = Rng(0, 0, BATCH), Rng(0, 0, BATCH, 4, 8)
    assert torch.equal(supervision.first_group(whole)[4:8], supervision.first_group(part))
    for draw in (lambda rng: supervision.times(objective, rng), supervision.offsets):
        assert all(torch.equal(a[4:8], b) for a, b in zip(draw(whole), draw(part), strict=True))


def expected(supervision: SelfFlow, step: Step, x: Tensor, t: Tensor, **inputs: Any) -> Tensor:
    """The cosine distance from the EMA's tokens for an input."""
    block = supervision.teacher_block
    target = step.ema.features(x, t, step.batch.y_true, indices=(block,), **inputs)[block]
    return 1.0 - align.cosine(step.heads["head"](step.features[supervision.student_block]), target)


def test_the_teacher_is_the_ema_at_the_smaller_time_with_the_true_labels() -> None:
    supervision, net, step = made()
    lowest = torch.minimum(*supervision.times(step.objective, step.batch.rng))
    cleaner = step.objective.at(step.batch.x0, step.noised.noise, lowest)
    assert cleaner.t.shape == (BATCH,) and (step.batch.y != step.batch.y_true).any()
    found = value(supervision, step)
    torch.testing.assert_close(found, expected(supervision, step, cleaner.x_t, cleaner.t))
    found.mean().backward()
    assert all(p.grad is None for p in step.ema.parameters())
    assert any(p.grad is not None for p in net.parameters())
    dropped = dataclasses.replace(supervision, labels="dropped")
    assert not torch.equal(value(dropped, step), found)


def test_per_group_teachers_keep_the_groups_at_less_noise() -> None:
    supervision, _, step = made(teacher="per-group")
    rng, first = step.batch.rng, supervision.first_group(step.batch.rng)
    pairs = zip(supervision.times(step.objective, rng), supervision.offsets(rng), strict=True)
    t0, t1 = ((t - 0.2 * u).clamp(0, 1) for t, u in pairs)
    times = torch.where(first, t0[:, None], t1[:, None])
    assert ((times < step.noised.t_host) | (times == 0)).all()
    cleaner = step.objective.at(step.batch.x0, step.noised.noise, times)
    torch.testing.assert_close(value(supervision, step), expected(supervision, step, cleaner.x_t, cleaner.t))


def test_the_same_input_and_the_released_one() -> None:
    same, _, step = made(teacher="same")
    assert same.teacher_input(step) == (step.noised.x_t, step.noised.t)
    released = dataclasses.replace(same, teacher="min-released")
    x, t = released.teacher_input(step)
    first = released.first_group(step.batch.rng)
    lowest = torch.minimum(*released.times(step.objective, step.batch.rng))
    assert torch.equal(t, lowest)
    assert torch.equal(patches(x)[~first], patches(step.batch.x0)[~first])  # clean
    intended, _ = dataclasses.replace(same, teacher="min").teacher_input(step)
    assert torch.equal(patches(x)[first], patches(intended)[first])
    assert not torch.equal(x, intended)


def test_separation_masks_the_student_and_on_request_the_teacher() -> None:
    supervision, net, step = made(separation="student")
    first = supervision.first_group(step.batch.rng)
    mask = supervision.own_group(step.batch)
    assert torch.equal(mask, first[:, :, None] == first[:, None, :])
    assert supervision.inputs(step.batch, step.noised).keys() == {"mask"}
    apart = net.features(step.noised.x_t, step.noised.t, step.batch.y, indices=(1,), mask=mask)[1]
    torch.testing.assert_close(step.features[1], apart)
    x, t = supervision.teacher_input(step)
    torch.testing.assert_close(value(supervision, step), expected(supervision, step, x, t))
    both = dataclasses.replace(supervision, separation="both")
    torch.testing.assert_close(value(both, step), expected(both, step, x, t, mask=mask))
    assert made()[0].inputs(step.batch, step.noised) == {}


def test_the_groups_of_a_separated_network_do_not_see_each_other() -> None:
    supervision, net, step = made(separation="student")
    first, mask = supervision.first_group(step.batch.rng), supervision.own_group(step.batch)
    x = torch.where(patches_to_pixels(first), step.noised.x_t, 0.0)
    found = net.features(x, step.noised.t, step.batch.y, indices=(5,), mask=mask)[5]
    original = net.features(step.noised.x_t, step.noised.t, step.batch.y, indices=(5,), mask=mask)[5]
    torch.testing.assert_close(found[first], original[first])
    assert not torch.allclose(found[~first], original[~first])


def patches_to_pixels(first: Tensor) -> Tensor:
    return first.reshape(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)


def test_flops_count_times_per_token_and_masks() -> None:
    _, net, step = made()
    value(only(self_flow(net.info)), step)
    assert step.cost.teachers == BATCH * net.flops(3)
    per_group, _, step = made(teacher="per-group")
    value(per_group, step)
    assert step.cost.teachers == BATCH * net.flops(3, token_times=True) > BATCH * net.flops(3)


@pytest.mark.parametrize("options", [{}, {"teacher": "per-group", "separation": "both"}])
def test_it_trains_with_other_clocks(options: dict[str, Any]) -> None:
    check_recipe("self-flow", backbone="dit", options=options)


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("uvit", {}, r"'token-time', which uvit lacks \(it has one time token for all image tokens\)"),
        ("sit", {"beta": 0.1}, r"recipe\.beta=0\.1 has no effect with recipe\.distance=cosine"),
        ("sit", {"t_max": 0.1}, r"recipe\.t_max=0\.1 has no effect with recipe\.teacher=min"),
        ("sit", {"ratio": 0.01}, r"recipe\.ratio=0\.01 leaves one of the groups of 16 tokens empty"),
        ("sit", {"ratio": 1.0}, r"recipe\.ratio"),
    ],
)
def test_options_that_mean_nothing_are_refused(backbone: str, options: dict[str, Any], message: str) -> None:
    overrides = {f"recipe.{name}": given for name, given in options.items()}
    with pytest.raises(UserError, match=message) as error:
        prepare(resolve(RunRequest(backbone, "self-flow", overrides=overrides)))
    assert "\n" not in str(error.value)
