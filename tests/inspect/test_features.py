"""Features of all blocks: fixed noise, neutral labels, and reductions of tokens."""

from __future__ import annotations

import pytest
import torch

from stbench.config.build import build_objective
from stbench.inspect.features import (
    ImageSet,
    all_blocks,
    block_tokens,
    branches,
    reduce_tokens,
    spread,
    unlabelled,
)
from tests.networks import tiny


def images(count: int = 70) -> ImageSet:
    latents = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return ImageSet(latents, torch.arange(count) % 10, "heldout", torch.arange(count))


def test_the_noise_of_an_image_does_not_depend_on_the_others() -> None:
    every = images()
    some = every.take(torch.tensor([3, 50]))
    assert torch.equal(some.noise, every.noise[[3, 50]])
    assert not torch.equal(every.noise[0], every.noise[1])


def test_positions_are_evenly_spaced_and_within_range() -> None:
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert spread(3, 9).tolist() == [0, 1, 2]


def test_reduced_tokens_are_mean_covariance_and_norm() -> None:
    tokens = torch.randn(7, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 2.0
    found = reduce_tokens(tokens.split(2))
    flat = tokens.flatten(0, 1)
    torch.testing.assert_close(found.pooled, tokens.mean(1))
    torch.testing.assert_close(found.covariance, torch.cov(flat.T, correction=0))
    assert found.norm == pytest.approx(float(flat.norm(dim=1).mean()))


@pytest.mark.parametrize(
    ("family", "objective"), [("sit", "linear"), ("dit", "iddpm"), ("uvit", "vp-discrete")]
)
def test_every_block_of_every_family_is_reduced(family: str, objective: str) -> None:
    network, process = tiny(family), build_objective(objective)
    shown = images()
    labels = unlabelled(network.info, 70, torch.device("cpu"))
    assert labels.eq(10).all()  # the null label says nothing of the image
    found = all_blocks(network, process, shown, 0.5, labels)
    assert len(found) == network.info.depth
    # The batches of the reduction do not matter, and the time is flow-equivalent.
    one = block_tokens(network, process, shown, 0.5, labels, [1])[1]
    torch.testing.assert_close(found[1].pooled, one.double().mean(1), rtol=1e-4, atol=1e-4)
    noised = shown.at(process, 0.5)
    assert float(process.tau(noised.t_host)[0]) == pytest.approx(0.5, abs=2e-3)


def test_branches_have_the_true_and_the_null_label() -> None:
    network, process = tiny("sit"), build_objective("linear")
    shown = images(5)
    conditional, unconditional = branches(network, process, shown, 0.5, 2)
    for tokens, labels in ((conditional, shown.labels), (unconditional, torch.full((5,), 10))):
        expected = block_tokens(network, process, shown, 0.5, labels, [2])[2]
        torch.testing.assert_close(tokens, expected.double())
    assert not torch.allclose(conditional, unconditional)
