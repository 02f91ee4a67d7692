"""Capabilities of the built-in backbones: attention logits and masks, routes, times per token, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from stbench.core.backbone import Backbone, Route
from stbench.core.errors import UserError
from stbench.core.registry import load_builtins
from tests.networks import batch, tiny

load_builtins()
FAMILIES = ("dit", "sit", "uvit")
ADALN = ("dit", "sit")
TOKENS, DEPTH = 16, {"dit": 6, "sit": 6, "uvit": 7}


def entering(net: Backbone, block: int, **inputs: Any) -> Tensor:
    """What a block receives in a forward pass."""
    found: list[Tensor] = []
    hook = net.repeated_blocks()[block].register_forward_pre_hook(lambda _, given: found.append(given[0]))
    net.run(*batch(), **inputs)
    hook.remove()
    return found[0]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("family", ADALN)
def test_the_softmax_of_the_logits_reproduces_the_attention(family: str, qk_norm: bool) -> None:
    net = tiny(family, qk_norm=qk_norm)
    attention = net.blocks[2].attn
    seen: list[tuple[Tensor, Tensor]] = []
    hook = attention.register_forward_hook(lambda _, given, output: seen.append((given[0], output[0])))
    logits = net.run(*batch(), attention=(2,)).attention[2]
    hook.remove()
    ((tokens, output),) = seen
    v = attention.qkv(tokens)[..., 2 * 96 :].reshape(3, TOKENS, 3, 32).transpose(1, 2)
    attended = (logits.softmax(-1) @ v).transpose(1, 2).reshape(3, TOKENS, 96)
    torch.testing.assert_close(attention.proj(attended), output)


def test_the_logits_of_uvit_are_those_between_image_tokens() -> None:
    net = tiny("uvit")
    attention = net.in_blocks[1].attn
    seen: list[tuple[Tensor, Tensor]] = []
    hook = attention.register_forward_hook(lambda _, given, output: seen.append((given[0], output[1])))
    logits = net.run(*batch(), attention=(1,)).attention[1]
    hook.remove()
    ((tokens, whole),) = seen
    q, k = attention.qkv(tokens)[..., : 2 * 96].reshape(3, 18, 2, 3, 32).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(whole, q @ k.mT / 32**0.5)
    assert torch.equal(logits, whole[:, :, 2:, 2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_blocks_that_do_not_run_are_not_returned(family: str) -> None:
    found = tiny(family).run(*batch(), indices=(1,), stop_early=True, attention=(0, 3))
    assert list(found.attention) == [0]


@pytest.mark.parametrize("family", ADALN)
def test_groups_that_are_separated_in_every_block_do_not_see_each_other(family: str) -> None:
    net, (x, t, y) = tiny(family), batch()
    own = (torch.arange(TOKENS) < 8)[None].expand(3, -1)
    mask = own[:, :, None] == own[:, None, :]
    other = x.clone()
    other[:, :, 4:] = torch.randn(3, 4, 4, 8)  # the patches of the second group
    first, second = (net.run(given, t, y, mask=mask).prediction for given in (x, other))
    assert first is not None and second is not None
    assert torch.equal(first[:, :, :4], second[:, :, :4])
    assert not torch.allclose(first[:, :, 4:], second[:, :, 4:])
    unmasked = net(x, t, y)
    assert not torch.allclose(first[:, :, :4], unmasked[:, :, :4])


def test_prefix_tokens_of_uvit_are_in_every_group() -> None:
    net, (x, t, y) = tiny("uvit"), batch()
    alone = torch.eye(TOKENS, dtype=torch.bool).expand(3, -1, -1)
    block = net.in_blocks[0]
    masks: list[Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, given: masks.append(given[2]))
    net.run(x, t, y, mask=alone)
    hook.remove()
    assert masks[0][:, :2].all() and masks[0][:, :, :2].all()
    assert torch.equal(masks[0][:, 2:, 2:], alone)


@pytest.mark.parametrize(("family", "start", "end"), [("dit", 1, 3), ("sit", 2, 2), ("uvit", 1, 5)])
def test_dropped_tokens_have_their_value_from_before_the_route_after_it(
    family: str, start: int, end: int
) -> None:
    net = tiny(family)
    kept = torch.stack([torch.randperm(TOKENS)[:5] for _ in range(3)])
    routes = [Route(start, end, kept)]
    before, after = entering(net, start), entering(net, end + 1, routes=routes)
    prefix = before.shape[1] - TOKENS
    for row, places in enumerate(kept):
        dropped = [prefix + k for k in range(TOKENS) if k not in places.tolist()]
        assert torch.equal(after[row, dropped], before[row, dropped])
        assert not torch.isclose(after[row, prefix + places], before[row, prefix + places]).all()
    inside = net.run(*batch(), indices=(0, start, end, end + 1), routes=routes)
    shapes = {k: v.shape[1] for k, v in inside.features.items()}
    assert shapes == {0: TOKENS, start: 5, end: 5, end + 1: TOKENS}
    assert inside.kept.keys() == {start, end}
    torch.testing.assert_close(
        inside.features[end], after[:, prefix:].gather(1, kept[..., None].expand(-1, -1, 96))
    )


@pytest.mark.parametrize("family", ADALN)
def test_the_modulation_of_kept_tokens_is_theirs_with_a_time_per_token(family: str) -> None:
    net, (x, _, y) = tiny(family), batch()
    t = torch.rand(3, TOKENS, dtype=torch.float64)
    order = torch.stack([torch.randperm(TOKENS) for _ in range(3)])
    whole = net.run(x, t, y).prediction
    assert whole is not None
    routed = net.run(x, t, y, routes=[Route(1, 3, order)]).prediction
    torch.testing.assert_close(routed, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ADALN)
def test_a_token_is_modulated_by_its_own_time(family: str) -> None:
    net, (x, t, y) = tiny(family), batch()
    t = t[:, None].repeat(1, TOKENS)
    t[:, 8:] = 0.25
    found, block = net.run(x, t, y, indices=(0,)), net.blocks[0]
    condition = net.t_embedder(net.time_scale * t.float()) + net.y_embedder(y)[:, None]
    assert found.condition is not None
    torch.testing.assert_close(found.condition, condition)
    vectors = block.adaLN_modulation(condition).chunk(6, -1)
    h = net.embed(x)
    h = h + vectors[2] * block.attn(block.norm1(h) * (1 + vectors[1]) + vectors[0])[0]
    h = h + vectors[5] * block.mlp(block.norm2(h) * (1 + vectors[4]) + vectors[3])
    torch.testing.assert_close(found.features[0], h, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_of_optional_inputs(family: str) -> None:
    net = tiny(family)
    square = 2 * (TOKENS + (2 if family == "uvit" else 0)) ** 2 * 96
    assert net.flops(attention=(0, 2)) - net.flops() == 2 * square
    assert net.flops(mask=torch.ones(1, TOKENS, TOKENS, dtype=torch.bool)) == net.flops()
    last = DEPTH[family] - 1
    costs = [net.flops(routes=[Route(1, last - 1, torch.zeros(1, n).long())]) for n in (4, 8, 16)]
    assert costs == sorted(set(costs)) and costs[-1] == net.flops()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bounds", [[(3, 1)], [(1, 9)], [(1, 3), (2, 4)], [(3, 4), (0, 1)]])
def test_routes_that_overlap_or_do_not_exist_are_refused(family: str, bounds: list[tuple[int, int]]) -> None:
    kept = torch.zeros(3, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="routes must be disjoint, in order and within blocks 0"):
        tiny(family).run(*batch(), routes=[Route(*ends, kept) for ends in bounds])


@pytest.mark.parametrize("ends", [(0, 5), (2, 5), (1, 1)])
def test_a_route_of_uvit_must_contain_both_ends_of_a_skip_connection(ends: tuple[int, int]) -> None:
    route = Route(*ends, torch.zeros(3, 4, dtype=torch.long))
    suggested = f"use {ends[0]}..{6 - ends[0]}"
    with pytest.raises(UserError, match=f"must contain both ends of each long skip.*{suggested}"):
        tiny("uvit").run(*batch(), routes=[route])


def test_what_uvit_lacks_is_refused_with_the_reason() -> None:
    info = tiny("uvit").info
    info.require("attention", "this test")
    info.require("route", "this test")
    with pytest.raises(
        UserError, match=r"this test needs .* 'token-time', which uvit lacks \(it has one time"
    ):
        info.require("token-time", "this test")
