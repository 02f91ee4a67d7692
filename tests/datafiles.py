"""Small data in the real formats: an autoencoder of SD's shape, images in class folders, REPA's layout."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch_fidelity import register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from stbench.data.prepare import PrepareOptions, open_task, prepare
from stbench.data.shards import Manifest
from stbench.models.autoencoder import to_float

EXTRACTOR = "random-colour"
CLASSES = 10


def make_vae(folder: Path, seed: int = 0) -> Path:
    """Save a randomly initialised AutoencoderKL of sd-vae's shape (3 channels to 4, factor 8), but narrow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=64,
        )
    vae.save_pretrained(folder)
    return folder


def picture(number: int, width: int, height: int) -> Image.Image:
    """Make a smooth coloured picture that depends on its number."""
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = [np.sin((number % 7 + 1) * x * 3 + number + c) * np.cos(y * (number % 5 + c)) for c in range(3)]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127.5).astype(np.uint8))


def make_images(folder: Path, count: int = 400, size: int = 64, mixed: bool = False) -> Path:
    """Write PNG and JPEG files in ten class folders; `mixed` varies width and height."""
    for number in range(count):
        width, height = (size + number % 5 * 9, size + number % 3 * 20) if mixed else (size, size)
        place = folder / f"class{number % CLASSES}"
        place.mkdir(parents=True, exist_ok=True)
        name = f"img{number:05d}." + ("png" if number % 2 else "jpg")
        picture(number, width, height).save(place / name)
    return folder


def write_images(folder: Path, images: np.ndarray, suffix: str = ".png") -> Path:
    """Write uint8 images (N,H,W,3) to numbered files of a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:04d}{suffix}")
    return folder


def make_tar(folder: Path, file: Path) -> Path:
    """Pack the files of a folder into a tar."""
    with tarfile.open(file, "w") as archive:
        archive.add(folder, ".")
    return file


def make_repa(folder: Path, count: int = 60, latent: int = 8, dtype: type = np.float32) -> Path:
    """Write REPA's layout with random moments; the labels are listed in another order than the files."""
    draw = np.random.default_rng(0)
    labels = []
    for number in range(count):
        name = f"{number // 20:05d}/img-mean-std-{number:08d}.npy"
        moments = draw.normal(size=(8, latent, latent))
        moments[4:] = np.abs(moments[4:]) * 0.1
        for place, path in (("vae-sd", name), ("images", name)):
            (folder / place / path).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "vae-sd" / name, moments.astype(dtype))
        picture(number, 8 * latent, 8 * latent).save(
            folder / "images" / f"{number // 20:05d}/img{number:08d}.png"
        )
        labels.append([name, number % CLASSES])
    (folder / "vae-sd" / "dataset.json").write_text(json.dumps({"labels": labels[::-1]}))
    return folder


def run_prepare(options: PrepareOptions) -> tuple[Manifest, bool]:
    """Run `stbench data prepare` without a progress bar."""
    return prepare(options, open_task(options), lambda count: None)


def column(folder: Path, array: str) -> np.ndarray:
    """Read one array of all shards of a prepared data set."""
    return np.concatenate([np.load(file) for file in sorted(folder.glob(f"*-{array}.npy"))])


def content(folder: Path) -> dict[str, bytes]:
    """Read all files of a folder, by name."""
    return {f.name: f.read_bytes() for f in folder.iterdir() if not f.name.startswith(".verified-")}


@final
class RandomColour(FeatureExtractorBase):
    """A fixed random network over small colour images: features "16" and "logits"."""

    def __init__(self, name: str, features_list: Sequence[str], **_options: object) -> None:
        super().__init__(name, list(features_list))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            self.first, self.head = nn.Linear(3 * 64, 16), nn.Linear(16, CLASSES)
        self.requires_grad_(False)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "16", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "16"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> Tensor:
        return torch.zeros(1, 3, 64, 64, dtype=torch.uint8)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        small = nn.functional.adaptive_avg_pool2d(to_float(images), 8)
        features = self.first(small.flatten(1)).tanh()
        found = {"16": features, "logits": self.head(features)}
        return tuple(found[name] for name in self.features_list)


if EXTRACTOR not in FEATURE_EXTRACTORS_REGISTRY:
    register_feature_extractor(EXTRACTOR, RandomColour)
