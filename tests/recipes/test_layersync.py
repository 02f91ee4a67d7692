"""LayerSync: pairs of blocks, their sum and the stopped gradient."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch

from stbench.core.errors import UserError
from stbench.diffusion import LinearFlow
from stbench.models import align
from stbench.recipes.layersync import LayerSync, layersync
from tests.steps import info, network, only, step_of, value


def test_layersync_default_is_the_published_pair() -> None:
    assert only(layersync(info("sit", "xl/2", 28))).pairs == ((7, 15),)
    assert only(layersync(info("sit", "ti/2", 6))).pairs == ((1, 2),)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([[2, 2]], "two different blocks"),
        ([], "at least one pair"),
        ([[1, 9]], r"has blocks 0\.\.5; try --set recipe\.pairs=\[\[0,5\]\]"),
    ],
)
def test_layersync_refuses_pairs_without_effect_or_out_of_range(pairs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        layersync(info("sit", "ti/2", 6), pairs=pairs)


def test_layersync_sums_pairs_and_stops_the_gradient_at_the_strong_block() -> None:
    net = network()
    supervision = cast(LayerSync, only(layersync(net.info, pairs=[(0, 2), (1, 4)])))
    step = step_of(supervision, net, LinearFlow())
    leaves = {k: v.detach().requires_grad_() for k, v in step.features.items()}
    step = dataclasses.replace(step, features=leaves)
    total = value(supervision, step)
    parts = [-align.cosine(leaves[a], leaves[b]) for a, b in ((0, 2), (1, 4))]
    torch.testing.assert_close(total, parts[0] + parts[1])
    torch.testing.assert_close(value(dataclasses.replace(supervision, several="released"), step), parts[1])
    total.sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert leaves[2].grad is None and leaves[4].grad is None
