"""The extractors of FDr6 besides Inception: features of five timm models, as in FD-Loss (arXiv 2604.28190).

The models, input sizes and features are those of its `eval_all_fds.py` and `repr_models.py`, which runs the
networks in bfloat16; here they run in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.core.registry import suggest
from stbench.evaluate.classifiers import DINO, timm_network
from stbench.models.timm_models import WEIGHTS, cached_weights, repository

MODELS = {
    "convnext": ("convnextv2_base.fcmae_ft_in22k_in1k", 224),
    "dinov2": (DINO, 256),
    "mae": ("vit_large_patch16_224.mae", 224),
    "siglip2": ("vit_so400m_patch16_siglip_256.v2_webli", 224),
    "clip": ("vit_large_patch14_clip_224.openai", 256),
}
"""Name -> timm's model, and the height and width in pixels to which images are resized."""
FDR_METRICS = {
    "fdr": "mean over the extractors of eval.fdr of a ratio: Frechet distance of the samples to the training "
    "images / that of the held-out images; lower is better",
    "fdr6": "fdr of exactly the six published extractors; lower is better",
}
"""Metrics of a run that sets `eval.fdr`, and their descriptions."""


@final
class TokenFeatures(nn.Module):
    """Features of a timm model before its head: uint8 (B,c,H,W) to (B,D). It has no logits.

    They are the class token of a vision transformer, the output of its attention pool if it has no class
    token, and the mean over positions of a convolutional network. Grey images are repeated to three channels.
    Images are resized by a bicubic filter with antialiasing, whatever their aspect ratio, and normalised.
    """

    def __init__(self, network: nn.Module, *, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network: Any = network.eval().requires_grad_(False)
        self._size, self._mean, self._std = size, tuple(mean), tuple(std)

    def get_requested_features_list(self) -> list[str]:
        """Describe everything besides the weights that changes a feature; part of the protocol."""
        return ["token before the head", f"bicubic {self._size}", f"{self._mean} {self._std}"]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B,D) and logits (B,0)."""
        x = images.expand(-1, 3, -1, -1).float() / 255.0
        x = F.interpolate(x, (self._size, self._size), mode="bicubic", align_corners=False, antialias=True)
        mean, std = (torch.tensor(v, device=x.device).view(1, 3, 1, 1) for v in (self._mean, self._std))
        return self._pool((x - mean) / std), torch.zeros(len(x), 0, device=x.device)

    def _pool(self, x: Tensor) -> Tensor:
        found = self.network.forward_features(x)
        if found.ndim == 4:  # (B,D,h,w)
            return found.mean((2, 3))
        if self.network.num_prefix_tokens:
            return found[:, 0]
        return self.network.pool(found)


def load_tokens(name: str, file: Path | None) -> TokenFeatures:
    """Load the extractor "fdr6/NAME" from a file, or from the Hugging Face cache.

    Raises UserError for an unknown name, and for weights that are missing or belong to another model.
    """
    if name not in MODELS:
        raise UserError(f"unknown extractor 'fdr6/{name}'{suggest(name, MODELS, prefix='fdr6/')}")
    model, size = MODELS[name]
    # Vision transformers resample their position table to the input, and pad it to whole patches.
    options = {"dynamic_img_size": True, "dynamic_img_pad": True} if model.startswith("vit_") else {}
    network, config, _ = timm_network(model, file, **options)
    return TokenFeatures(network, size=size, mean=config["mean"], std=config["std"])


def require_cached(names: Iterable[str], otherwise: str) -> None:
    """Raise UserError, with the commands that download them, if weights are not in the Hugging Face cache.

    Extractors with other weights than timm's are not checked. `otherwise` says what else the user may do.
    """
    models = {name: model for name in names if (model := _timm_model(name))}
    missing = {name: model for name, model in models.items() if cached_weights(model) is None}
    if missing:
        commands = " && ".join(f"hf download {repository(model)} {WEIGHTS[0]}" for model in missing.values())
        raise UserError(
            f"FDr: the weights of {', '.join(missing)} are not in the Hugging Face cache; type `{commands}`, "
            f"or {otherwise}"
        )


def _timm_model(name: str) -> str:
    """Return timm's name of the model behind an extractor, "" if there is none."""
    collection, _, model = name.partition("/")
    if collection == "fdr6":
        return MODELS[model][0] if model in MODELS else ""
    return DINO if name == "dinov2" else model if collection == "timm" else ""
