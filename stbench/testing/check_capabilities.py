"""The part of `check_backbone` for capabilities: times per token, attention, routes and prefix tokens.

A backbone is checked for the capabilities that its `info` names, and for nothing else.
"""

from __future__ import annotations

import copy
import typing

import torch
from torch import Tensor, nn

from stbench.core.backbone import Backbone, Capability, Output, Route, attach_heads
from stbench.core.rng import generator
from stbench.testing.require import Inputs, close, require

SAMPLES = 8


def check_capabilities(net: Backbone, inputs: Inputs) -> None:
    """Check the capabilities of a network in eval mode on x_t (B,C,H,W), t (B,) and labels (B,).

    Patches must be embedded one by one: no value of a patch may reach another token before the first block.
    Raises AssertionError for the first violation.
    """
    known, named = typing.get_args(Capability), net.info.capabilities
    unknown = sorted(set(named) - set(known))
    require(not unknown, f"info.capabilities has {', '.join(unknown)}; expected some of {', '.join(known)}")
    both = sorted(set(named) & set(net.info.lacks))
    require(not both, f"info.lacks gives a reason for {', '.join(both)}, which info.capabilities has")
    x, t, y = (part[:SAMPLES] for part in inputs)
    checks = {
        "token-time": _check_token_time,
        "attention": _check_attention,
        "route": _check_routes,
        "prefix": _check_prefix,
    }
    for name in named:
        checks[name](net, (x, t, y))


def _run(net: Backbone, inputs: Inputs, **options: typing.Any) -> Output:
    """Run with features of all blocks."""
    return net.run(*inputs, indices=range(net.info.depth), **options)


def _equal(a: Output, b: Output) -> bool:
    """Whether predictions and features agree."""
    assert a.prediction is not None and b.prediction is not None
    same = a.features.keys() == b.features.keys() and close(a.prediction, b.prediction)
    return same and all(close(a.features[k], b.features[k]) for k in a.features)


