"""Random weights under the published names: torch-fidelity's Inception."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


class Unloaded(FeatureExtractorInceptionV3):
    """torch-fidelity's graph, which loads nothing."""

    def load_state_dict(self, state: Mapping[str, object], **options: object) -> None:  # type: ignore[override]
        """Leave the weights as they are."""


def random_inception(file: Path) -> tuple[Path, str]:
    """Write weights that keep the features alive; returns the file and its sha256."""
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
