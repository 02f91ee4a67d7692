"""SRA: blocks, defaults, the weight schedule, and the EMA teacher at less noise."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import nn

from stbench.core.backbone import BackboneInfo
from stbench.core.errors import UserError
from stbench.core.objective import Objective
from stbench.diffusion import ImprovedDdpm, LinearFlow, VpContinuous, VpDiscrete
from stbench.models import align
from stbench.recipes.sra import Sra, sra
from tests.steps import info, network, only, step_of, value


@pytest.mark.parametrize(
    ("where", "blocks"),
    [
        (info("sit", "xl/2", 28), (7, 19)),
        (info("dit", "xl/2", 28), (7, 15)),
        (info("sit", "b/2", 12), (3, 7)),
        (info("uvit", "l/2", 21), (5, 14)),
        (info("sit", "ti/2", 6), (1, 3)),
    ],
)
def test_sra_blocks(where: BackboneInfo, blocks: tuple[int, int]) -> None:
    supervision = only(sra(where))
    assert (supervision.student_block, supervision.teacher_block) == blocks


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("sit", {}, (0.2, "256", "flow")),
        ("dit", {}, (0.04, "256", "native")),
        ("sit", {"distance": "cosine"}, (0.5, "constant", "flow")),
        ("dit", {"distance": "cosine-released", "schedule": "512"}, (0.5, "512", "native")),
        ("uvit", {"weight": 0.0, "time": "native"}, (0.0, "256", "native")),
        ("sit", {"distance": "l2"}, (0.2, "256", "flow")),
    ],
)
def test_sra_defaults_follow_distance_and_family(
    family: str, options: dict[str, Any], expected: tuple[float, str, str]
) -> None:
    supervision = only(sra(info(family, "xl/2", 28), **options))
    assert (supervision.weight, supervision.schedule, supervision.time) == expected


def test_sra_schedule_follows_the_size_of_the_latents() -> None:
    large = dataclasses.replace(info("sit", "xl/2", 28), input_size=64)
    assert only(sra(large)).schedule == "512"
    assert only(sra(large, distance="cosine")).schedule == "constant"
    assert only(sra(dataclasses.replace(large, channels=3))).schedule == "256"  # pixels


def test_sra_weight_falls_after_its_last_full_epoch() -> None:
    supervision = only(sra(info("sit", "xl/2", 28)))
    assert supervision.weight_at(149) == 0.2
    assert supervision.weight_at(1149) == pytest.approx(0.02)
    assert dataclasses.replace(supervision, schedule="512").weight_at(899) == pytest.approx(0.02)
    assert dataclasses.replace(supervision, schedule="constant").weight_at(5000) == 0.2


def test_sra_weight_counts_epochs_of_the_data_set() -> None:
    supervision, net = only(sra(info("sit", "ti/2", 6))), network()
    early, late = (
        step_of(supervision, net, LinearFlow(), images_seen=seen) for seen in (149 * 1500, 349 * 1500)
    )
    assert supervision.terms(early)["sra"].weight == 0.2
    assert supervision.terms(late)["sra"].weight == pytest.approx(0.2 * 0.1**0.2)


def test_sra_teacher_is_the_ema_at_less_noise_with_the_same_noise_and_labels() -> None:
    net, objective = network(), LinearFlow()
    supervision = cast(Sra, only(sra(net.info)))
    step = step_of(supervision, net, objective)
    with torch.no_grad():
        for parameter in step.ema.parameters():
            parameter.mul_(0.9)
    t = (step.noised.t_host - 0.2 * step.batch.rng.uniform("sra")).clamp(0, 1)
    assert (step.batch.y != step.batch.y_true).any()
    cleaner = objective.at(step.batch.x0, step.noised.noise, t)
    target = step.ema.features(cleaner.x_t, cleaner.t, step.batch.y, indices=(3,))[3]
    student = step.heads["head"](step.features[1])
    expected = align.smooth_l1(student, target, 0.05)
    torch.testing.assert_close(value(supervision, step), expected)
    value(supervision, step).mean().backward()
    assert all(p.grad is None for p in step.ema.parameters())
    assert any(p.grad is not None for p in net.parameters())


def test_sra_distances_differ_and_the_released_cosine_is_over_tokens() -> None:
    supervision = only(sra(info("sit", "ti/2", 6), distance="cosine"))
    a, b = torch.randn(2, 16, 96), torch.randn(2, 16, 96)
    over_channels = 1 - nn.functional.cosine_similarity(a, b, dim=2).mean(1)
    over_tokens = 1 - nn.functional.cosine_similarity(a, b, dim=1).mean(1)
    torch.testing.assert_close(supervision.measure(a, b), over_channels)
    released = dataclasses.replace(supervision, distance="cosine-released")
    torch.testing.assert_close(released.measure(a, b), over_tokens)
    assert not torch.allclose(over_channels, over_tokens)
    for distance, error in (("l1", (a - b).abs()), ("l2", (a - b).square())):
        other = dataclasses.replace(supervision, distance=distance)
        torch.testing.assert_close(other.measure(a, b), error.flatten(1).mean(1))


@pytest.mark.parametrize("objective", [LinearFlow(), ImprovedDdpm(), VpDiscrete(), VpContinuous()])
def test_the_flow_clock_lowers_the_noise_by_the_same_amount_everywhere(objective: Objective) -> None:
    tau = torch.linspace(0.05, 0.9, 9, dtype=torch.float64)
    t, u = objective.t_of_tau(tau), torch.full((9,), 0.5, dtype=torch.float64)
    lowered = objective.tau(align.cleaner(objective, t, amount=0.2, u=u, clock="flow"))
    lowest = objective.tau(objective.t_of_tau(torch.zeros(1, dtype=torch.float64)))
    torch.testing.assert_close(lowered, (tau - 0.1).clamp(min=0).maximum(lowest), atol=2e-3, rtol=0)


def test_the_native_clock_moves_whole_steps_and_the_teacher_of_dit_stays_above_step_0() -> None:
    ddpm, vp = ImprovedDdpm(), VpDiscrete()
    steps = torch.tensor([0, 1, 150, 999])
    u = torch.tensor([0.0, 0.999, 0.5, 0.0], dtype=torch.float64)
    moved = ddpm.index(align.cleaner(ddpm, ddpm.time(steps), amount=0.2, u=u, clock="native"))
    assert moved.tolist() == [1, 1, 50, 999]
    assert vp.index(align.cleaner(vp, vp.time(steps), amount=0.2, u=u, clock="native")).tolist() == [
        0,
        0,
        50,
        999,
    ]


def test_sra_refuses_a_beta_without_effect() -> None:
    with pytest.raises(UserError, match=r"recipe\.beta=0\.1 has no effect with recipe\.distance=cosine"):
        sra(info("sit", "ti/2", 6), distance="cosine", beta=0.1)
