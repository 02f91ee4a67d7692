"""TREAD: kept tokens, terms of other recipes inside a route, cost, guides, identity and refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from stbench.config.plan import prepare
from stbench.config.resolve import RunRequest, resolve
from stbench.core.errors import UserError
from stbench.core.guides import RouteGuide
from stbench.core.recipe import Step, Supervision
from stbench.core.rng import Rng
from stbench.diffusion import LinearFlow
from stbench.models import align
from stbench.recipes.repa import Repa
from stbench.recipes.sra import Sra
from stbench.recipes.tread import Tread, require_fit, tread
from stbench.train.blocks import teachers
from stbench.train.cost import expected_cost
from stbench.train.memory import stored_networks
from tests.steps import BATCH, info, network, only, step_of, value


def prepared(**overrides: Any) -> Any:
    options = {f"recipe.{name.replace('__', '.')}": value for name, value in overrides.items()}
    return prepare(resolve(RunRequest("sit", "tread", steps=10, overrides=options)))


@pytest.mark.parametrize(
    ("where", "route"),
    [
        (info("sit", "b/2", 12), (2, 8, 0.5)),
        (info("dit", "xl/2", 28), (6, 20, 0.5)),
        (info("sit", "ti/2", 6), (1, 3, 0.5)),
        (info("uvit", "l/2", 21), (4, 16, 0.5)),
        (info("sit", "one", 1), (0, 0, 0.5)),
    ],
)
def test_the_published_route_scales_with_the_depth(where: Any, route: tuple[int, int, float]) -> None:
    assert only(tread(replace(where, capabilities=("route",)))).routes == (route,)


def test_each_sample_and_each_route_keeps_other_tokens() -> None:
    net = network()
    supervision = cast(Tread, only(tread(net.info, route=[[3, 4, 0.7], [0, 1, 0.25]])))
    assert supervision.routes == ((0, 1, 0.25), (3, 4, 0.7))
    step = step_of(supervision, net, LinearFlow())
    first, second = supervision.inputs(step.batch, step.noised)["routes"]
    assert (first.start, first.end, first.kept.shape) == (0, 1, (BATCH, 12))
    assert (second.start, second.end, second.kept.shape) == (3, 4, (BATCH, 5))
    for kept in (first.kept, second.kept):
        assert all(len(set(row)) == len(row) for row in kept.tolist())
        assert len({tuple(sorted(row)) for row in kept.tolist()}) > 1
    assert not torch.equal(first.kept[:, :5], second.kept)


def test_half_a_batch_keeps_the_same_tokens() -> None:
    supervision = cast(Tread, only(tread(network().info)))
    whole, part = Rng(0, 0, BATCH), Rng(0, 0, BATCH, 4, 8)
    drawn = [rng.normal("tread-0", (16,)) for rng in (whole, part)]
    (all_rows,), (rows,) = (supervision.routes_of([d], torch.device("cpu")) for d in drawn)
    assert torch.equal(all_rows.kept[4:8], rows.kept)


def routed(on: str, **options: Any) -> tuple[Tread, Step]:
    net = network()
    supervision = cast(Tread, tread(net.info, on=on, on_options=options)[-1].supervision({}))
    step = step_of(supervision, net, LinearFlow())
    assert step.kept
    return supervision, step


def gathered(tokens: Tensor, kept: Tensor) -> Tensor:
    return torch.stack([row[indices] for row, indices in zip(tokens, kept, strict=True)])


def test_sra_inside_a_route_compares_the_kept_tokens() -> None:
    supervision, step = routed("sra")
    inner, kept = cast(Sra, supervision.inner), step.kept[1]
    assert step.features[1].shape == (BATCH, 8, 96)
    t = inner.teacher_time(step.objective, step.noised.t_host, step.batch.rng.uniform("sra"))
    cleaner = step.objective.at(step.noised.x0, step.noised.noise, t)
    target = step.ema.features(cleaner.x_t, cleaner.t, step.batch.y, indices=(inner.teacher_block,))
    expected = align.smooth_l1(
        step.heads["head"](step.features[1]), gathered(target[inner.teacher_block], kept), 0.05
    )
    torch.testing.assert_close(value(supervision, step), expected)


def test_repa_inside_a_route_compares_the_kept_tokens() -> None:
    supervision, step = routed("repa")
    inner = cast(Repa, supervision.inner)
    (target,) = inner.targets(step)
    projected = step.heads["0"](step.features[inner.block])
    expected = -align.cosine(projected, gathered(target, step.kept[inner.block]))
    torch.testing.assert_close(value(supervision, step), expected)
    assert supervision.images and supervision.needs == "encoder digits"


@pytest.mark.parametrize(("weak", "strong"), [(1, 3), (1, 5), (0, 2)])
def test_layersync_compares_the_tokens_that_both_blocks_have(weak: int, strong: int) -> None:
    supervision, step = routed("layersync", pairs=[[weak, strong]])
    kept = next(iter(step.kept.values()))
    a, b = (
        tokens if block in step.kept else gathered(tokens, kept)
        for block, tokens in ((weak, step.features[weak]), (strong, step.features[strong]))
    )
    torch.testing.assert_close(value(supervision, step), -align.cosine(a, b))


def test_only_the_last_stage_is_routed_and_its_teacher_is_that_of_the_other_recipe() -> None:
    alone = prepare(resolve(RunRequest("sit", "self-transcendence", steps=10)))
    stages = prepared(on="self-transcendence").stages
    assert [stage.name for stage in stages] == ["vae-align", "tread"]
    assert stages[0].fingerprint == alone.stages[0].fingerprint
    assert stages[1].fingerprint != alone.stages[1].fingerprint
    stages[1].supervision.setup(torch.device("meta"))
    assert len(teachers(stages[1].supervision)) == len(stored_networks(stages[1].supervision)) == 1


def test_flops_count_the_tokens_that_each_block_processes() -> None:
    net, run = network(), prepared()
    routes = only(tread(net.info)).routes_of([torch.rand(1, 16)], torch.device("cpu"))
    one = net.flops(routes=routes)
    d, n, kept, blocks = 96, 16, 8, 3

    def block(tokens: int) -> int:  # qkv, projection and MLP; two products of the attention
        return 2 * 12 * tokens * d * d + 2 * 2 * tokens * tokens * d

    assert net.flops() - one == blocks * (block(n) - block(kept))
    (stage,) = run.stages
    assert expected_cost(run, stage).student == pytest.approx(3.0 * one * stage.images)


def test_the_stage_names_the_guides_of_its_routes() -> None:
    where = network().info
    (stage,) = tread(where, guide_rates=(0.2, 0.6))
    assert stage.guides == {"route": RouteGuide(1, 3, 0.2, 0.6, scale=1.5)}
    (stage,) = tread(where, route=[[0, 1, 0.5], [3, 4, 0.5]], guide_labels="released")
    assert stage.guides == {
        "route0": RouteGuide(0, 1, scale=1.5, null_labels=True),
        "route1": RouteGuide(3, 4, scale=1.5, null_labels=True),
    }


def test_hashes_contain_every_option_of_the_other_recipe() -> None:
    plain, same, other = (
        prepared(on="sra", **o) for o in ({}, {"on_options__weight": 0.2}, {"on_options__weight": 0.3})
    )
    assert plain.hashes.train == same.hashes.train != other.hashes.train
    assert plain.stages[0].fingerprint == same.stages[0].fingerprint != other.stages[0].fingerprint
    assert other.spec.recipe.options["on_options"] == {"weight": 0.3}
    on_repa = prepared(on="repa").stages[0].supervision.options
    assert "weight" in on_repa and "structure" not in on_repa  # which an earlier version lacked


@dataclass
class _AsksForAttention(Supervision):
    def inputs(self, batch: Any, noised: Any) -> dict[str, Any]:
        return {"attention": (0,)}

    def terms(self, step: Step) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on": "tread"}, r"recipe\.on must be another recipe"),
        ({"on": "nothing"}, "unknown recipe 'nothing'"),
        ({"on": "sra", "on_options__wight": 1}, r"unknown option 'recipe\.on_options\.wight'"),
        ({"on": "sra", "on_options__weight": "x"}, r"invalid value for 'recipe\.on_options\.weight'"),
        ({"on": "sra", "on_options__student_block": 9}, r"recipe\.on_options\.student_block=9 is out of"),
        ({"on": "dispersive", "on_options__block": 2}, "needs all tokens of block 2"),
        (
            {"on": "layersync", "route": [[0, 1, 0.5], [3, 4, 0.5]], "on_options__pairs": [[1, 3]]},
            "different routes",
        ),
        ({"route": [[0, 1, 0.5], [1, 4, 0.5]]}, "share a block, got block 1 in two"),
        ({"route": [3, 1, 0.5]}, "start <= end, got 3 and 1"),
        ({"route": [1, 9, 0.5]}, r"recipe\.route=9 is out of range"),
        ({"route": [1, 3, 1.0]}, r"invalid value for 'recipe\.route'"),
        ({"route": []}, r"invalid value for 'recipe\.route'"),
    ],
)  # fmt: skip
def test_routes_that_mean_nothing_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        prepared(**options)
    assert "\n" not in str(caught.value)


def test_a_recipe_that_changes_the_attention_is_refused() -> None:
    with pytest.raises(UserError, match="changes the attention"):
        require_fit("other", _AsksForAttention(), [(1, 3, 0.5)])


def test_a_route_of_uvit_is_symmetric() -> None:
    spec = resolve(RunRequest("uvit", "tread", steps=10, overrides={"recipe.route": [1, 3, 0.5]}))
    run = prepare(spec)
    with pytest.raises(UserError, match=r"use 1\.\.5"):
        expected_cost(run, run.stages[0])
