"""PCA maps: the tokens of blocks, and of what a recipe can be guided by, as small RGB pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.inspect.features import ImageSet, block_tokens, branches, spread, unlabelled
from stbench.inspect.formulas import pca_rgb
from stbench.inspect.measure import Images, Settings, chosen_steps
from stbench.inspect.subjects import Subject

FITTED = 32
"""Held-out images whose tokens the components are fitted to."""
SHOWN_IMAGES, SHOWN_BLOCKS, SHOWN_STEPS = 4, 8, 8
"""Largest number of images, blocks and evaluation points in a figure."""
LESS_NOISE = 0.1
"""Reduction of the time of the features at less noise: the mean of SRA's, which is uniform in [0, 0.2]."""
DEEPER = 20 / 28
"""Relative depth of the block of those features, as in SRA."""
GUIDED = 10.0
"""Scale of the guided features if no teacher states one."""


@dataclass(frozen=True)
class Progress:
    """Maps of one subject: blocks x evaluation points."""

    images: list[np.ndarray]
    """The images that are shown, uint8 (H,W,3) each."""
    blocks: list[int]
    steps: list[int]
    maps: dict[tuple[int, int], list[np.ndarray]]
    """(block, step) -> pictures (g,g,3) in [0,1], one per image."""
    tau: float


@dataclass(frozen=True)
class Guiding:
    """Maps of what could guide a student: one column per source."""

    images: list[np.ndarray]
    columns: dict[str, list[np.ndarray]]
    """Name of the source -> pictures (g,g,3) in [0,1], one per image."""
    tau: float


def middle_time(settings: Settings) -> float:
    """The time of the maps: the middle one of those that are measured."""
    return sorted(settings.times)[len(settings.times) // 2]


def progress_maps(
    subject: Subject, images: Images, settings: Settings, progress: Callable[[str], None]
) -> Progress:
    """Compute the maps of evenly spaced blocks and evaluation points, without labels."""
    chosen, shown = _choose(images.heldout)
    blocks = spread_with_ends(subject.info.depth, SHOWN_BLOCKS)
    steps = chosen_steps(subject, settings.steps)
    steps = [steps[i] for i in spread_with_ends(len(steps), SHOWN_STEPS)]
    tau, maps = middle_time(settings), {}
    for step in steps:
        progress(f"{subject.label}: maps of step {step}")
        network = subject.points[step]().to(settings.device)
        labels = unlabelled(network.info, len(chosen.rows), settings.device)
        tokens = block_tokens(network, subject.objective, chosen, tau, labels, blocks)
        for block in blocks:
            maps[block, step] = _pictures(tokens[block], shown)
    return Progress(_pixels(subject, chosen, shown), blocks, steps, maps, tau)


def guiding_maps(
    subject: Subject, images: Images, settings: Settings, progress: Callable[[str], None]
) -> Guiding:
    """Compute the maps of latents, encoders, features at less noise, and both branches with guidance."""
    progress(f"{subject.label}: maps of guiding features")
    chosen, shown = _choose(images.heldout)
    tau = middle_time(settings)
    last = subject.points[chosen_steps(subject, settings.steps)[-1]]().to(settings.device)
    columns = {"VAE latents": _pictures(chosen.latents.flatten(2).transpose(1, 2), shown)}

    # External encoders see the clean image
    pixels = subject.dataset.heldout_images()[chosen.rows].to(settings.device)
    for name, encoder in images.encoders.items():
        with torch.no_grad():
            columns[f"encoder\n{name}"] = _pictures(encoder.tokens(pixels), shown)

    # The network's own features at less noise, with labels as in training
    deep, cleaner = round(DEEPER * last.info.depth) - 1, max(tau - LESS_NOISE, 0.0)
    own = block_tokens(last, subject.objective, chosen, cleaner, chosen.labels, [deep])[deep]
    columns[f"own block {deep}\nat time {cleaner:.2g}"] = _pictures(own, shown)

    # Both branches of the teacher, or of the network itself
    teacher = subject.teacher
    network = last if teacher is None else teacher.load().to(settings.device)
    block = None if teacher is None else teacher.block
    block = network.info.depth // 2 if block is None else block
    who = f"{'own' if teacher is None else 'teacher'} block {block}"
    columns |= _guided(network, subject, chosen, tau, block, who, shown)
    return Guiding(_pixels(subject, chosen, shown), columns, tau)


def _guided(
    network: Backbone,
    subject: Subject,
    chosen: ImageSet,
    tau: float,
    block: int,
    who: str,
    shown: Sequence[int],
) -> dict[str, list[np.ndarray]]:
    if not network.info.null_label:
        return {}
    scale = subject.teacher.guidance if subject.teacher is not None else None
    scale = GUIDED if scale is None else scale
    conditional, unconditional = branches(network, subject.objective, chosen, tau, block)
    found = {
        "unconditional": unconditional,
        "conditional": conditional,
        f"guided {scale:g}": unconditional + scale * (conditional - unconditional),
    }
    return {f"{who}\n{name}": _pictures(tokens, shown) for name, tokens in found.items()}


def spread_with_ends(size: int, count: int) -> list[int]:
    """At most `count` evenly spaced positions in 0..size-1, with the first and the last."""
    if size <= count:
        return list(range(size))
    return sorted({round(i * (size - 1) / (count - 1)) for i in range(count)})


def _choose(heldout: ImageSet) -> tuple[ImageSet, list[int]]:
    """The images that the components are fitted to, and which of them are shown: of different classes."""
    chosen = heldout.take(spread(len(heldout.rows), FITTED))
    first: dict[int, int] = {}
    for position, label in enumerate(chosen.labels.tolist()):
        first.setdefault(label, position)
    others = [i for i in range(len(chosen.rows)) if i not in first.values()]
    return chosen, sorted([*first.values(), *others][:SHOWN_IMAGES])


def _pictures(tokens: Tensor, shown: Sequence[int]) -> list[np.ndarray]:
    """Colours of tokens (n,N,D) as pictures (g,g,3) of the shown images; N is a square."""
    colours = pca_rgb(tokens)[list(shown)].cpu().numpy()
    side = math.isqrt(colours.shape[1])
    return [picture.reshape(side, side, 3) for picture in colours]


def _pixels(subject: Subject, chosen: ImageSet, shown: Sequence[int]) -> list[np.ndarray]:
    pixels = subject.dataset.heldout_images()[chosen.rows[list(shown)]]
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    return [image.permute(1, 2, 0).numpy() for image in pixels]
