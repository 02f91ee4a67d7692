"""Data sets that are read from a path: prepared latents, REPA's layout, images encoded on the fly, pixels.

A row of the training set is an image, or its mirror: rows 0..size-1 are the images, size..2 size-1 the mirror
images in the same order.
"""

from __future__ import annotations

import copy
import hashlib
from functools import cache, lru_cache
from typing import ClassVar, final

import numpy as np
import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.registry import DATASETS
from stbench.core.rng import generator
from stbench.data import presets
from stbench.data.dataset import Dataset
from stbench.data.open import EncodedImages, open_data
from stbench.data.prefetch import Prefetch
from stbench.data.shards import HELDOUT, REFERENCE
from stbench.data.spec import DataSpec
from stbench.models.autoencoder import Autoencoder, VAEInfo, find_vae, to_float, to_uint8

DECODED = 16
"""Latents that are decoded at a time."""
RESIDENT_SHARE = 0.4
"""Of a device's free memory that moments may take without being asked to."""


class PathDataset(Dataset):
    """Latents of a user's images. An epoch is a permutation of them, and a batch may straddle two epochs.

    Held out are min(1000, 5 %) of the images, at least one, chosen by a hash of their names. References for
    evaluation are the training images whose pixels are kept, up to 10,000 of them: `train_images` returns
    these, not all.
    """

    from_path = True
    channels = 4
    size = 0
    classes = 0
    extractor = "inception-v3-compat"
    expected: ClassVar[tuple[int, int] | None] = None
    """Image size and classes that a path must hold; None for any."""

    def __init__(self, data: DataSpec) -> None:
        found = open_data(data)
        self._check(found, data)
        self._found, self._data, self._device = found, data, torch.device("cpu")
        self._rows = np.flatnonzero(found.split != HELDOUT)
        self._heldout_rows = np.flatnonzero(found.split == HELDOUT)
        if not len(self._rows) or not len(self._heldout_rows):
            raise UserError(f"{data.path} holds too few readable images to train on some and hold some out")
        self.size, self.classes, self.image_shape = len(self._rows), found.classes, found.image_shape
        self.channels = found.shape[0] // (2 if found.kind == "moments" else 1)
        self.input_size = found.shape[-1]
        self.extractor = data.extractor or type(self).extractor
        self.flip = found.flip if data.flip is None else data.flip
        """Whether half of the images, drawn at random, are seen as their mirror image."""
        self.fingerprint = hashlib.sha256(f"{found.fingerprint}{self.flip}".encode()).hexdigest()
        self._labels = torch.from_numpy(found.labels[self._rows])
        mean = self._normalised(self._read(self._heldout_rows, np.zeros_like(self._heldout_rows)), None)
        self._heldout = mean, torch.from_numpy(found.labels[self._heldout_rows])
        self.references = {"train": self.train_images, "all": self._all_images}
        self._epoch = lru_cache(maxsize=4)(self._permutation)
        self._resident: Tensor | None = None
        self._ahead = Prefetch(self._host_rows)

    def _check(self, found: EncodedImages, data: DataSpec) -> None:
        held = (found.image_shape[1], found.classes)
        if self.expected is not None and held != self.expected:
            raise UserError(
                f"{self.name} wants {self.expected[1]} classes at {self.expected[0]} pixels, {data.path} "
                f"holds {held[1]} at {held[0]}; use --dataset custom"
            )
        if data.flip and not found.mirrored:
            raise UserError(
                f"{data.path} holds no moments of mirror images; prepare it with --flip, "
                f"or leave data.flip out"
            )

    @property
    def decoder(self) -> str:  # type: ignore[override]
        """Hash of the autoencoder, "pixels" for none. Raises UserError if it is missing or another one."""
        return "pixels" if self._found.kind == "pixels" else self._vae().sha256

    def _vae(self) -> VAEInfo:
        own = not self._data.vae or self._data.vae == self._found.vae
        try:
            vae = find_vae(self._data.vae or self._found.vae)
        except UserError as error:
            raise UserError(f"{error}, as --set data.vae=PATH (`stbench sample`: --vae PATH)") from error
        if own and self._found.vae_sha256 not in ("", vae.sha256):
            raise UserError(
                f"{vae.folder} is not the autoencoder of {self._data.path}: expected sha256 "
                f"{self._found.vae_sha256[:12]}, found {vae.sha256[:12]}; give the right one, or decode "
                f"with this one, by --set data.vae=PATH"
            )
        shape = (vae.latent_channels, vae.channels, vae.factor * self.input_size)
        if shape != (self.channels, self.image_shape[0], self.image_shape[1]):
            raise UserError(
                f"autoencoder {vae.name} makes {shape[1]}x{shape[2]}x{shape[2]} images from {shape[0]} "
                f"latent channels, {self._data.path} was made of {self.image_shape} with {self.channels}; "
                f"give another with --set data.vae=PATH"
            )
        return vae

    def decoded_by(self, vae: str) -> PathDataset:
        """A copy that decodes with another autoencoder. Raises UserError for pixels, which need none."""
        if self._found.kind == "pixels":
            raise UserError(f"{self._data.path} holds pixels, which no autoencoder decodes; leave --vae out")
        other = copy.copy(self)
        other._data = self._data.model_copy(update={"vae": vae})
        return other

    def latents(self, index: Tensor, posterior_noise: Tensor) -> Tensor:
        """Normalised posterior samples (mean + std * noise - shift) * scale (B,C,h,w); pixels in [-1,1]."""
        if self._resident is not None:
            stored, view = self._places(index.cpu())
            place = torch.from_numpy(stored).to(self._device, non_blocking=True)
            which = torch.from_numpy(view).to(self._device, non_blocking=True)
            raw = self._resident[place, which % self._resident.shape[1]]
        else:
            host = self._ahead.take(index)
            host = self._host_rows(index) if host is None else host
            raw = host.to(self._device, non_blocking=True)
        noise = posterior_noise.to(self._device, non_blocking=True)
        return self._mirrored(self._normalised(raw, noise), index)

    def _places(self, index: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Stored row and view (0, or 1 for the mirror image), each (B,), of training rows."""
        number = index.numpy()
        return self._rows[number % self.size], number // self.size

    def _read(self, rows: np.ndarray, view: np.ndarray) -> Tensor:
        views = view if self._found.kind == "moments" else np.zeros_like(view)
        return torch.from_numpy(self._found.reader.read(rows, views))

    def _host_rows(self, index: Tensor) -> Tensor:
        """Stored rows (B,...) of training rows, on the host, in pinned memory for a GPU."""
        found = self._read(*self._places(index))
        return found.pin_memory() if self._device.type == "cuda" else found

    def _normalised(self, raw: Tensor, noise: Tensor | None) -> Tensor:
        if self._found.kind == "pixels":
            return to_float(raw)
        mean, std = raw.float().chunk(2, dim=1)
        z = mean if noise is None else mean + std * noise
        return (z - self._found.shift) * self._found.scale

    def _mirrored(self, z: Tensor, index: Tensor) -> Tensor:
        """Pixels are mirrored here; moments of mirror images are stored."""
        if self._found.kind == "moments" or not self.flip:
            return z
        mirror = (index >= self.size).to(z.device, non_blocking=True).view(-1, 1, 1, 1)
        return torch.where(mirror, z.flip(-1), z)

    def labels(self, index: Tensor) -> Tensor:
        """Labels (B,); a mirror image has its image's."""
        return self._labels[(index % self.size).to(self._labels.device, non_blocking=True)]

    def images(self, index: Tensor) -> Tensor:
        """Pixels (B,c,H,W) of the rows, mirror images mirrored. Raises UserError if only latents are kept."""
        if not self._found.all_pixels:
            raise UserError(
                f"{self._data.path} keeps latents and no images for an encoder to look at; train from images "
                f"or from REPA's layout, or give cached tokens with --set recipe.encoder=FOLDER"
            )
        stored, view = self._places(index.cpu())
        pixels = torch.from_numpy(self._found.pixels(stored))
        mirror = torch.from_numpy(view == 1).view(-1, 1, 1, 1)
        return torch.where(mirror, pixels.flip(-1), pixels).to(self._device, non_blocking=True)

    def heldout(self) -> tuple[Tensor, Tensor]:
        """Normalised posterior means (M,C,h,w) and labels (M,)."""
        return self._heldout

    def decode(self, z: Tensor) -> Tensor:
        """Normalised latents (B,C,h,w) to uint8 images (B,c,H,W), 16 at a time."""
        if self._found.kind == "pixels":
            return to_uint8(z)
        network = _decoder(self._vae(), str(z.device))
        z = z.float() / self._found.scale + self._found.shift
        return torch.cat([to_uint8(network.decode(part)) for part in torch.split(z, DECODED)])

    def train_images(self) -> Tensor:
        """The training images that are kept as references, uint8 (R,c,H,W), on the host."""
        return torch.from_numpy(self._found.pixels(np.flatnonzero(self._found.split == REFERENCE)))

    def heldout_images(self) -> Tensor:
        """The held-out images, uint8 (M,c,H,W), on the host."""
        return torch.from_numpy(self._found.pixels(self._heldout_rows))

    def _all_images(self) -> Tensor:
        return torch.cat([self.train_images(), self.heldout_images()])

    def _permutation(self, seed: int, epoch: int) -> Tensor:
        """The rows of one epoch (size,): every image once, as itself or mirrored."""
        seen = epoch * self.size
        rows = torch.randperm(self.size, generator=generator(seed, "data", seen))
        if self.flip:
            rows += self.size * torch.randint(2, (self.size,), generator=generator(seed, "flip", seen))
        return rows

    def order(self, seed: int, images_seen: int, count: int) -> Tensor:
        """Rows (count,) from place `images_seen` on of the epochs laid end to end; nothing before is drawn.

        Also begins to read them, and the batch after them, ahead.
        """
        rows = self._stretch(seed, images_seen, count)
        if self._resident is None:
            self._ahead.announce([rows, self._stretch(seed, images_seen + count, count)])
        return rows

    def _stretch(self, seed: int, start: int, count: int) -> Tensor:
        stop = start + count
        parts = []
        for epoch in range(start // self.size, (stop - 1) // self.size + 1):
            begin = epoch * self.size
            parts.append(self._epoch(seed, epoch)[max(start - begin, 0) : stop - begin])
        return torch.cat(parts)

    def to(self, device: torch.device | str) -> PathDataset:
        """A copy whose labels and held-out latents lie on `device`, and whose moments do where they fit."""
        moved = copy.copy(self)
        moved._device = torch.device(device)
        moved._labels = self._labels.to(device)
        moved._heldout = self._heldout[0].to(device), self._heldout[1].to(device)
        moved.references = {"train": moved.train_images, "all": moved._all_images}
        moved._ahead = Prefetch(moved._host_rows)
        moved._resident = moved._all_rows() if moved._wants_resident() else None
        return moved

    def _wants_resident(self) -> bool:
        if self._data.resident != "auto":
            return self._data.resident == "yes"
        if self._device.type != "cuda":
            return self._found.in_memory
        free = torch.cuda.mem_get_info(self._device)[0]
        return self._found.reader.nbytes <= RESIDENT_SHARE * free

    def _all_rows(self) -> Tensor:
        """All stored rows (N,V,...) on the device."""
        parts = self._found.reader.parts()
        first = next(parts)
        total = torch.empty(
            (len(self._found.labels), *first.shape[1:]),
            dtype=torch.from_numpy(first[:0].copy()).dtype,
            device=self._device,
        )
        start = 0
        for part in (first, *parts):
            total[start : start + len(part)] = torch.from_numpy(np.array(part)).to(self._device)
            start += len(part)
        return total


@cache
def _decoder(vae: VAEInfo, device: str) -> Autoencoder:
    return vae.load().to(device)


@final
@DATASETS.register_module(name="imagenet256")
class ImageNet256(PathDataset):
    """ImageNet at 256 pixels, from --data PATH; every backbone's published training settings."""

    name = "imagenet256"
    input_size = 32
    size = 1_281_167
    classes = 1000
    image_shape = (3, 256, 256)
    preset = presets.IMAGENET
    published = presets.IMAGENET256
    expected = (256, 1000)


@final
@DATASETS.register_module(name="imagenet512")
class ImageNet512(PathDataset):
    """ImageNet at 512 pixels, from --data PATH; every backbone's published training settings."""

    name = "imagenet512"
    input_size = 64
    size = 1_281_167
    classes = 1000
    image_shape = (3, 512, 512)
    preset = presets.IMAGENET
    published = presets.IMAGENET512
    expected = (512, 1000)


@final
@DATASETS.register_module(name="custom")
class Custom(PathDataset):
    """Any images, from --data PATH: prepared latents, REPA's layout, or a small folder."""

    name = "custom"
    input_size = 32
    image_shape = (3, 256, 256)
    preset = presets.CUSTOM
    published = presets.CUSTOM_SIZES
