"""Random numbers keyed by seed, stream and images seen."""

from __future__ import annotations

import pytest
import torch

from stbench.core.rng import Rng, generator, key


def test_key_is_the_same_on_every_platform() -> None:
    assert key(0, "noise") == 8369501531652801859
    assert key(7, "t", 64) == 5985256808233611210


@pytest.mark.parametrize("other", [(1, "t", 64), (0, "noise", 64), (0, "t", 65)])
def test_seed_stream_and_position_all_change_the_numbers(other: tuple[int, str, int]) -> None:
    reference = torch.rand(4, generator=generator(0, "t", 64))
    assert torch.equal(reference, torch.rand(4, generator=generator(0, "t", 64)))
    assert not torch.equal(reference, torch.rand(4, generator=generator(*other)))


def test_ranks_see_slices_of_the_global_batch() -> None:
    whole = Rng(seed=3, images_seen=128, global_batch=6)
    for start, stop in ((0, 2), (2, 6), (4, None)):
        part = Rng(seed=3, images_seen=128, global_batch=6, start=start, stop=stop)
        assert torch.equal(part.normal("noise", (2, 3)), whole.normal("noise", (2, 3))[start:stop])
        assert torch.equal(part.uniform("t"), whole.uniform("t")[start:stop])
        assert torch.equal(part.integers("t", 1000), whole.integers("t", 1000)[start:stop])


def test_repeated_draws_from_a_stream_are_equal() -> None:
    rng = Rng(seed=0, images_seen=0, global_batch=5)
    first = rng.uniform("t")
    rng.normal("noise", (3,))
    assert torch.equal(rng.uniform("t"), first)


def test_types_and_ranges() -> None:
    rng = Rng(seed=0, images_seen=0, global_batch=1000)
    normal, uniform, integers = rng.normal("a", (2,)), rng.uniform("b"), rng.integers("c", 10)
    assert (normal.dtype, uniform.dtype, integers.dtype) == (torch.float32, torch.float64, torch.int64)
    assert normal.shape == (1000, 2)
    assert uniform.min() >= 0.0 and uniform.max() < 1.0
    assert sorted(integers.unique().tolist()) == list(range(10))


def test_draws_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    Rng(seed=0, images_seen=0, global_batch=4).normal("noise", (2,))
    assert torch.equal(torch.get_rng_state(), before)
