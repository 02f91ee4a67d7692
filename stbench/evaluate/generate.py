"""Draw images from a network, measure its loss on held-out images, and lay images out in one picture.

All noise is keyed by the evaluation seed and the image's number, so neither the batch nor the caller changes
a sample, and the global random state is never touched.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from stbench.core.backbone import Backbone
from stbench.core.device import arithmetic
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.objective import Objective
from stbench.core.rng import generator
from stbench.data.dataset import Dataset
from stbench.diffusion.sample import Guidance, Noise, sample

BLOCK = 50
"""Images whose evaluation noise shares one generator."""
HELDOUT_BATCH = 512
"""Held-out images of one forward."""
BINS = 10
"""Equal bins of t in which the held-out loss is recorded."""


def draw_labels(kind: str, n: int, classes: int, seed: int) -> Tensor:
    """Labels (n,) to ask for: "balanced" cycles through the classes, "random" draws each uniformly.

    All are 0 for a network without classes.
    """
    classes = max(classes, 1)
    if kind == "balanced":
        return torch.arange(n) % classes
    if kind == "random":
        return torch.randint(classes, (n,), generator=generator(seed, "evaluation-labels"))
    raise UserError(f"expected labels 'balanced' or 'random', found '{kind}'; choose one of them")


def block_noise(seed: int, stream: str, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal (stop-start, *shape) of images start..stop; `start` is a multiple of BLOCK."""
    blocks = [
        torch.randn((BLOCK, *shape), generator=generator(seed, stream, first))
        for first in range(start, stop, BLOCK)
    ]
    return torch.cat(blocks)[: stop - start]


def step_noise(seed: int, start: int, stop: int, shape: tuple[int, ...]) -> Noise:
    """What a stochastic sampler draws for images start..stop: a stream for each draw."""
    return lambda draw: block_noise(seed, f"evaluation-step-{draw}", start, stop, shape)


def image_noise(seed: int, stream: str, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal (stop-start, *shape) of images start..stop, each from a generator of its own.

    Slower to draw than `block_noise`, and any image can be drawn alone.
    """
    drawn = [torch.randn(shape, generator=generator(seed, stream, index)) for index in range(start, stop)]
    return torch.stack(drawn)


@torch.no_grad()
def generate(
    backbone: Backbone,
    objective: Objective,
    dataset: Dataset,
    *,
    n: int,
    labels: str,
    seed: int,
    sampler: str,
    steps: int,
    guidance: Guidance,
    device: torch.device | str,
    batch: int = 250,
) -> tuple[Tensor, Tensor]:
    """Draw n images: uint8 (n,c,H,W) and the labels (n,) they were asked to show, on the host.

    `backbone` and `dataset` lie on `device`; `batch`, a multiple of BLOCK, decides memory and not noise.
    All is computed in fp32, whatever the network was trained in.
    """
    y = draw_labels(labels, n, dataset.classes, seed)
    shape = (dataset.channels, dataset.input_size, dataset.input_size)
    images = []
    for start in range(0, n, batch):
        stop = min(start + batch, n)
        z = block_noise(seed, "evaluation", start, stop, shape).to(device)
        with arithmetic("fp32", torch.device(device)):
            latents = sample(
                sampler,
                backbone,
                objective,
                z,
                y[start:stop].to(device),
                steps=steps,
                guidance=guidance,
                noise=step_noise(seed, start, stop, shape),
            )
            images.append(dataset.decode(latents).cpu())
    return torch.cat(images), y


@torch.no_grad()
def validation_loss(
    backbone: Backbone, objective: Objective, dataset: Dataset, *, seed: int, device: torch.device | str
) -> list[float]:
    """Mean denoising loss on the held-out images in each of 10 equal bins of t, at fixed times and noise."""
    x0, y = (tensor.to(device) for tensor in dataset.heldout())
    losses = []
    for index in range(BINS):
        draw = generator(seed, "validation", index)
        t = (index + torch.rand(len(x0), generator=draw, dtype=torch.float64)) / BINS
        noise = torch.randn(x0.shape, generator=draw).to(device)
        parts = []
        columns = [torch.split(values, HELDOUT_BATCH) for values in (x0, noise, t, y)]
        for clean, eps, time, labels in zip(*columns, strict=True):
            noised = objective.at(clean, eps, time)
            with arithmetic("fp32", torch.device(device)):
                prediction = backbone(noised.x_t, noised.t, labels)
            parts.append(objective.loss(prediction, noised).double())
        losses.append(float(torch.cat(parts).mean()))
    return losses


def grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Write uint8 images (N,c,H,W), c 1 or 3, as one PNG, row by row with lines between, pixels doubled.

    With balanced labels and as many columns as classes, each column shows one class.
    """
    sheet = make_grid(images.cpu(), nrow=columns, padding=1, pad_value=96).permute(1, 2, 0)
    sheet = sheet.repeat_interleave(2, 0).repeat_interleave(2, 1)
    buffer = BytesIO()
    Image.fromarray(sheet.numpy()).save(buffer, format="PNG")
    atomic_write(path, buffer.getvalue())
