"""Training settings that backbones were published with on ImageNet, and defaults for other data sets.

From the training scripts of facebookresearch/DiT, willisma/SiT and baofff/U-ViT. Recipes that build on SiT
(REPA, SRA, Self-Transcendence) train like SiT, except that they clip the gradient norm at 1 and do not mirror
images: `--set train.clip=1.0 --set data.flip=false`. When, and on how many samples, a run is evaluated is our
choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from stbench.data.dataset import Preset

IMAGENET = Preset(
    size="xl/2",
    batch=256,
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    adam_eps=1e-8,
    warmup=0,
    warmup_share=None,
    clip=None,
    ema_decay=0.9999,
    ema_warmup=False,
    label_drop=0.1,
    steps=400_000,
    eval_points=(50_000, 100_000, 200_000, 400_000),
    eval_samples=10_000,
    eval_labels="random",
    eval_steps=50,
    eval_guidance=(1.0,),
)
"""DiT and SiT of every size, at 256 and 512 pixels."""

_UVIT: Mapping[str, Any] = dict(
    batch=1024, lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup=5000, steps=500_000
)
_UVIT_L: Mapping[str, Any] = dict(label_drop=0.15)

IMAGENET256: Mapping[str, Mapping[str, Any]] = {
    "uvit": dict(_UVIT, size="h/2"),
    "uvit-l/2": dict(_UVIT_L, steps=300_000),
}
"""U-ViT at 256 pixels. L/2 drops 15 % of the labels and trains for 300,000 steps."""

IMAGENET512: Mapping[str, Mapping[str, Any]] = {"uvit": dict(_UVIT, size="h/4"), "uvit-l/4": _UVIT_L}
"""U-ViT at 512 pixels. L/4 drops 15 % of the labels and trains as long as H/4."""

CUSTOM = replace(
    IMAGENET,
    size="s/2",
    batch=128,
    lr=2e-4,
    warmup=1000,
    warmup_share=0.05,
    clip=1.0,
    ema_decay=0.999,
    ema_warmup=True,
    steps=50_000,
    eval_points=(10_000, 25_000, 50_000),
    eval_samples=5000,
    eval_labels="balanced",
)
"""Defaults for data sets of about the size of CIFAR-10. Not published."""

CUSTOM_SIZES: Mapping[str, Mapping[str, Any]] = {"uvit": dict(size="s/2-latent")}
"""U-ViT's published S/2 is unconditional, so its latent variant is the default."""
