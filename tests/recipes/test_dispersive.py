"""Dispersive Loss: published settings, and the batch on which the loss is computed."""

from __future__ import annotations

import dataclasses
from typing import cast

import pytest
import torch

from stbench.core.errors import UserError
from stbench.diffusion import LinearFlow
from stbench.models import align
from stbench.recipes.dispersive import Dispersive, dispersive
from tests.steps import BATCH, info, network, only, step_of, value


def test_dispersive_settings_and_their_options() -> None:
    where = info("sit", "b/2", 12)
    assert only(dispersive(where)) == Dispersive(2, 0.5, 0.5, "local", 16)
    assert only(dispersive(where, setting="pytorch")) == Dispersive(11, 0.25, 1.0, "local", 32)
    changed = only(dispersive(where, block=4, weight=0.1, local_batch=8))
    assert changed == Dispersive(4, 0.1, 0.5, "local", 8)


def test_dispersive_scopes_are_the_local_and_the_global_batch() -> None:
    net = network()
    supervision = cast(Dispersive, only(dispersive(net.info, local_batch=4)))
    step = step_of(supervision, net, LinearFlow())
    z = step.features[supervision.block]
    halves = torch.stack([align.dispersive(z[:4], 0.5), align.dispersive(z[4:], 0.5)])
    torch.testing.assert_close(value(supervision, step), halves.repeat_interleave(4))
    gathered = dataclasses.replace(supervision, scope="gathered")
    torch.testing.assert_close(value(gathered, step), align.dispersive(z, 0.5).expand(BATCH))
    with pytest.raises(UserError, match=r"needs all 16 images of a step at once, found 8"):
        gathered.terms(dataclasses.replace(step, global_batch=16))


def test_dispersive_refuses_a_local_batch_without_effect() -> None:
    with pytest.raises(UserError, match=r"recipe\.local_batch has no effect with recipe\.scope=gathered"):
        dispersive(info("sit", "ti/2", 6), scope="gathered", local_batch=8)
