"""Encode images to the rows that are stored: moments of an autoencoder's posterior, or pixels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

from stbench.core.device import arithmetic
from stbench.core.errors import UserError
from stbench.data.crop import UnreadableImage, decode_image, reason
from stbench.data.shard_writer import ShardRows
from stbench.data.shards import Kind
from stbench.data.sources import ImageSource
from stbench.data.spec import PIXELS
from stbench.data.split import TRAIN
from stbench.models.autoencoder import Autoencoder, VAEInfo, find_vae, to_float

Advance = Callable[[int], None]
"""Called with the number of images that were finished since the last call."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


# --- Encoders ---


class RowEncoder(ABC):
    """Maps uint8 images (n,c,S,S) to stored rows (n,V,...), and knows what the manifest says about them."""

    kind: Kind
    shape: tuple[int, ...]
    """Shape of one view."""
    views: int
    image_shape: tuple[int, int, int]
    vae: str = ""
    vae_sha256: str = ""
    scale: float = 1.0
    shift: float = 0.0

    @abstractmethod
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Return rows (n,V,*shape) of the dtype of the kind; n is at least 1."""


@final
class MomentsEncoder(RowEncoder):
    """Mean and standard deviation of the posterior (n,V,2C,h,w), unscaled, as float16.

    V is 2 with mirror images. The network runs in `precision`; the moments are computed in fp32.
    """

    kind: Kind = "moments"

    def __init__(self, vae: VAEInfo, size: int, *, flip: bool, precision: str, device: torch.device) -> None:
        if size < vae.factor or size % vae.factor:
            raise UserError(
                f"--size must be a multiple of {vae.factor} for this autoencoder, got {size}; "
                f"for example --size {max(1, round(size / vae.factor)) * vae.factor}"
            )
        latent = size // vae.factor
        self.shape = (2 * vae.latent_channels, latent, latent)
        self.views, self.image_shape = 1 + flip, (vae.channels, size, size)
        self.vae, self.vae_sha256, self.scale, self.shift = vae.name, vae.sha256, vae.scale, vae.shift
        self._info, self._device, self._dtype = vae, device, PRECISIONS[precision]
        self._network: Autoencoder | None = None

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `RowEncoder.__call__`. Raises UserError for moments that overflow float16."""
        if self._network is None:  # loaded late: a finished set needs no network
            self._network = self._info.load(self._dtype).to(self._device)
        x = to_float(torch.from_numpy(images).to(self._device)).to(self._dtype)
        views = [x, x.flip(-1)][: self.views]
        try:
            with arithmetic("fp32", self._device):  # rules out TF32; bf16 weights are not affected
                stored = [_mean_and_std(self._network.moments(view)) for view in views]
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"not enough GPU memory to encode {len(images)} images at a time; "
                f"try --batch {max(1, len(images) // 2)}"
            ) from error
        rows = torch.stack(stored, 1).half().cpu()
        if not rows.isfinite().all():
            raise UserError(
                f"moments of autoencoder {self.vae} overflow float16; use another one, or --precision fp32"
            )
        return rows.numpy()


def _mean_and_std(parameters: torch.Tensor) -> torch.Tensor:
    """Convert mean and log-variance (n,2C,h,w) to mean and standard deviation, in fp32.

    The log-variance is clamped as in diffusers' DiagonalGaussianDistribution.
    """
    mean, logvar = parameters.float().chunk(2, dim=1)
    return torch.cat([mean, torch.exp(0.5 * logvar.clamp(-30.0, 20.0))], 1)


@final
class PixelEncoder(RowEncoder):
    """The pixels, uint8 (n,1,c,S,S). Mirror images are made when they are read."""

    kind: Kind = "pixels"
    views = 1

    def __init__(self, size: int, channels: int = 3) -> None:
        self.shape = self.image_shape = (channels, size, size)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `RowEncoder.__call__`."""
        return images[:, None]


def make_row_encoder(vae: str, size: int, *, flip: bool, precision: str, device: torch.device) -> RowEncoder:
    """Return the encoder for `--vae`: a published name, a folder, or "none" for pixels.

    Raises UserError for an unknown precision, and for an autoencoder that is missing or does not fit.
    """
    if precision not in PRECISIONS:
        raise UserError(f"--precision must be fp32 or bf16, got '{precision}'; for example --precision fp32")
    if vae == PIXELS:
        return PixelEncoder(size)
    return MomentsEncoder(find_vae(vae), size, flip=flip, precision=precision, device=device)


# --- Encoding ---


@dataclass(frozen=True)
class EncodingTask:
    """Images to encode, with their split, their encoder and the number of images per call of it."""

    source: ImageSource
    split: np.ndarray
    encoder: RowEncoder
    batch: int


def encode(
    task: EncodingTask, rows: Sequence[int], *, pool: ThreadPoolExecutor, advance: Advance
) -> ShardRows:
    """Read, crop and encode some rows of a source. Unreadable images are listed and left out.

    Batches start at the first of `rows`, so that the content of a shard does not depend on the shards before
    it.
    """
    kept: list[int] = []
    parts, pixels, unreadable = [], [], []
    for numbers, loaded in _batches(task, rows, pool):
        # Separate the images from the reasons why others cannot be read.
        good = []
        for number, image in zip(numbers, loaded, strict=True):
            if isinstance(image, str):
                unreadable.append((task.source.ids[number], image))
            else:
                good.append((number, image))
        if good:
            parts.append(task.encoder(np.stack([image for _, image in good])))
        # Pixels are kept for the evaluation only.
        kept += [number for number, _ in good]
        pixels += [image for number, image in good if task.split[number] != TRAIN]
        advance(len(numbers))
    # A shard without a readable image is valid: its arrays have no rows.
    encoder = task.encoder
    dtype = np.float16 if encoder.kind == "moments" else np.uint8
    return ShardRows(
        ids=[task.source.ids[number] for number in kept],
        labels=[task.source.labels[number] for number in kept],
        split=[int(task.split[number]) for number in kept],
        data=np.concatenate(parts) if parts else np.empty((0, encoder.views, *encoder.shape), dtype),
        images=np.stack(pixels) if pixels else np.empty((0, *encoder.image_shape), np.uint8),
        unreadable=unreadable,
    )


def _batches(
    task: EncodingTask, rows: Sequence[int], pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[int], list[np.ndarray | str]]]:
    """Yield batches of row numbers with their images (c,S,S), or the reason why one cannot be read.

    The threads of the pool read the next batch while the caller works on the current one.
    """
    channels, size = task.encoder.image_shape[:2]

    def load(number: int) -> np.ndarray | str:
        try:
            return decode_image(task.source.content(number), channels, size)
        except UnreadableImage as error:
            return reason(error)

    def submit(batch: Sequence[int]) -> list[Future[np.ndarray | str]]:
        return [pool.submit(load, number) for number in batch]

    # Two batches are in flight: one that is returned, one that is read ahead.
    batches = [rows[k : k + task.batch] for k in range(0, len(rows), task.batch)]
    ahead = submit(batches[0])
    for number, batch in enumerate(batches):
        current, ahead = ahead, submit(batches[number + 1]) if number + 1 < len(batches) else []
        yield batch, [future.result() for future in current]
