"""Small networks of every family with random weights, and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stbench.core.backbone import Backbone
from stbench.core.registry import BACKBONES, lookup


def build(family: str, size: str, **options: Any) -> Backbone:
    """A preset, by default on 4x8x8 latents of ten classes."""
    cls = lookup(BACKBONES, family)
    facts: dict[str, Any] = dict(channels=4, input_size=8, classes=10, out_channels=4, size=size)
    preset = {k: v for k, v in cls.presets[size].items() if k != "objective"}
    return cls(**(facts | preset | options))


def tiny(family: str, **options: Any) -> Backbone:
    """A `ti/2` network with random parameters, so that no layer is zero."""
    torch.manual_seed(0)
    net = build(family, "ti/2", **options).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net.requires_grad_(False)


def batch(size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Latents (B,4,8,8), times (B,) and labels (B,)."""
    torch.manual_seed(1)
    return torch.randn(size, 4, 8, 8), torch.rand(size, dtype=torch.float64), torch.arange(size)
