"""A frozen image encoder that runs on the clean images, and the identity of an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stbench.core.errors import UserError
from stbench.core.flops import forward_flops
from stbench.models.autoencoder import to_float


@dataclass(frozen=True)
class EncoderSpec:
    """Identity of an encoder, and where its weights or cached tokens are."""

    kind: Literal["timm", "digits", "cached"]
    name: str
    """timm model name, "digits", or the name of the encoder that the cached tokens are from."""
    width: int
    """Token width Dz."""
    sha256: str
    """Hash of the weights or of the cached tokens; "" for a model from the hub, identified by its name."""
    path: str = field(default="", compare=False)
    """File of local weights or folder of cached tokens, "" for none; not part of the identity."""

    @property
    def needs(self) -> str:
        """What a leaderboard row says that the run needed."""
        cached = "cached tokens of " if self.kind == "cached" else ""
        return f"{cached}encoder {self.name}"


@final
class ImageEncoder(nn.Module):
    """A frozen timm vision transformer that is applied to the clean images."""

    def __init__(self, network: nn.Module, spec: EncoderSpec, tokens: int) -> None:
        super().__init__()
        self.network: Any = network.eval().requires_grad_(False)
        self.spec = spec
        patches: Any = self.network.patch_embed
        self.size: int = patches.img_size[0]
        shape = (1, patches.proj.in_channels, self.size, self.size)

        def call(net: Any) -> object:
            return net.forward_features(torch.empty(shape, device="meta"))

        # Counted on the meta device, so that a plan needs no weights.
        self.flops = float(forward_flops(network, call, ("encoder",)))
        if patches.num_patches != tokens:
            raise UserError(
                f"encoder '{spec.name}' gives {patches.num_patches} tokens, the backbone has {tokens}; "
                f"choose an encoder or a patch size that matches"
            )

    @property
    def has_class_token(self) -> bool:
        """Whether the encoder has a class token."""
        return bool(getattr(self.network, "has_class_token", False))

    def tokens(self, images: Tensor, *, class_token: bool = False) -> Tensor:
        """Return patch tokens (B,N,Dz), after the final norm, of uint8 images (B,c,H,W).

        With `class_token`, that token precedes them (B,N+1,Dz). Register tokens are left out. Images are
        preprocessed as in REPA; the digits encoder takes them in [-1,1].
        """
        if self.spec.kind == "digits":
            prepared = to_float(images)
        else:
            config = self.network.pretrained_cfg
            prepared = encoder_input(images, self.size, config["mean"], config["std"])
        tokens: Tensor = self.network.forward_features(prepared)
        patches = tokens[:, self.network.num_prefix_tokens :]
        return torch.cat([tokens[:, :1], patches], 1) if class_token else patches


def encoder_input(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Preprocess uint8 images (B,c,H,W) to (B,3,size,size) as REPA does.

    Divides by 255, normalises with the encoder's mean and std (ImageNet's for DINOv2) and resizes with
    bicubic interpolation. A single channel is repeated three times.
    """
    x = images.expand(-1, 3, -1, -1).float() / 255.0
    shift, scale = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (mean, std))
    return F.interpolate((x - shift) / scale, (size, size), mode="bicubic", align_corners=False)
