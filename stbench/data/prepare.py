"""From a source of images to a prepared data set: crop, encode, write."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch

from stbench.core.device import arithmetic
from stbench.core.errors import UserError
from stbench.data.crop import UNREADABLE, decode_image, reason
from stbench.data.shard_writer import REFERENCES, Rows, build, shard_bounds, split_of
from stbench.data.shards import TRAIN, Kind, Manifest
from stbench.data.sources import Source, open_source
from stbench.models.autoencoder import Autoencoder, VAEInfo, find_vae, to_float

Advance = Callable[[int], None]
"""Told how many images are done since the last call."""


@dataclass(frozen=True)
class PrepareOptions:
    """The arguments of `stbench data prepare`."""

    source: Path
    target: Path
    vae: str
    size: int = 256
    flip: bool = False
    shards: int | None = None
    precision: str = "fp32"
    batch: int = 32
    references: int = REFERENCES
    classes: Path | None = None
    device: torch.device = torch.device("cpu")


@dataclass(frozen=True)
class EncodingTask:
    """A source with its split and encoder: all that is needed to make rows."""

    source: Source
    split: np.ndarray
    encoder: Encoder
    batch: int


def open_task(job: PrepareOptions) -> EncodingTask:
    """List the images and find the autoencoder. Raises UserError for whatever does not fit."""
    for name, value, least in (
        ("size", job.size, 1),
        ("batch", job.batch, 1),
        ("references", job.references, 0),
    ):
        if value < least:
            raise UserError(f"--{name} wants at least {least}, got {value}; leave it out for the default")
    encoder = make_encoder(job.vae, job.size, job.flip, job.precision, job.device)
    source = open_source(job.source, job.classes)
    return EncodingTask(source, split_of(source.ids, job.references), encoder, job.batch)


def prepare(job: PrepareOptions, listed: EncodingTask, advance: Advance) -> tuple[Manifest, bool]:
    """Write, or finish, the data set; returns its manifest and whether anything was to do.

    Raises UserError as `store_writer.build` does.
    """
    source, encoder, count = listed.source, listed.encoder, len(listed.source.ids)
    draft = Manifest(
        kind=encoder.kind,
        shape=encoder.shape,
        views=encoder.views,
        flip=job.flip,
        image_shape=encoder.image_shape,
        classes=list(source.classes),
        vae=encoder.vae,
        vae_sha256=encoder.vae_sha256,
        scale=encoder.scale,
        shift=encoder.shift,
        plan=_plan(job, listed),
        shards=(),
        ignored=dict(source.ignored),
    )
    row = encoder.views * int(np.prod(encoder.shape)) * (2 if encoder.kind == "moments" else 1)
    pixels = int((listed.split != TRAIN).sum()) * int(np.prod(encoder.image_shape))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return build(
            job.target,
            draft,
            shard_bounds(count, job.shards),
            count * row + pixels,
            lambda start, stop: encode(listed, range(start, stop), pool, advance),
            advance,
        )


def _plan(job: PrepareOptions, listed: EncodingTask) -> dict[str, object]:
    """What a command that goes on must share with the one that began."""
    return {
        "source": str(job.source.resolve()),
        "images": len(listed.source.ids),
        "listing": listed.source.digest(),
        "autoencoder": [listed.encoder.vae or "none", listed.encoder.vae_sha256],
        "size": job.size,
        "flip": job.flip,
        "shards": job.shards,
        "precision": job.precision,
        "batch": job.batch,
        "references": job.references,
        "device": job.device.type if listed.encoder.vae else None,
    }


def encode(listed: EncodingTask, rows: Sequence[int], pool: ThreadPoolExecutor, advance: Advance) -> Rows:
    """Read, crop and encode some rows of a source; what cannot be read is named and left out.

    Threads read the next batch while one is encoded. Batches begin at the first of `rows`, so a shard's
    content does not depend on what was made before it.
    """
    kept: list[int] = []
    parts, pixels, unreadable = [], [], []
    for numbers, loaded in _batches(listed, rows, pool):
        good = [(n, image) for n, image in zip(numbers, loaded, strict=True) if not isinstance(image, str)]
        unreadable += [
            (listed.source.ids[n], image)
            for n, image in zip(numbers, loaded, strict=True)
            if isinstance(image, str)
        ]
        if good:
            parts.append(listed.encoder(np.stack([image for _, image in good])))
        kept += [n for n, _ in good]
        pixels += [image for n, image in good if listed.split[n] != TRAIN]
        advance(len(numbers))
    encoder = listed.encoder
    dtype = np.float16 if encoder.kind == "moments" else np.uint8
    return Rows(
        ids=[listed.source.ids[n] for n in kept],
        labels=[listed.source.labels[n] for n in kept],
        split=[int(listed.split[n]) for n in kept],
        data=np.concatenate(parts) if parts else np.empty((0, encoder.views, *encoder.shape), dtype),
        images=np.stack(pixels) if pixels else np.empty((0, *encoder.image_shape), np.uint8),
        unreadable=unreadable,
    )


def _batches(
    listed: EncodingTask, rows: Sequence[int], pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[int], list[np.ndarray | str]]]:
    channels, size = listed.encoder.image_shape[:2]

    def load(number: int) -> np.ndarray | str:
        try:
            return decode_image(listed.source.content(number), channels, size)
        except UNREADABLE as error:
            return reason(error)

    batches = [rows[k : k + listed.batch] for k in range(0, len(rows), listed.batch)]

    def submit(batch: Sequence[int]) -> list[Future[np.ndarray | str]]:
        return [pool.submit(load, number) for number in batch]

    ahead = submit(batches[0])
    for number, batch in enumerate(batches):
        current, ahead = ahead, submit(batches[number + 1]) if number + 1 < len(batches) else []
        yield batch, [future.result() for future in current]


PIXELS = "none"
"""The name that asks for no autoencoder: training on pixels."""


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Encoder(ABC):
    """uint8 images (n,c,S,S) to stored rows (n,V,...), and the facts that a manifest wants."""

    kind: Kind
    shape: tuple[int, ...]
    """Of one view."""
    views: int
    image_shape: tuple[int, int, int]
    vae: str = ""
    vae_sha256: str = ""
    scale: float = 1.0
    shift: float = 0.0

    @abstractmethod
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Rows (n,V,*shape) of the kind's type; n at least 1."""


