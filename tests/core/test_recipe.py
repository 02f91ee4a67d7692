"""Steps that count FLOPs, artifacts that load frozen networks, and computed defaults of recipe options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.core.errors import UserError
from stbench.core.recipe import (
    Artifact,
    Cost,
    NoSupervision,
    OptionContext,
    Stage,
    Step,
    computed,
    computed_defaults,
    effective_options,
)
from stbench.diffusion import LinearFlow
from tests.steps import BATCH, info, network, step_of


@pytest.fixture(scope="module")
def net() -> Backbone:
    return network()


@pytest.fixture()
def step(net: Backbone) -> Step:
    return step_of(NoSupervision(), net, LinearFlow())


def test_total_cost_is_the_sum_of_its_parts() -> None:
    assert Cost(student=3.0, heads=2.0, teachers=1.0).total == 6.0


def test_project_counts_a_forward_and_a_backward_pass(step: Step) -> None:
    step.heads["head"] = nn.Linear(96, 5)
    tokens = torch.randn(BATCH, 16, 96)
    assert torch.equal(step.project("head", tokens), step.heads["head"](tokens))
    assert step.cost == Cost(heads=3.0 * BATCH * 16 * 2 * 96 * 5)


def test_teach_counts_a_forward_pass_up_to_the_block(step: Step, net: Backbone) -> None:
    noised = step.noised
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = step.teach(net, noised.x_t, noised.t, step.batch.y, block=2)
    assert torch.equal(tokens, net.features(noised.x_t, noised.t, step.batch.y, indices=(2,))[2])
    assert tokens.dtype == torch.float32 and not tokens.requires_grad
    assert step.cost == Cost(teachers=float(BATCH * net.flops(2)))


def test_teach_does_not_run_on_an_empty_selection(step: Step, net: Backbone) -> None:
    none = slice(0, 0)
    tokens = step.teach(net, step.noised.x_t[none], step.noised.t[none], step.batch.y[none], block=2)
    assert tokens.shape == (0, net.info.tokens, net.info.width)
    assert step.cost == Cost()


def test_encode_counts_a_forward_pass_per_image(step: Step) -> None:
    @dataclass
    class Means:
        flops: float = 7.0

        def tokens(self, images: Tensor) -> Tensor:
            return images.double().mean((1, 2, 3))[:, None, None]

    images = torch.randint(256, (BATCH, 1, 8, 8), dtype=torch.uint8)
    tokens = step.encode(Means(), images)
    assert tokens.dtype == torch.float32 and tokens.shape == (BATCH, 1, 1)
    assert step.cost == Cost(teachers=7.0 * BATCH)


def test_an_artifact_loads_a_frozen_network_in_eval_mode() -> None:
    class Tiny(Backbone):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward_intermediates(
            self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
        ) -> tuple[Tensor | None, Features]:
            return x * self.weight, {}

    loaded: list[str] = []

    def load(weights: str) -> Backbone:
        loaded.append(weights)
        return Tiny()

    artifact = Artifact("first", "", "", {}, steps=1, images_seen=1, seconds=0.0, flops=0.0, loader=load)
    teacher = artifact.load("ema")
    assert loaded == ["ema"]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def half(c: OptionContext) -> int:
    return c.info.depth // 2


@computed_defaults
def recipe(
    info: BackboneInfo,
    *,
    wide: bool = False,
    block: int = computed(half),
    hidden: int = computed(lambda c: 64 if c.options["wide"] else c.options["block"]),
    warmup: int | None = computed(lambda c: None if c.steps is None else c.steps // 10),
) -> Sequence[Stage]:
    """A recipe whose defaults depend on the backbone, the steps and other options."""
    return [Stage(f"{block}-{hidden}-{warmup}", lambda earlier: NoSupervision())]


@pytest.mark.parametrize(
    ("options", "steps", "expected"),
    [
        ({}, None, {"wide": False, "block": 3, "hidden": 3, "warmup": None}),
        ({}, 50, {"wide": False, "block": 3, "hidden": 3, "warmup": 5}),
        ({"block": 1}, None, {"wide": False, "block": 1, "hidden": 1, "warmup": None}),
        ({"wide": True}, None, {"wide": True, "block": 3, "hidden": 64, "warmup": None}),
    ],
)
def test_computed_defaults(options: dict[str, int], steps: int | None, expected: dict[str, object]) -> None:
    where = info("sit", "ti/2", 6)
    assert effective_options(recipe, where, options, steps=steps) == expected


def test_a_direct_call_fills_in_computed_defaults() -> None:
    (stage,) = recipe(info("sit", "ti/2", 6), block=1)
    assert stage.name == "1-1-None"


def test_the_length_of_an_earlier_stage() -> None:
    def build(earlier: object) -> NoSupervision:
        return NoSupervision()

    assert Stage("first", build, length=0.5).length_at(401) == 200
    assert Stage("first", build, length=0.5, steps=7).length_at(401) == 7


def test_a_block_out_of_range_names_the_option() -> None:
    assert info("sit", "ti/2", 6).block("recipe.block", 5) == 5
    with pytest.raises(UserError, match=r"recipe\.block=6 is out of range: sit-ti/2 has blocks 0\.\.5; try"):
        info("sit", "ti/2", 6).block("recipe.block", 6)
