"""Data sets that are read from `--data PATH`: a prepared data set, a folder in REPA's layout, or images."""

from __future__ import annotations

import copy
import hashlib
from functools import cache
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from stbench.core.device import upload
from stbench.core.errors import UserError
from stbench.data.dataset import Dataset
from stbench.data.encoded import EncodedImages
from stbench.data.epochs import Epochs
from stbench.data.open import open_data
from stbench.data.prefetch import Prefetch
from stbench.data.spec import INCEPTION, DataSpec
from stbench.data.split import HELDOUT, REFERENCE
from stbench.models.autoencoder import Autoencoder, VAEInfo, find_vae, to_float, to_uint8

DECODE_BATCH = 16
"""Latents per call of the decoder. The images depend on it in the last bit."""

RESIDENT_SHARE = 0.4
"""Share of a device's free memory that moments may take with `data.resident=auto`."""


class PathDataset(Dataset):
    """Latents of a user's images, trained on in epochs: every image once per epoch, in random order.

    A row of the training set is an image or its mirror image: rows 0..size-1 are the images, rows
    size..2*size-1 their mirror images in the same order. Held out are min(1000, 5 %) of the images, at least
    one, chosen by a hash of their names. The references of the evaluation are the training images whose
    pixels are kept, up to 10,000: `train_images` returns these, not all training images.
    """

    from_path = True
    channels = 4
    size = 0
    classes = 0
    extractor = INCEPTION
    expected: ClassVar[tuple[int, int] | None] = None
    """Required image size and number of classes; None for any."""

    def __init__(self, data: DataSpec) -> None:
        found = open_data(data)
        self._check(found, data)
        self._found, self._data, self._device = found, data, torch.device("cpu")
        # Split.
        self._rows = np.flatnonzero(found.split != HELDOUT)
        self._heldout_rows = np.flatnonzero(found.split == HELDOUT)
        if not len(self._rows) or not len(self._heldout_rows):
            raise UserError(
                f"{data.path} has too few readable images to train on some and hold out others; add images"
            )
        # Facts of the interface.
        self.size, self.classes, self.image_shape = len(self._rows), found.classes, found.image_shape
        self.channels = found.shape[0] // (2 if found.kind == "moments" else 1)
        self.input_size = found.shape[-1]
        self.extractor = data.extractor or type(self).extractor
        self.flip = found.flip if data.flip is None else data.flip
        """Whether each image is replaced by its mirror image with probability 1/2."""
        self.fingerprint = hashlib.sha256(f"{found.fingerprint}{self.flip}".encode()).hexdigest()
        self.references = {"train": self.train_images, "all": self._all_images}
        # Labels and held-out latents, which are small, are loaded; moments stay on disk until `to`.
        self._labels = torch.from_numpy(found.labels[self._rows])
        mean = self._normalise(self._read(self._heldout_rows, np.zeros_like(self._heldout_rows)), None)
        self._heldout = mean, torch.from_numpy(found.labels[self._heldout_rows])
        self._epochs = Epochs(self.size, self.flip)
        self._resident: Tensor | None = None
        self._prefetch = Prefetch(self._read_batch)

    def _check(self, found: EncodedImages, data: DataSpec) -> None:
        size, classes = found.image_shape[1], found.classes
        if self.expected is not None and (size, classes) != self.expected:
            raise UserError(
                f"{self.name} requires {self.expected[1]} classes at {self.expected[0]} pixels, {data.path} "
                f"has {classes} at {size}; use --dataset custom"
            )
        if data.flip and not found.has_mirrored:
            raise UserError(
                f"{data.path} has no moments of mirror images; prepare it with --flip, or leave data.flip out"
            )

    def effective(self, data: DataSpec) -> DataSpec:
        """The specification with the mirroring, the extractor and the autoencoder that are used."""
        try:
            vae = "" if self._found.kind == "pixels" else self._vae().sha256
        except UserError:  # missing or a wrong one, which only decoding requires
            vae = ""
        return data.model_copy(update={"flip": self.flip, "extractor": self.extractor, "vae_sha256": vae})

    # --- Decoding ---

    @property
    def decoder(self) -> str:  # type: ignore[override]
        """Hash of the autoencoder, "pixels" for none. Raises UserError if it is missing or a wrong one."""
        return "pixels" if self._found.kind == "pixels" else self._vae().sha256

    def _vae(self) -> VAEInfo:
        """Return the autoencoder that decodes: the one the data were made with, or `data.vae`."""
        is_own = not self._data.vae or self._data.vae == self._found.vae
        try:
            vae = find_vae(self._data.vae or self._found.vae)
        except UserError as error:
            raise UserError(f"{error}, as --set data.vae=PATH (`stbench sample`: --vae PATH)") from error
        if is_own and self._found.vae_sha256 not in ("", vae.sha256):
            raise UserError(
                f"{vae.folder} is not the autoencoder of {self._data.path}: expected sha256 "
                f"{self._found.vae_sha256[:12]}, found {vae.sha256[:12]}; give the right one, or decode "
                f"with this one, with --set data.vae=PATH"
            )
        shape = (vae.latent_channels, vae.channels, vae.factor * self.input_size)
        if shape != (self.channels, self.image_shape[0], self.image_shape[1]):
            raise UserError(
                f"autoencoder {vae.name} makes {shape[1]}x{shape[2]}x{shape[2]} images from {shape[0]} "
                f"latent channels, {self._data.path} was made from {self.image_shape} with {self.channels}; "
                f"give another one with --set data.vae=PATH"
            )
        return vae

    def decoded_by(self, vae: str) -> PathDataset:
        """Return a copy that decodes with another autoencoder. Raises UserError for pixels."""
        if self._found.kind == "pixels":
            raise UserError(f"{self._data.path} contains pixels, which need no autoencoder; leave --vae out")
        other = copy.copy(self)
        other._data = self._data.model_copy(update={"vae": vae})
        return other

    def decode(self, z: Tensor) -> Tensor:
        """Decode normalised latents (B,C,h,w) to uint8 images (B,c,H,W)."""
        if self._found.kind == "pixels":
            return to_uint8(z)
        network = _load_decoder(self._vae(), str(z.device))
        z = z.float() / self._found.scale + self._found.shift
        return torch.cat([to_uint8(network.decode(part)) for part in torch.split(z, DECODE_BATCH)])

    # --- Rows ---

    @property
    def row_count(self) -> int:
        """Number of images, and of their mirror images if they are trained on."""
        return self.size * (2 if self.flip else 1)

    def latents(self, index: Tensor, posterior_noise: Tensor) -> Tensor:
        """Return normalised samples (mean + std * noise - shift) * scale (B,C,h,w); pixels in [-1,1]."""
        if self._resident is not None:
            stored, view = self._stored_rows(index.cpu())
            row = torch.from_numpy(stored).to(self._device, non_blocking=True)
            which = torch.from_numpy(view).to(self._device, non_blocking=True)
            # Pixels have a single view, which is mirrored below.
            raw = self._resident[row, which % self._resident.shape[1]]
        else:
            ready = self._prefetch.take(index)
            batch = self._read_batch(index) if ready is None else ready
            raw = batch.to(self._device, non_blocking=True)
        noise = upload(posterior_noise, self._device)
        return self._mirror_pixels(self._normalise(raw, noise), index)

    def _stored_rows(self, index: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Return stored row and view (0, or 1 for the mirror image), each (B,), of training rows."""
        number = index.numpy()
        return self._rows[number % self.size], number // self.size

    def _read(self, rows: np.ndarray, view: np.ndarray) -> Tensor:
        views = view if self._found.kind == "moments" else np.zeros_like(view)
        return torch.from_numpy(self._found.rows.read(rows, views))

    def _read_batch(self, index: Tensor) -> Tensor:
        """Return the stored data (B,...) of training rows on the CPU, in pinned memory for a GPU."""
        found = self._read(*self._stored_rows(index))
        return found.pin_memory() if self._device.type == "cuda" else found

    def _normalise(self, raw: Tensor, noise: Tensor | None) -> Tensor:
        """Return normalised posterior samples, or means without noise; pixels in [-1,1]."""
        if self._found.kind == "pixels":
            return to_float(raw)
        mean, std = raw.float().chunk(2, dim=1)
        z = mean if noise is None else mean + std * noise
        return (z - self._found.shift) * self._found.scale

    def _mirror_pixels(self, z: Tensor, index: Tensor) -> Tensor:
        """Mirror the pixels of mirrored rows. The moments of mirror images are stored instead."""
        if self._found.kind == "moments" or not self.flip:
            return z
        mirror = (index >= self.size).to(z.device, non_blocking=True).view(-1, 1, 1, 1)
        return torch.where(mirror, z.flip(-1), z)

    def labels(self, index: Tensor) -> Tensor:
        """Return labels (B,). A mirror image has the label of its image."""
        return self._labels[(index % self.size).to(self._labels.device, non_blocking=True)]

    def images(self, index: Tensor) -> Tensor:
        """Return pixels (B,c,H,W), mirrored for mirrored rows. Raises UserError if there are only latents."""
        if not self._found.has_all_pixels:
            raise UserError(
                f"{self._data.path} contains latents but no images for an encoder; train from images "
                f"or from REPA's layout, or give cached tokens with --set recipe.encoder=FOLDER"
            )
        stored, view = self._stored_rows(index.cpu())
        pixels = torch.from_numpy(self._found.pixels(stored))
        mirror = torch.from_numpy(view == 1).view(-1, 1, 1, 1)
        return upload(torch.where(mirror, pixels.flip(-1), pixels), self._device)

    def heldout(self) -> tuple[Tensor, Tensor]:
        """Return normalised posterior means (M,C,h,w) and labels (M,)."""
        return self._heldout

    def train_images(self) -> Tensor:
        """Return the training images that are kept as references, uint8 (R,c,H,W), on the CPU."""
        return torch.from_numpy(self._found.pixels(np.flatnonzero(self._found.split == REFERENCE)))

    def heldout_images(self) -> Tensor:
        """Return the held-out images, uint8 (M,c,H,W), on the CPU."""
        return torch.from_numpy(self._found.pixels(self._heldout_rows))

    def _all_images(self) -> Tensor:
        return torch.cat([self.train_images(), self.heldout_images()])

    def order(self, seed: int, images_seen: int, count: int) -> Tensor:
        """Return the rows (count,) of the next batch, and start to read it and the batch after it."""
        rows = self._epochs.rows(seed, images_seen, count)
        if self._resident is None:
            following = self._epochs.rows(seed, images_seen + count, count)
            self._prefetch.schedule([rows, following])
        return rows

    # --- Devices ---

    def to(self, device: torch.device | str) -> PathDataset:
        """Return a copy with labels and held-out latents on `device`, and all moments if they fit."""
        moved = copy.copy(self)
        moved._device = torch.device(device)
        moved._labels = self._labels.to(device)
        moved._heldout = self._heldout[0].to(device), self._heldout[1].to(device)
        moved.references = {"train": moved.train_images, "all": moved._all_images}
        moved._prefetch = Prefetch(moved._read_batch)
        moved._resident = moved._load_all() if moved._fits_device() else None
        return moved

    def _fits_device(self) -> bool:
        if self._data.resident != "auto":
            return self._data.resident == "yes"
        if self._device.type != "cuda":  # the operating system caches mapped files, so only copies are bad
            return self._found.in_memory
        free = torch.cuda.mem_get_info(self._device)[0]
        return self._found.rows.nbytes <= RESIDENT_SHARE * free

    def _load_all(self) -> Tensor:
        """Return all stored rows (N,V,...) on the device."""
        parts = self._found.rows.parts()
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
def _load_decoder(vae: VAEInfo, device: str) -> Autoencoder:
    return vae.load().to(device)
