"""Generate numbered images: image i of a seed is the same whichever command, batch or process generates it.

A CPU always runs CPU_ROWS images per network call, at multiples of CPU_ROWS, and a GPU always `batch` images;
the last call is padded. So no image depends on the number of images, on how they are divided among processes,
or on where an interrupted job resumed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, final

import numpy as np
import torch

from stbench.core.backbone import sampling_view
from stbench.core.device import arithmetic
from stbench.core.errors import UserError
from stbench.core.registry import SAMPLERS, lookup, plugin_hash
from stbench.core.rng import seeded_globals
from stbench.diffusion.sample import Guidance, sample
from stbench.evaluate.generate import draw_labels, image_noise, state_noise
from stbench.evaluate.sample_model import SamplingModel

CPU_ROWS = 32
"""Images per network call on a CPU, where the last bits of a product depend on the number of rows."""


@dataclass(frozen=True)
class SampleSpec:
    """Everything besides the network that changes a pixel. `batch` does so on a GPU only."""

    count: int
    guidance: Guidance
    sampler: str
    steps: int
    labels: str
    """ "balanced" or "random"."""
    seed: int
    batch: int
    precision: str = "fp32"
    """Arithmetic of the network; the decoder always runs in fp32."""

    def fields(self) -> dict[str, Any]:
        """Return plain data for the settings that are stored with the images."""
        plugin = plugin_hash(lookup(SAMPLERS, self.sampler))
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
            **({"sampler_plugin": plugin} if plugin else {}),
        }


@final
class BatchSampler:
    """Generates any range of a specification's images on one device."""

    def __init__(self, model: SamplingModel, spec: SampleSpec, device: torch.device) -> None:
        self._model, self._spec, self._device = model, spec, device
        self._labels = draw_labels(
            spec.labels, spec.count, classes=model.backbone.info.classes, seed=spec.seed
        )
        self._rows = rows_per_call(spec, device)

    def sample(self, start: int, stop: int) -> np.ndarray:
        """Generate images start..stop, uint8 (stop-start,H,W,3); `start` is a multiple of `rows_per_call`."""
        calls = range(start, stop, self._rows)
        images = np.concatenate([self._call(first) for first in calls])
        return images[: stop - start]

    @torch.no_grad()
    def _call(self, first: int) -> np.ndarray:
        """Run the network once: uint8 (rows,H,W,3), padded with images of class 0 beyond the last label."""
        spec, model, last = self._spec, self._model, first + self._rows
        network = sampling_view(model.backbone)
        noise = partial(state_noise, partial(image_noise, spec.seed, start=first, stop=last), network.info)

        # Pad the last call to full rows; label 0 exists in every network.
        labels = torch.zeros(self._rows, dtype=torch.long)
        existing = self._labels[first:last]
        labels[: len(existing)] = existing
        seeded = seeded_globals(spec.seed, "sample-global", first, self._device)
        with arithmetic(spec.precision, self._device), seeded:
            latents = sample(
                spec.sampler,
                network,
                model.objective,
                noise("sample").to(self._device),
                labels.to(self._device),
                steps=spec.steps,
                guidance=replace(spec.guidance, guides=model.guides.guides),
                noise=lambda draw: noise(f"sample-step-{draw}"),
            )[:, : model.backbone.info.channels]

        if not bool(latents.isfinite().all()):
            raise UserError(
                f"the network generates NaN or infinite values (images from {first}, guidance "
                f"{spec.guidance.scale:g}, {spec.precision}); expected finite latents: use other weights, a "
                f"smaller --guidance, or --precision fp32"
            )

        # The decoder runs in fp32, so that --precision changes the network only.
        with arithmetic("fp32", self._device):
            images = model.decode(latents)
        # Grey images become RGB, channels last, as in ADM's files.
        return images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()


def rows_per_call(spec: SampleSpec, device: torch.device) -> int:
    """Return the number of images in one network call."""
    return CPU_ROWS if device.type == "cpu" else spec.batch
