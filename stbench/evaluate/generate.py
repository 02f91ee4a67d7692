"""Generate images with a network, compute its loss on held-out images, and save image grids.

All noise is keyed by the evaluation seed and the image index. Neither the batch size nor the caller changes a
sample, and the global random state is never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from stbench.core.backbone import Backbone, BackboneInfo, kept_heads, sampling_view
from stbench.core.device import arithmetic
from stbench.core.errors import UserError
from stbench.core.files import atomic_write
from stbench.core.guides import Guide
from stbench.core.objective import Objective
from stbench.core.registry import SAMPLERS, lookup, plugin_hash
from stbench.core.rng import generator, seeded_globals
from stbench.core.threads import map_in_threads
from stbench.core.world import ALONE, World
from stbench.data.dataset import Dataset
from stbench.diffusion.guides import NetworkGuide
from stbench.diffusion.sample import Guidance, sample

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


def image_noise(seed: int, stream: str, *, start: int, stop: int, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal noise (stop-start, *shape) for images start..stop, one generator per image.

    Slower than `block_noise`, but any image can be drawn on its own.
    """
    drawn = [torch.randn(shape, generator=generator(seed, stream, index)) for index in range(start, stop)]
    return torch.stack(drawn)


def state_noise(draw: Callable[..., Tensor], info: BackboneInfo, stream: str) -> Tensor:
    """Return noise (n,C,H,W) for all channels of a network, from `draw(stream, shape=...)`.

    Channels beyond the latents have a stream of their own, so the latents have the same noise as without.
    """
    size, extra = (info.input_size, info.input_size), info.extra_channels
    latents = draw(stream, shape=(info.channels - extra, *size))
    return torch.cat([latents, draw(f"{stream}-extra", shape=(extra, *size))], dim=1) if extra else latents


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
    world: World = ALONE,
) -> tuple[Tensor, Tensor, bool]:
    """Generate n images: uint8 (n,c,H,W) and their class labels (n,), both on the CPU.

    The third value says whether all latents are finite. If not, the images show nothing: NaN is decoded to
    black.

    `backbone` and `dataset` must be on `device`. `batch`, a multiple of NOISE_BLOCK, affects memory but not
    the noise. Everything is computed in fp32, whatever precision the network was trained in. Each rank
    generates whole batches, so every rank count gives the same images, and every rank returns all of them. On
    a CPU, threads compute parts of up to `batch` images at a time.
    """
    y = draw_labels(labels, n, classes=dataset.classes, seed=seed)
    network = sampling_view(backbone)

    def draw(rows: range) -> Tensor:
        # Noise is drawn on the CPU: CUDA generators produce other numbers.
        noise = partial(
            state_noise, partial(block_noise, seed, start=rows.start, stop=rows.stop), network.info
        )
        return sample(
            sampler,
            network,
            objective,
            noise("evaluation").to(device),
            y[rows.start : rows.stop].to(device),
            steps=steps,
            guidance=guidance,
            noise=lambda draw: noise(f"evaluation-step-{draw}"),  # one stream per draw
        )[:, : dataset.channels]

    # The images of this rank.
    starts = range(0, n, batch)
    starts = starts[slice(*world.part(0, len(starts)))]
    mine = range(starts[0], min(starts[-1] + batch, n)) if starts else range(0)
    images, finite = [torch.empty(0, *dataset.image_shape, dtype=torch.uint8)], True
    with arithmetic("fp32", torch.device(device)):
        drawn = None
        used = (lookup(SAMPLERS, sampler), *_parts(guidance.guides), *kept_heads(backbone).values())
        if mine and _is_divisible(device, backbone, network, objective, *used):
            limit = batch // NOISE_BLOCK
            drawn = torch.cat(map_in_threads(draw, part_ranges(mine), network=network, limit=limit))
        for start in starts:
            rows = range(start, min(start + batch, n))
            with seeded_globals(seed, "evaluation-global", start, device):
                latents = draw(rows) if drawn is None else drawn[start - mine.start : rows.stop - mine.start]
                images.append(dataset.decode(latents).cpu())
                finite = finite and bool(latents.isfinite().all())
    return world.collect(torch.cat(images)), y, not world.any(not finite)


def part_ranges(rows: range) -> list[range]:
    """Divide rows into parts of NOISE_BLOCK; the last may have up to half as many more.

    Smaller parts would not change the noise, but the last bits of a matrix product with few rows.
    """
    starts = list(rows[::NOISE_BLOCK])
    if len(starts) > 1 and rows.stop - starts[-1] < NOISE_BLOCK // 2:
        starts.pop()
    return [range(*ends) for ends in pairwise([*starts, rows.stop])]


def _parts(guides: Sequence[Guide]) -> list[object]:
    """Return guides and the other networks that they call."""
    return [*guides, *(guide.network for guide in guides if isinstance(guide, NetworkGuide))]


def _is_divisible(device: torch.device | str, *used: object) -> bool:
    """Whether threads of the host may compute parts of a batch with these objects.

    Plug-ins may keep something between calls, or draw from torch's global generator, so they run alone.
    """
    types = [value if isinstance(value, type) else type(value) for value in used]
    return torch.device(device).type == "cpu" and not any(map(plugin_hash, types))


@torch.no_grad()
def validation_loss(
    backbone: Backbone,
    objective: Objective,
    dataset: Dataset,
    *,
    seed: int,
    device: torch.device | str,
    batch: int = 512,
    world: World = ALONE,
) -> list[float]:
    """Return the mean denoising loss on the held-out images in each of TIME_BINS equal bins of t.

    Times and noise depend only on `seed`, so the losses of different networks are comparable.
    """
    x0, y = (tensor.to(device) for tensor in dataset.heldout())
    losses = []
    for index in range(*world.part(0, TIME_BINS)):
        # Draw all times and all noise of a bin before splitting: the batch size must not change them.
        draw = generator(seed, "validation", index)
        t = (index + torch.rand(len(x0), generator=draw, dtype=torch.float64)) / TIME_BINS
        noise = torch.randn(x0.shape, generator=draw).to(device)
        values = partial(_losses_of_rows, backbone, objective, x0, noise, t, y)

        # Average in float64 over all images of the bin.
        with arithmetic("fp32", torch.device(device)):
            if _is_divisible(device, backbone, objective):
                limit = max(1, batch // NOISE_BLOCK)
                found = map_in_threads(values, part_ranges(range(len(x0))), network=backbone, limit=limit)
            else:
                found = []
                for start in range(0, len(x0), batch):
                    with seeded_globals(seed, "validation-global", index, device):
                        found.append(values(range(start, min(start + batch, len(x0)))))
        losses.append(float(torch.cat(found).mean()))
    return world.collect(torch.tensor(losses, dtype=torch.float64)).tolist()


def _losses_of_rows(
    backbone: Backbone, objective: Objective, x0: Tensor, noise: Tensor, t: Tensor, y: Tensor, rows: range
) -> Tensor:
    """Return the losses (n,), float64, of some rows of clean latents, noise, host times and labels."""
    here = slice(rows.start, rows.stop)
    noised = objective.at(x0[here], noise[here], t[here])
    return objective.loss(backbone(noised.x_t, noised.t, y[here]), noised).double()


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