def _with_other_patch(x: Tensor, token: int, patch: int) -> Tensor:
    """A copy of latents x (B,C,H,W) in which the patch of one token has other values."""
    row, column = (patch * place for place in divmod(token, x.shape[-1] // patch))
    changed = x.clone()
    changed[:, :, row : row + patch, column : column + patch] += 1.0
    return changed


def _check_token_time(net: Backbone, inputs: Inputs) -> None:
    x, t, y = inputs
    per_token = t[:, None].expand(-1, net.info.tokens).clone()
    expected, found = _run(net, inputs), _run(net, (x, per_token, y))
    require(_equal(found, expected), "equal times of all tokens differ from one time per sample")
    if found.condition is not None:
        shape = (SAMPLES, net.info.tokens, net.info.width)
        actual = tuple(found.condition.shape)
        require(actual == shape, f"the condition for a time per token is {actual}, expected {shape}")
    per_token[:, -1] = 1.0 - per_token[:, -1]
    changed = _run(net, (x, per_token, y))
    require(not _equal(changed, expected), "the time of the last token has no effect")
    costs = net.flops(), net.flops(token_times=True)
    require(costs[1] >= costs[0], "a time per token costs less than one time per sample")


def _check_attention(net: Backbone, inputs: Inputs) -> None:
    tokens, last = net.info.tokens, net.info.depth - 1
    expected, found = _run(net, inputs), _run(net, inputs, attention=(last,))
    require(_equal(found, expected), "asking for attention logits changes the prediction or the features")
    require(
        list(found.attention) == [last],
        f"asked for the logits of block {last}, got those of {sorted(found.attention)}",
    )
    shape = tuple(found.attention[last].shape)
    wanted = shape[:1] == (SAMPLES,) and shape[2:] == (tokens, tokens) and len(shape) == 4
    require(wanted, f"attention logits are {shape}, expected ({SAMPLES}, heads, {tokens}, {tokens})")
    require(not expected.attention, "attention logits are returned although nothing asks for them")
    require(net.flops(attention=(last,)) >= net.flops(), "attention logits make the forward pass cheaper")
    _check_mask(net, inputs, expected)


def _check_mask(net: Backbone, inputs: Inputs, expected: Output) -> None:
    tokens = net.info.tokens
    every = torch.ones(SAMPLES, tokens, tokens, dtype=torch.bool)
    require(_equal(_run(net, inputs, mask=every), expected), "a mask that is true everywhere has an effect")
    # No token but the last may attend to the last. Later blocks may see it through other tokens, such as a
    # time token, so only the first block is compared.
    mask = every.clone()
    mask[:, :-1, -1] = False
    masked = _run(net, inputs, mask=mask)
    require(not _equal(masked, expected), "the mask has no effect")
    x, t, y = inputs
    other = _run(net, (_with_other_patch(x, tokens - 1, net.info.patch), t, y), mask=mask)
    require(
        close(other.features[0][:, :-1], masked.features[0][:, :-1]),
        "a token that no other token may attend to reaches the others in the first block",
    )
    require(
        not close(other.features[0][:, -1], masked.features[0][:, -1]),
        "a token that no other token may attend to is lost",
    )


def _check_routes(net: Backbone, inputs: Inputs) -> None:
    """Check routes through all blocks, which every family with routes can take."""
    info, expected = net.info, _run(net, inputs)
    last = info.depth - 1
    everything = Route(0, last, torch.arange(info.tokens).expand(SAMPLES, -1))
    require(_equal(_run(net, inputs, routes=[everything]), expected), "a route of all tokens has an effect")
    require(not expected.kept, "kept tokens are returned although there is no route")
    # The kept tokens are the last ones, in another order in each sample
    draws = torch.rand(SAMPLES, info.tokens - info.tokens // 2, generator=generator(3, "conformance"))
    kept = info.tokens // 2 + draws.argsort(1)
    routes = [Route(0, last, kept)]
    found = _run(net, inputs, routes=routes)
    require(
        sorted(found.kept) == list(range(info.depth)) and all(map(kept.equal, found.kept.values())),
        "kept must hold the tokens of the route for each block inside it that is asked for",
    )
    shape, actual = (*kept.shape, info.width), tuple(found.features[last].shape)
    require(actual == shape, f"features inside a route are {actual}, expected {shape}")
    require(net.flops(routes=routes) < net.flops(), "dropping tokens saves nothing")
    _check_dropped(net, inputs, routes, found)


def _check_dropped(net: Backbone, inputs: Inputs, routes: list[Route], found: Output) -> None:
    """Check that the first token, which the routes drop, keeps its value, and that no token sees it."""
    (x, t, y), patch = inputs, net.info.patch
    changed = _run(net, (_with_other_patch(x, 0, patch), t, y), routes=routes)
    same = all(close(changed.features[k], found.features[k]) for k in found.features)
    require(same, "a dropped token has an effect on the tokens inside the route")
    assert found.prediction is not None and changed.prediction is not None
    # A convolution of the output layer may mix pixels of neighbouring patches.
    corner = (slice(None), slice(None), slice(0, patch), slice(0, patch))
    require(
        not close(changed.prediction[corner], found.prediction[corner]),
        "a dropped token does not have its value from before the route after it",
    )
    other = _run(net, (_with_other_patch(x, net.info.tokens - 1, patch), t, y), routes=routes)
    assert other.prediction is not None
    require(
        close(other.prediction[corner], found.prediction[corner]),
        "a kept token has an effect on a token that the route drops",
    )


def _check_prefix(net: Backbone, inputs: Inputs) -> None:
    """Check two prefix tokens, embedded by a head of a copy of the network."""
    width, expected, net = net.info.width, _run(net, inputs), copy.deepcopy(net)
    draws = generator(4, "conformance")
    embedding = nn.Linear(3, width)
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws))
    attach_heads(net, {"prefix": embedding})
    require(
        not expected.prefix and expected.prefix_out is None,
        "prefix tokens are returned although there are none",
    )
    prefix = torch.randn(SAMPLES, 2, 3, generator=draws)
    found = _run(net, inputs, prefix=prefix)
    shape = (SAMPLES, 2, width)
    tokens = {**found.prefix, net.info.depth: found.prefix_out}
    asked = list(range(net.info.depth))
    require(sorted(found.prefix) == asked, f"got prefix tokens of blocks {sorted(found.prefix)}, not {asked}")
    for value in tokens.values():
        actual = None if value is None else tuple(value.shape)
        require(actual == shape, f"prefix tokens are {actual}, expected {shape}")
    same = all(found.features[k].shape == expected.features[k].shape for k in expected.features)
    require(same, "features contain prefix tokens, expected image tokens only")
    require(not _equal(found, expected), "prefix tokens have no effect")
    require(net.flops(prefix=prefix) > net.flops(), "prefix tokens cost nothing")
