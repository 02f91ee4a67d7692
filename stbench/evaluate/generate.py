"""Generate images with a network, compute its loss on held-out images, and save image grids.

All noise is keyed by the evaluation seed and the image index. Neither the batch size nor the caller changes a
sample, and the global random state is never touched.
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
from stbench.core.rng import generator, seeded_globals
from stbench.data.dataset import Dataset
from stbench.diffusion.sample import Guidance, Noise, sample

NOISE_BLOCK = 50
"""Number of consecutive images whose evaluation noise comes from one generator."""
TIME_BINS = 10
"""Number of equal bins of t in which the held-out loss is recorded."""


def draw_labels(kind: str, n: int, *, classes: int, seed: int) -> Tensor:
    """Return the class labels (n,) to generate images for.

    "balanced" cycles through the classes, "random" draws each label uniformly. All labels are 0 for a network
    without classes. Raises UserError for any other `kind`.
    """
    classes = max(classes, 1)
    if kind == "balanced":
        return torch.arange(n) % classes
    if kind == "random":
        return torch.randint(classes, (n,), generator=generator(seed, "evaluation-labels"))
    raise UserError(f"labels must be 'balanced' or 'random', found '{kind}'")


def block_noise(seed: int, stream: str, *, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise (stop-start, *shape) for images start..stop, one generator per block.

    `start` must be a multiple of NOISE_BLOCK.
    """
    # Whole blocks are drawn and cut, so the last image of a short range has the same noise as in a long one.
    blocks = [
        torch.randn((NOISE_BLOCK, *shape), generator=generator(seed, stream, first))
        for first in range(start, stop, NOISE_BLOCK)
    ]
    return torch.cat(blocks)[: stop - start]


def step_noise(seed: int, *, start: int, stop: int, shape: tuple[int, ...]) -> Noise:
    """Return the noise source of a stochastic sampler for images start..stop: one stream per draw."""
    return lambda draw: block_noise(seed, f"evaluation-step-{draw}", start=start, stop=stop, shape=shape)


def image_noise(seed: int, stream: str, *, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise (stop-start, *shape) for images start..stop, one generator per image.

    Slower than `block_noise`, but any image can be drawn on its own.
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
) -> tuple[Tensor, Tensor, bool]:
    """Generate n images: uint8 (n,c,H,W) and their class labels (n,), both on the CPU.

    The third value says whether all latents are finite. If not, the images show nothing: NaN is decoded to
    black.

    `backbone` and `dataset` must be on `device`. `batch`, a multiple of NOISE_BLOCK, affects memory but not
    the noise. Everything is computed in fp32, whatever precision the network was trained in.
    """
    y = draw_labels(labels, n, classes=dataset.classes, seed=seed)
    shape = (dataset.channels, dataset.input_size, dataset.input_size)
    images, finite = [], True
    for start in range(0, n, batch):
        stop = min(start + batch, n)
        # Noise is drawn on the CPU: CUDA generators produce other numbers.
        z = block_noise(seed, "evaluation", start=start, stop=stop, shape=shape).to(device)
        seeded = seeded_globals(seed, "evaluation-global", start, device)
        with arithmetic("fp32", torch.device(device)), seeded:
            latents = sample(
                sampler,
                backbone,
                objective,
                z,
                y[start:stop].to(device),
                steps=steps,
                guidance=guidance,
                noise=step_noise(seed, start=start, stop=stop, shape=shape),
            )
            images.append(dataset.decode(latents).cpu())
            finite = finite and bool(latents.isfinite().all())
    return torch.cat(images), y, finite


@torch.no_grad()
def validation_loss(
    backbone: Backbone,
    objective: Objective,
    dataset: Dataset,
    *,
    seed: int,
    device: torch.device | str,
    batch: int = 512,
) -> list[float]:
    """Return the mean denoising loss on the held-out images in each of TIME_BINS equal bins of t.

    Times and noise depend only on `seed`, so the losses of different networks are comparable.
    """
    x0, y = (tensor.to(device) for tensor in dataset.heldout())
    losses = []
    for index in range(TIME_BINS):
        # Draw all times and all noise of a bin before splitting: the batch size must not change them.
        draw = generator(seed, "validation", index)
        t = (index + torch.rand(len(x0), generator=draw, dtype=torch.float64)) / TIME_BINS
        noise = torch.randn(x0.shape, generator=draw).to(device)
        columns = [torch.split(values, batch) for values in (x0, noise, t, y)]

        # Average in float64 over all images of the bin.
        parts = []
        for clean, eps, time, labels in zip(*columns, strict=True):
            noised = objective.at(clean, eps, time)
            seeded = seeded_globals(seed, "validation-global", index, device)
            with arithmetic("fp32", torch.device(device)), seeded:
                prediction = backbone(noised.x_t, noised.t, labels)
            parts.append(objective.loss(prediction, noised).double())
        losses.append(float(torch.cat(parts).mean()))
    return losses


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Save uint8 images (N,c,H,W), with c 1 or 3, as one PNG, row by row, each pixel enlarged to 2x2.

    With balanced labels and as many columns as classes, each column shows one class.
    """
    sheet = make_grid(images.cpu(), nrow=columns, padding=1, pad_value=96).permute(1, 2, 0)
    sheet = sheet.repeat_interleave(2, 0).repeat_interleave(2, 1)
    # Encode in memory, because PIL cannot write atomically.
    buffer = BytesIO()
    Image.fromarray(sheet.numpy()).save(buffer, format="PNG")
    atomic_write(path, buffer.getvalue())
