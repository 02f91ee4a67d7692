"""Images in memory, trained on as pixels: the base of small data sets, such as those of a plug-in."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import torch
from torch import Tensor

from stbench.core.device import upload
from stbench.core.errors import UserError
from stbench.core.rng import generator
from stbench.data.dataset import Dataset
from stbench.models.autoencoder import to_float, to_uint8


class InMemory(Dataset):
    """Square uint8 images of K classes in memory. The latents are the pixels, in [-1,1].

    Batches are drawn with replacement. A subclass sets the facts of `Dataset`: `name`, `channels`,
    `input_size`, `classes`, `size`, `image_shape`, `preset` and `extractor`.
    """

    decoder = "pixels"

    def __init__(self, images: Tensor, labels: Tensor, rows: Tensor, heldout_rows: Tensor) -> None:
        """Train on the `rows` of `images` (N,c,H,H) with `labels` (N,) in 0..K-1; never on `heldout_rows`.

        Raises UserError if the facts of the class are others.
        """
        found = (tuple(images.shape[1:]), len(rows), int(labels.max()) < self.classes)
        if found != (self.image_shape, self.size, True):
            raise UserError(
                f"data set '{self.name}' must have {self.size} training images of shape {self.image_shape} "
                f"with labels below {self.classes}, found {len(rows)} of shape {found[0]} with labels up to "
                f"{int(labels.max())}; correct the attributes of its class"
            )
        self._device = torch.device("cpu")
        self._images, self._rows, self._heldout_rows = images, rows, heldout_rows
        self._labels, self._heldout_labels = labels[rows], labels[heldout_rows]
        self.references = {"train": self.train_images, "all": lambda: self._images}
        self.fingerprint = self._hash(images, labels, rows, heldout_rows)

    def _hash(self, *parts: Tensor) -> str:
        content = b"".join(part.contiguous().numpy().tobytes() for part in parts) + self.decoder.encode()
        return hashlib.sha256(content).hexdigest()

    def latents(self, index: Tensor, posterior_noise: Tensor) -> Tensor:
        """Return the pixels (B,c,H,H), float32."""
        return to_float(self.images(index))

    def labels(self, index: Tensor) -> Tensor:
        """Return labels (B,)."""
        return self._labels[index.to(self._labels.device, non_blocking=True)]

    def images(self, index: Tensor) -> Tensor:
        """Return images, uint8 (B,c,H,H)."""
        return upload(self._images[self._rows[index]], self._device)

    def heldout(self) -> tuple[Tensor, Tensor]:
        """Return the pixels (M,c,H,H) and labels (M,) of the held-out images."""
        return to_float(upload(self.heldout_images(), self._device)), self._heldout_labels

    def decode(self, z: Tensor) -> Tensor:
        """Round pixels (B,c,H,H) to uint8."""
        return to_uint8(z)

    def train_images(self) -> Tensor:
        """Return the training images, uint8 (size,c,H,H)."""
        return self._images[self._rows]

    def heldout_images(self) -> Tensor:
        """Return the held-out images, uint8 (M,c,H,H)."""
        return self._images[self._heldout_rows]

    def order(self, seed: int, images_seen: int, count: int) -> Tensor:
        """Return rows drawn with replacement. They do not depend on which rows were drawn before."""
        return torch.randint(self.size, (count,), generator=generator(seed, "data", images_seen))

    def to(self, device: torch.device | str) -> Any:
        """Return a copy with labels on `device`, to which batches are copied."""
        moved = copy.copy(self)
        moved._device = torch.device(device)
        moved._labels, moved._heldout_labels = self._labels.to(device), self._heldout_labels.to(device)
        return moved
