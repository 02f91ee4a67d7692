"""Data sets in memory, trained on as pixels."""

from __future__ import annotations

import pytest
import torch

from stbench.core.errors import UserError
from stbench.data.dataset import require_interface
from stbench.data.digits import DIGITS_PRESET
from stbench.data.in_memory import InMemory

IMAGES = torch.randint(0, 256, (12, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 4


class Colours(InMemory):
    name = "colours"
    channels, input_size, classes, size = 3, 8, 4, 9
    image_shape = (3, 8, 8)
    preset = DIGITS_PRESET
    extractor = "mean-colour"

    def __init__(self, images: torch.Tensor = IMAGES, labels: torch.Tensor = LABELS) -> None:
        super().__init__(images, labels, torch.arange(9), torch.arange(9, 12))


def test_latents_are_pixels_that_decode_to_the_same_images() -> None:
    data, index = Colours(), torch.tensor([8, 0, 3])
    require_interface("colours", data)
    latents = data.latents(index, torch.zeros(3, 3, 8, 8))
    assert latents.dtype == torch.float32 and latents.min() >= -1 and latents.max() <= 1
    assert torch.equal(data.decode(latents), IMAGES[index]) and torch.equal(data.images(index), IMAGES[index])
    assert torch.equal(data.labels(index), LABELS[index])


def test_held_out_images_are_never_trained_on() -> None:
    data = Colours()
    latents, labels = data.heldout()
    assert torch.equal(data.decode(latents), IMAGES[9:]) and torch.equal(labels, LABELS[9:])
    assert torch.equal(data.train_images(), IMAGES[:9]) and torch.equal(data.references["all"](), IMAGES)
    assert data.order(0, 0, 1000).max() == 8


def test_the_fingerprint_covers_images_and_labels() -> None:
    changed = IMAGES.clone()
    changed[0, 0, 0, 0] += 1
    found = {Colours().fingerprint, Colours(changed).fingerprint, Colours(labels=LABELS.flip(0)).fingerprint}
    assert len(found) == 3 and Colours().fingerprint in found


def test_a_copy_on_a_device_gives_batches_there() -> None:
    data = Colours().to("meta")
    index = torch.tensor([1, 2])
    parts = (data.latents(index, torch.zeros(2)), data.labels(index), data.images(index), *data.heldout())
    assert all(part.is_meta for part in parts)


@pytest.mark.parametrize(
    ("images", "labels"), [(IMAGES[:, :1], LABELS), (IMAGES, LABELS + 1)], ids=["shape", "labels"]
)
def test_facts_that_do_not_fit_the_images_are_refused(images: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(UserError, match=r"'colours' must have 9 training images of shape \(3, 8, 8\)"):
        Colours(images, labels)
