"""Weight files made for tests: random networks under published names, and cached encoder tokens."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from stbench.data.dataset import get_dataset
from stbench.models import encoders


class Unloaded(FeatureExtractorInceptionV3):
    """torch-fidelity's graph, which loads nothing."""

    def load_state_dict(self, state: Mapping[str, object], **options: object) -> None:  # type: ignore[override]
        """Leave the weights as they are."""


def random_inception(file: Path) -> tuple[Path, str]:
    """Write random Inception weights that keep the features alive; returns the file and its sha256."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Unloaded("random", ["2048"], feature_extractor_weights_path=empty)
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.normal_(net.fc.weight, std=0.05)
        nn.init.normal_(net.fc.bias)
    torch.save(net.state_dict(), file)
    return file, hashlib.sha256(file.read_bytes()).hexdigest()


def random_dino(file: Path) -> Path:
    """Write random weights of timm's smallest DINOv2."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=224)
    save_file(net.state_dict(), file)
    return file


def random_vit(file: Path) -> Path:
    """Write random weights of timm's `vit_tiny_patch16_224`, as a user would have them on disk."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), file)
    return file


def cache_digits(folder: Path) -> Path:
    """Cache the digits encoder's tokens of the training set in a new folder."""
    encoder = encoders.open_encoder(encoders.find_encoder("digits"), 16, torch.device("cpu"))
    assert isinstance(encoder, encoders.ImageEncoder)
    encoders.cache_tokens(folder, encoder, torch.split(get_dataset("digits").train_images(), 400), 1500)
    return folder
