"""The feature networks of `stbench evaluate --reference --fdr`: extractors as networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from stbench.data.spec import INCEPTION
from stbench.evaluate import fdr6
from stbench.evaluate.extractors import extractor_hash, get_extractor
from stbench.evaluate.feature_networks import FeatureNetwork, NetworkFiles


def ratio_space(extractor: str) -> str:
    """Return the feature space of an extractor of FDr."""
    return "pool" if extractor == INCEPTION else f"fdr {extractor}"


@final
class ExtractorNetwork(FeatureNetwork):
    """An extractor of runs, as a network whose only space is `ratio_space` of its name."""

    def __init__(self, name: str, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor, self.label = extractor, f"{name} {extractor_hash(extractor)[:16]}"
        self.spaces = {ratio_space(name): None}  # type: ignore[misc]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of a batch."""
        (space,) = self.spaces
        return {space: self.extractor(images)[0]}


def load_networks(
    files: NetworkFiles, ratio: Sequence[str], device: torch.device | str = "cpu"
) -> list[FeatureNetwork]:
    """Load the networks of `files`, and those of FDr over the extractors `ratio`, on `device`.

    The weights of the latter come from the local caches, except Inception's. Raises UserError for missing
    ones, with the commands that download them, and for unknown names.
    """
    fdr6.require_cached(ratio, "leave the extractors out of --fdr")
    others = [ExtractorNetwork(name, get_extractor(name)) for name in ratio if name != INCEPTION]
    return [*files.load(device), *(network.to(device) for network in others)]
