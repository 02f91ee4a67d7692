"""The interface of a data set, the training settings it sets by default, and `get_dataset`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from stbench.core.errors import UserError
from stbench.core.registry import DATASETS, lookup
from stbench.data.spec import DataSpec


@dataclass(frozen=True)
class Preset:
    """Settings of a run that the data set decides unless the user sets them."""

    size: str
    """Backbone size."""
    batch: int
    lr: float
    betas: tuple[float, float]
    weight_decay: float
    adam_eps: float
    warmup: int
    """Steps of linear warm-up to `lr`, which stays constant afterwards."""
    warmup_share: float | None
    """The warm-up is at most this share of the steps; None for no limit."""
    clip: float | None
    """Maximum gradient norm; None for no clipping."""
    ema_decay: float
    ema_warmup: bool
    """Whether the decay after n updates is min(ema_decay, (1+n)/(10+n))."""
    label_drop: float
    """Probability with which a label is replaced by the null label."""
    steps: int
    eval_points: tuple[int, ...]
    """Steps of the last stage at which it is evaluated."""
    eval_samples: int
    eval_labels: str
    """ "balanced" or "random"."""
    eval_steps: int
    """Sampler steps."""
    eval_guidance: tuple[float, ...]
    """Guidance scales. The first is evaluated at every point, the others where `eval.extras` says."""


MEAN_BATCH = 256
"""Rows per call of `Dataset.mean_latent`."""


class Dataset(ABC):
    """Normalised latents (C,h,w) and labels in 0..K-1 by row, and a decoder to uint8 images (c,H,W)."""

    name: str
    channels: int
    """Latent channels C; c for pixels."""
    input_size: int
    """Height and width of the latents."""
    classes: int
    """Number of classes K."""
    size: int
    """Number of training images."""
    image_shape: tuple[int, int, int]
    """(c,H,W)."""
    preset: Preset
    extractor: str
    """Name of the torch-fidelity feature extractor that its images are evaluated with."""
    decoder: str
    """Hash of the weights that decode latents to images."""
    fingerprint: str
    """Hash of images, labels, split, autoencoder and normalisation."""
    references: Mapping[str, Callable[[], Tensor]]
    """Reference sets, uint8 (N,c,H,W). "train" is the main one; "all" is optional and gives `fid_all`."""
    from_path: ClassVar[bool] = False
    """Whether it is built from a `DataSpec`, that is from `--data PATH`."""
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Backbone family, or "family-size", -> fields of `preset` that it was published with on these data."""

    @classmethod
    def preset_for(cls, family: str, size: str | None = None) -> Preset:
        """Return `preset`, updated with the published settings of a backbone family and then of its size."""
        changes = {**cls.published.get(family, {}), **cls.published.get(f"{family}-{size}", {})}
        return replace(cls.preset, **changes)

    def effective(self, data: DataSpec) -> DataSpec:
        """The specification with the values that are used where `data` leaves them to the data set."""
        return data

    @abstractmethod
    def latents(self, index: Tensor, posterior_noise: Tensor) -> Tensor:
        """Return normalised posterior samples (B,C,h,w) of rows `index` (B,), on the data set's device."""

    @property
    def row_count(self) -> int:
        """Number of rows that `order` draws from: `size`, unless there are rows for mirror images."""
        return self.size

    def mean_latent(self) -> Tensor:
        """Return the mean of the normalised latents of all rows (C,h,w), float32 on the CPU.

        Reads each row once, `MEAN_BATCH` at a time.
        """
        shape = (self.channels, self.input_size, self.input_size)
        total = torch.zeros(shape, dtype=torch.float64)
        for index in torch.split(torch.arange(self.row_count), MEAN_BATCH):
            means = self.latents(index, torch.zeros(len(index), *shape))
            total += means.double().sum(0).cpu()
        return (total / self.row_count).float()

    @abstractmethod
    def labels(self, index: Tensor) -> Tensor:
        """Return labels (B,) int64 of rows `index` (B,), on the data set's device."""

    @abstractmethod
    def images(self, index: Tensor) -> Tensor:
        """Return clean images, uint8 (B,c,H,W), of rows `index` (B,), on the data set's device.

        Raises UserError if the data set has no images.
        """

    @abstractmethod
    def heldout(self) -> tuple[Tensor, Tensor]:
        """Return normalised posterior means (M,C,h,w) and labels (M,) of images that are never trained on."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Decode normalised latents (B,C,h,w) to uint8 images (B,c,H,W), on the device of `z`."""

    @abstractmethod
    def train_images(self) -> Tensor:
        """Return the training images, uint8 (N,c,H,W), on the CPU."""

    @abstractmethod
    def heldout_images(self) -> Tensor:
        """Return the held-out images, uint8 (M,c,H,W), on the CPU."""

    @abstractmethod
    def order(self, seed: int, images_seen: int, count: int) -> Tensor:
        """Return the rows (count,) int64 of the global batch after `images_seen` images, on the CPU."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Dataset:
        """Return a copy with latents and labels on `device`."""


def get_dataset(name: str, data: DataSpec | None = None) -> Dataset:
    """Return the data set registered under `name`, on the CPU. Each is built once.

    Raises UserError for an unknown name, for a missing or superfluous path, and for a path whose content
    differs from `data.fingerprint`.
    """
    cls = lookup(DATASETS, name)
    if cls.from_path and data is None:
        raise UserError(
            f"data set '{name}' requires --data PATH: a folder made by `stbench data prepare`, "
            f"a folder in REPA's layout, or a folder of images"
        )
    if data is not None and not cls.from_path:
        raise UserError(f"data set '{name}' does not accept --data; drop it, or use --dataset custom")
    if data is None:
        return _build(name, None)
    # Two runs on the same path share one data set, whether the fingerprint is known yet or not.
    found = _build(name, data.model_copy(update=UNKNOWN))
    if data.fingerprint not in ("", found.fingerprint):
        raise UserError(
            f"{data.path} changed since the run started: expected fingerprint {data.fingerprint[:12]}, "
            f"found {found.fingerprint[:12]}; restore the original data"
        )
    decoder = found.effective(data).vae_sha256 if data.vae_sha256 else ""
    if decoder not in ("", data.vae_sha256):
        raise UserError(
            f"the autoencoder of {data.path} changed since the run started: expected sha256 "
            f"{data.vae_sha256[:12]}, found {decoder[:12]}; restore the original one"
        )
    return found


UNKNOWN = {"fingerprint": "", "vae_sha256": ""}
"""Fields of a `DataSpec` that are not known before the data are opened."""

_built: dict[tuple[str, DataSpec | None], Dataset] = {}


def _build(name: str, data: DataSpec | None) -> Dataset:
    if (name, data) not in _built:
        cls = lookup(DATASETS, name)
        dataset = cls() if data is None else cls(data)
        require_interface(name, dataset)
        _built[name, data] = dataset
        if data is not None:  # a specification with effective values names the same data set
            _built[name, dataset.effective(data).model_copy(update=UNKNOWN)] = dataset
    return _built[name, data]


def require_interface(name: str, dataset: Any) -> None:
    """Check what a run reads of a data set, so that a faulty plug-in fails before training.

    Raises UserError.
    """
    if not isinstance(dataset, Dataset):
        raise UserError(f"data set '{name}' must be a {Dataset.__module__}.Dataset; derive its class from it")
    for attribute in Dataset.__annotations__:
        if inspect.getattr_static(dataset, attribute, None) is None:  # a property may need missing files
            raise UserError(
                f"data set '{name}' has no attribute '{attribute}'; see {Dataset.__module__}.Dataset"
            )
    references = dataset.references
    if not isinstance(references, Mapping) or not callable(references.get("train")):
        raise UserError(
            f"data set '{name}' must have a reference set 'train', a function that returns images, in "
            f"references; found {references!r:.80}"
        )
