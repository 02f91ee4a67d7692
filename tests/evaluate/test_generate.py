"""Image generation, evaluation noise, the held-out loss and image grids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from threading import get_ident

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from stbench.config.build import build_backbone, build_objective
from stbench.config.resolve import RunRequest, resolve
from stbench.core.backbone import Backbone, BackboneInfo, Features
from stbench.core.errors import UserError
from stbench.data.dataset import Dataset
from stbench.diffusion import LinearFlow
from stbench.diffusion.sample import Guidance
from stbench.evaluate.generate import (
    block_noise,
    draw_labels,
    generate,
    image_noise,
    part_ranges,
    save_grid,
    validation_loss,
)


class Linear(Backbone):
    """Predicts a fixed linear map of x, y and t, and records the times."""

    def __init__(self) -> None:
        super().__init__()
        self.info = BackboneInfo("linear", "custom", 1, 1, 16, 2, 4, 8, 10)
        self.times: list[Tensor] = []

    def forward_intermediates(
        self, x: Tensor, t: Tensor, y: Tensor, *, indices: Sequence[int] = (), stop_early: bool = False
    ) -> tuple[Tensor | None, Features]:
        self.times.append(t)
        return (0.5 * x + 0.1 * y.view(-1, 1, 1, 1) * t.float().view(-1, 1, 1, 1)), {}


class Zero(Linear):
    """Predicts zero."""

    def forward_intermediates(self, x: Tensor, *args: Tensor, **options: object) -> tuple[Tensor, Features]:  # type: ignore[override]
        return torch.zeros_like(x), {}


def draw(digits: Dataset, n: int = 60, **changes: object) -> tuple[Tensor, Tensor]:
    options = {
        "labels": "balanced",
        "seed": 0,
        "sampler": "euler",
        "steps": 2,
        "guidance": Guidance(),
    } | changes
    return generate(Linear(), LinearFlow(), digits, n=n, device="cpu", **options)[:2]  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["euler", "euler-maruyama"])
def test_generation_repeats_and_leaves_the_global_random_state_unchanged(
    sampler: str, digits: Dataset
) -> None:
    before = torch.get_rng_state()
    first, labels = draw(digits, sampler=sampler)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again, _ = draw(digits, sampler=sampler)
    assert (first.dtype, first.shape, labels.shape) == (torch.uint8, (60, 1, 32, 32), (60,))
    assert torch.equal(first, again)
    assert not torch.equal(first, draw(digits, sampler=sampler, seed=1)[0])


@pytest.mark.parametrize("sampler", ["euler", "euler-maruyama"])
def test_batch_and_number_of_images_do_not_change_an_image(sampler: str, digits: Dataset) -> None:
    images, _ = draw(digits, 110, sampler=sampler)
    parts, _ = draw(digits, 110, sampler=sampler, batch=50)
    fewer, _ = draw(digits, 70, sampler=sampler)
    assert (images.int() - parts.int()).abs().max() <= 1
    assert (images[:70].int() - fewer.int()).abs().max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_threads_do_not_change_an_image_or_a_loss(
    guidance: float, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = build_objective("linear")
    network = build_backbone(resolve(RunRequest("sit", "vanilla")).backbone, "linear", digits, seed=3).eval()
    nn.init.normal_(network.final_layer.linear.weight, std=0.1)  # type: ignore[union-attr, arg-type]

    def measure() -> tuple[Tensor, list[float], int]:
        seen: set[int] = set()
        hook = network.register_forward_hook(lambda *_: seen.add(get_ident()))
        images = generate(
            network,
            objective,
            digits,
            n=110,
            labels="balanced",
            seed=0,
            sampler="euler-maruyama",
            steps=2,
            guidance=Guidance(guidance),
            device="cpu",
        )[0]
        losses = validation_loss(network, objective, digits, seed=0, device="cpu")
        hook.remove()
        return images, losses, len(seen)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        images, losses, threads = measure()
        monkeypatch.setattr("stbench.evaluate.generate._is_divisible", lambda *_: False)
        whole, expected, alone = measure()
    finally:
        torch.set_num_threads(before)
    assert threads > alone == 1
    assert (images.int() - whole.int()).abs().max() <= 1 and len(images.unique()) > 50
    assert losses == pytest.approx(expected, rel=1e-6)


def test_a_plug_in_sees_whole_batches_in_one_thread(digits: Dataset) -> None:
    network = Linear()  # keeps a list between calls
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        generate(
            network,
            LinearFlow(),
            digits,
            n=110,
            labels="balanced",
            seed=0,
            sampler="euler",
            steps=2,
            guidance=Guidance(),
            device="cpu",
        )
    finally:
        torch.set_num_threads(before)
    assert [len(t) for t in network.times] == [110, 110]


def test_parts_cover_all_images_and_none_is_small() -> None:
    for count in (1, 10, 50, 60, 74, 75, 110, 297, 1000):
        parts = part_ranges(range(count))
        assert [i for part in parts for i in part] == list(range(count))
        assert all(part.start % 50 == 0 for part in parts)
        assert len(parts) == 1 or min(map(len, parts)) >= 25


def test_noise_differs_between_images_and_between_steps(digits: Dataset) -> None:
    images, _ = draw(digits, 100)
    assert len(images.flatten(1).unique(dim=0)) == 100
    assert not torch.equal(images, draw(digits, 100, sampler="euler-maruyama")[0])


def test_guidance_reaches_the_sampler(digits: Dataset) -> None:
    assert not torch.equal(draw(digits)[0], draw(digits, guidance=Guidance(2.0))[0])


def test_every_draw_of_a_sampler_and_the_initial_noise_are_independent() -> None:
    images = {"start": 50, "stop": 110, "shape": (4, 8, 8)}
    streams = ("evaluation-step-0", "evaluation-step-1", "evaluation")
    first, again = (torch.stack([block_noise(0, name, **images) for name in streams]) for _ in range(2))
    draws = first.flatten(1)
    assert torch.equal(first, again)
    assert (torch.corrcoef(draws) - torch.eye(3)).abs().max() < 0.05


def test_evaluation_noise_is_that_of_the_published_numbers() -> None:
    """Other noise would be another protocol under the same hash."""
    shape = (4, 8, 8)
    initial = block_noise(0, "evaluation", start=0, stop=100, shape=shape)
    step = block_noise(0, "evaluation-step-3", start=50, stop=100, shape=shape)
    hashes = [hashlib.sha256(noise.numpy().tobytes()).hexdigest()[:16] for noise in (initial, step)]
    assert hashes == ["c137e30fc8caa64a", "6fb927de0fb8b99b"]


def test_every_image_has_its_own_noise() -> None:
    images = {"start": 3, "stop": 9, "shape": (4, 2, 2)}
    noise = image_noise(0, "sample", **images)
    assert torch.equal(image_noise(0, "sample", start=5, stop=6, shape=(4, 2, 2))[0], noise[2])
    assert len(noise.flatten(1).unique(dim=0)) == 6
    assert not torch.equal(image_noise(0, "sample-step-0", **images), noise)
    assert not torch.equal(image_noise(1, "sample", **images), noise)


def test_balanced_labels_are_even_and_random_labels_depend_on_the_seed() -> None:
    assert draw_labels("balanced", 1000, classes=10, seed=0).bincount().tolist() == [100] * 10
    random = draw_labels("random", 50, classes=10, seed=3)
    assert torch.equal(draw_labels("random", 50, classes=10, seed=3), random)
    assert not torch.equal(draw_labels("random", 50, classes=10, seed=4), random)
    assert draw_labels("random", 5, classes=0, seed=0).tolist() == [0] * 5
    with pytest.raises(UserError, match="'balanced' or 'random', found 'even'"):
        draw_labels("even", 50, classes=10, seed=0)


def test_validation_loss_uses_one_bin_of_times_after_the_other_at_fixed_noise(digits: Dataset) -> None:
    before, network = torch.get_rng_state(), Linear()
    found = validation_loss(network, LinearFlow(), digits, seed=0, device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert len(found) == len(network.times) == 10
    assert all(((t >= i / 10) & (t < (i + 1) / 10)).all() for i, t in enumerate(network.times))
    assert not torch.allclose(network.times[1] - network.times[0], torch.tensor(0.1, dtype=torch.float64))
    assert validation_loss(Linear(), LinearFlow(), digits, seed=0, device="cpu") == found
    assert validation_loss(Linear(), LinearFlow(), digits, seed=1, device="cpu") != found


def test_validation_loss_does_not_depend_on_the_batch_size(digits: Dataset) -> None:
    network = Linear()
    whole = validation_loss(Linear(), LinearFlow(), digits, seed=0, device="cpu")
    batches = validation_loss(network, LinearFlow(), digits, seed=0, device="cpu", batch=100)
    assert len(network.times) > 10 and max(len(t) for t in network.times) == 100
    assert batches == pytest.approx(whole)


def test_validation_loss_of_a_zero_prediction_is_the_size_of_the_velocity(digits: Dataset) -> None:
    expected = 1.0 + float(digits.heldout()[0].square().mean())
    found = validation_loss(Zero(), LinearFlow(), digits, seed=0, device="cpu")
    assert found == pytest.approx([expected] * 10, rel=0.02)


def test_a_grid_places_images_in_rows_and_doubles_their_pixels(tmp_path: Path) -> None:
    images = (torch.arange(12) * 20).to(torch.uint8).view(12, 1, 1, 1).expand(12, 1, 4, 4)
    save_grid(images, tmp_path / "deep" / "grid.png", columns=5)
    picture = np.asarray(Image.open(tmp_path / "deep" / "grid.png"))
    assert picture.shape == (2 * (3 * 5 + 1), 2 * (5 * 5 + 1), 3)
    corners = picture[2::10, 2::10, 0][:3, :5].flatten()
    assert corners[:12].tolist() == list(range(0, 240, 20))
    assert (picture[12:20, 12:20] == 120).all() and (picture[10:12] == 96).all()


def test_a_grid_can_be_in_colour(tmp_path: Path) -> None:
    image = torch.tensor([10, 20, 30]).to(torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    save_grid(image, tmp_path / "grid.png", columns=1)
    assert np.asarray(Image.open(tmp_path / "grid.png"))[3, 3].tolist() == [10, 20, 30]


class NotANumber(Zero):
    """Predicts NaN."""

    def forward_intermediates(self, x: Tensor, *args: Tensor, **options: object) -> tuple[Tensor, Features]:  # type: ignore[override]
        return torch.full_like(x, torch.nan), {}


@pytest.mark.parametrize("network", [Zero, NotANumber])
def test_latents_that_are_not_finite_are_reported(digits: Dataset, network: type[Linear]) -> None:
    finite = generate(
        network(),
        LinearFlow(),
        digits,
        n=50,
        labels="balanced",
        seed=0,
        sampler="euler",
        steps=2,
        guidance=Guidance(),
        device="cpu",
    )[2]
    assert finite == (network is Zero)
