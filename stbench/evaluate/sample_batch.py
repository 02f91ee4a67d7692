"""Draws numbered images from a network: image i of a seed is the same whoever draws it, and with whom.

A CPU always runs `ROWS` images at once, at multiples of `ROWS`, and a GPU `batch` images; the last call is
filled up. So no image depends on how many are asked for, how they are split, or where a stopped job began.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch

from stbench.core.device import arithmetic
from stbench.diffusion.sample import Guidance, sample
from stbench.evaluate import draw_labels, image_noise
from stbench.evaluate.sample_source import Source

ROWS = 32
"""Images in one network call on a CPU, whose products depend in their last bits on the number of rows."""


@dataclass(frozen=True)
class Order:
    """What to draw. Everything here moves a pixel, but `batch` on a CPU."""

    count: int
    guidance: Guidance
    sampler: str
    steps: int
    labels: str
    seed: int
    batch: int
    precision: str = "fp32"

    def fields(self) -> dict[str, Any]:
        """As plain data, for the settings beside the images."""
        return {
            "count": self.count,
            "cfg": self.guidance.scale,
            "interval": [self.guidance.low, self.guidance.high],
            "channels": self.guidance.channels,
            "sampler": self.sampler,
            "steps": self.steps,
            "labels": self.labels,
            "seed": self.seed,
            "batch": self.batch,
            "precision": self.precision,
        }


@final
class Painter:
    """Draws any range of an order's images on one device."""

    def __init__(self, source: Source, order: Order, device: torch.device) -> None:
        self._source, self._order, self._device = source, order, device
        self._labels = draw_labels(order.labels, order.count, source.backbone.info.classes, order.seed)
        self._rows = rows(order, device)

    def paint(self, start: int, stop: int) -> np.ndarray:
        """Images start..stop, uint8 (stop-start,H,W,3); `start` is a multiple of `rows`."""
        calls = range(start, stop, self._rows)
        images = np.concatenate([self._call(first) for first in calls])
        return images[: stop - start]

    @torch.no_grad()
    def _call(self, first: int) -> np.ndarray:
        order, source = self._order, self._source
        info = source.backbone.info
        last, shape = first + self._rows, (info.channels, info.input_size, info.input_size)
        labels = torch.zeros(self._rows, dtype=torch.long)
        held = self._labels[first:last]
        labels[: len(held)] = held
        with arithmetic(order.precision, self._device):
            latents = sample(
                order.sampler,
                source.backbone,
                source.objective,
                image_noise(order.seed, "sample", first, last, shape).to(self._device),
                labels.to(self._device),
                steps=order.steps,
                guidance=order.guidance,
                noise=lambda draw: image_noise(order.seed, f"sample-step-{draw}", first, last, shape),
            )
        with arithmetic("fp32", self._device):
            images = source.decode(latents)
        return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def rows(order: Order, device: torch.device) -> int:
    """Images in one network call."""
    return ROWS if device.type == "cpu" else order.batch