@final
class Moments(Encoder):
    """Mean and standard deviation (n,V,2C,h,w) of a posterior, unscaled, as fp16; V=2 with the mirror image.

    The network runs in `precision`, the moments are taken in fp32.
    """

    kind: Kind = "moments"

    def __init__(self, vae: VAEInfo, size: int, flip: bool, precision: str, device: torch.device) -> None:
        if size < vae.factor or size % vae.factor:
            raise UserError(
                f"--size wants a multiple of {vae.factor} for this autoencoder, got {size}; "
                f"for example --size {max(1, round(size / vae.factor)) * vae.factor}"
            )
        latent = size // vae.factor
        self.shape = (2 * vae.latent_channels, latent, latent)
        self.views, self.image_shape = 1 + flip, (vae.channels, size, size)
        self.vae, self.vae_sha256, self.scale, self.shift = vae.name, vae.sha256, vae.scale, vae.shift
        self._source, self._device, self._dtype = vae, device, PRECISIONS[precision]
        self._network: Autoencoder | None = None

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Encoder.__call__`. Raises UserError for moments that fp16 cannot hold."""
        if self._network is None:  # loaded late: a finished set needs no network
            self._network = self._source.load(self._dtype).to(self._device)
        x = to_float(torch.from_numpy(images).to(self._device)).to(self._dtype)
        views = [x, x.flip(-1)][: self.views]
        try:
            with arithmetic("fp32", self._device):  # not TF32, which is no matter to bf16 weights
                stored = [_mean_and_std(self._network.moments(view)) for view in views]
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"the GPU has no room to encode {len(images)} images at a time; "
                f"try --batch {max(1, len(images) // 2)}"
            ) from error
        rows = torch.stack(stored, 1).half().cpu()
        if not rows.isfinite().all():
            raise UserError(
                f"autoencoder {self.vae} gives moments beyond fp16; use another, or --precision fp32"
            )
        return rows.numpy()


def _mean_and_std(parameters: torch.Tensor) -> torch.Tensor:
    """diffusers' (n,2C,h,w) of mean and log-variance to mean and standard deviation, in fp32.

    The clamp of the log-variance is that of diffusers' DiagonalGaussianDistribution.
    """
    mean, logvar = parameters.float().chunk(2, dim=1)
    return torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))], 1)


@final
class Pixels(Encoder):
    """The uint8 pixels (n,1,c,S,S); a mirror is taken when they are read."""

    kind: Kind = "pixels"
    views = 1

    def __init__(self, size: int, channels: int = 3) -> None:
        self.shape = self.image_shape = (channels, size, size)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `Encoder.__call__`."""
        return images[:, None]


def make_encoder(vae: str, size: int, flip: bool, precision: str, device: torch.device) -> Encoder:
    """The encoder for `--vae`: a published name, a folder, or "none" for pixels.

    Raises UserError for an unknown precision and for an autoencoder that is not there or does not fit.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision wants fp32 or bf16, got '{precision}'; for example --precision fp32")
    if vae == PIXELS:
        return Pixels(size)
    return Moments(find_vae(vae), size, flip, precision, device)
