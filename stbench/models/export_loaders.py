"""Which published code loads an exported file, with which arguments: one line for each.

The sampling scripts build published sizes for 256 or 512 pixels only. For any other network, the line names
the class with the arguments instead.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stbench.core.backbone import BackboneInfo
from stbench.models.export_heads import PROJECTOR_DIM
from stbench.models.weights import State

RESOLUTIONS = {32: 256, 64: 512}
"""Latent size -> pixels, of the images that the scripts can sample."""


@dataclass(frozen=True)
class Exported:
    """What the arguments of published code depend on."""

    info: BackboneInfo
    objective: str
    heads: State
    """Heads in the file, under the repository's names."""
    head_depth: Mapping[str, int]
    """The option that counts the blocks before the head of Internal Guidance; empty without that head."""
    attention_heads: int
    qk_norm: bool
    noise_at_zero: bool
    learn_sigma: bool

    @property
    def published(self) -> bool:
        """Whether the tables of models contain this network, for latents that the scripts can sample."""
        name, _, patch = self.info.size.partition("/")
        known = name in ("s", "b", "l", "xl") and patch in ("2", "4", "8")
        return known and self.info.channels == 4 and self.info.input_size in RESOLUTIONS

    @property
    def model(self) -> str:
        """The value of --model."""
        return f"{'DiT' if self.info.name == 'dit' else 'SiT'}-{self.info.size.upper()}"

    @property
    def path(self) -> str:
        """The path of a flow, "linear" or "cosine"."""
        return self.objective.partition("-")[0]

    def arguments(self, **more: Any) -> str:
        """Return the constructor arguments of a class of the DiT family."""
        info = self.info
        values = dict(
            input_size=info.input_size,
            patch_size=info.patch,
            in_channels=info.channels,
            hidden_size=info.width,
            depth=info.depth,
            num_heads=self.attention_heads,
            num_classes=info.classes,
        )
        return ", ".join(f"{name}={value}" for name, value in (values | more).items())


def loaded_by(exported: Exported, file: str) -> list[str]:
    """Return a line for each published program that loads the file, and what it needs."""
    if exported.info.name == "uvit":
        steps = "1000 t" if exported.objective == "vp-discrete" else "999 t"
        return [f"class UViT in libs/uvit.py of baofff/U-ViT, given {steps}"]
    if exported.info.name == "dit":
        return [_dit(exported, file)]
    if exported.noise_at_zero:
        return [_upstream(exported, file)]
    return [_data_at_zero(exported, file)]


def _dit(exported: Exported, file: str) -> str:
    resolution, classes = RESOLUTIONS.get(exported.info.input_size), exported.info.classes
    if "ap_head.linear1.weight" in exported.heads:
        if exported.published:
            script = f"DiT-SRA/generate.py of vvvvvjdy/SRA --ckpt {file} --model {exported.model}"
            return f"{script} --resolution {resolution} --num-classes {classes}"
        return f"class DiT in DiT-SRA/models/dit.py of vvvvvjdy/SRA ({exported.arguments(qk_norm=False)})"
    if exported.published:
        script = f"sample_ddp.py of facebookresearch/DiT --ckpt {file} --model {exported.model}"
        return f"{script} --image-size {resolution} --num-classes {classes}"
    return f"class DiT in models.py of facebookresearch/DiT ({exported.arguments(learn_sigma=True)})"


def _upstream(exported: Exported, file: str) -> str:
    """SiT builds user files without a learned variance, LayerSync with one: neither has an option for it."""
    repository = "vita-epfl/LayerSync" if exported.learn_sigma else "willisma/SiT"
    if exported.published:
        script = f"sample_ddp.py of {repository} SDE --ckpt {file} --model {exported.model}"
        path = {"linear": "Linear", "cosine": "GVP"}[exported.path]
        resolution = RESOLUTIONS[exported.info.input_size]
        options = f"--image-size {resolution} --num-classes {exported.info.classes} --path-type {path}"
        return f"{script} {options}"
    arguments = exported.arguments(learn_sigma=exported.learn_sigma)
    return f"class SiT in models.py of {repository} ({arguments})"


def _data_at_zero(exported: Exported, file: str) -> str:
    """REPA, SRA, Self-Transcendence, Internal Guidance: the heads decide which of them loads the file."""
    info, heads = exported.info, exported.heads
    more: dict[str, Any] = {"decoder_hidden_size": info.width, "qk_norm": exported.qk_norm}
    extra, hidden = "", _hidden(heads)
    if "ap_head.linear1.weight" in heads:
        script, cls = "SiT-SRA/generate.py of vvvvvjdy/SRA", "SiT-SRA/models/sit.py of vvvvvjdy/SRA"
    elif depth := exported.head_depth:
        script = "SiT/generate.py of CVL-UESTC/Internal-Guidance"
        cls = "SiT/models/sit.py of CVL-UESTC/Internal-Guidance"
        extra = "".join(f" --{name.replace('_', '-')} {value}" for name, value in depth.items())
        more |= depth
    elif widths := _encoder_widths(heads):
        script, cls = "generate.py of sihyun-yu/REPA", "models/sit.py of sihyun-yu/REPA"
        extra = f" --projector-embed-dims {','.join(map(str, widths))}"
        more |= {"z_dims": widths, "projector_dim": hidden, "encoder_depth": info.depth}
    elif heads:
        script = "generate.py of csslc/Self-Transcendence"
        final = "projectors_final.linear.weight" in heads
        cls = f"models/sit_{'vaeloss' if final else 'selftrans'}_model.py of csslc/Self-Transcendence"
        more |= {"projector_dim": hidden} | ({"encoder_depth": info.depth} if final else {})
    else:
        # Self-Transcendence's script does not require the heads; REPA's class can be built without them.
        script, cls = "generate.py of csslc/Self-Transcendence", "models/sit.py of sihyun-yu/REPA"
        more |= {"z_dims": [], "encoder_depth": info.depth}
    # The tables of models build a final layer of width 768 for SiT-S, which no SiT-S fits.
    if exported.published and hidden == PROJECTOR_DIM and info.width >= 768:
        return (
            f"{script} --ckpt {file} --model {exported.model} --resolution {RESOLUTIONS[info.input_size]} "
            f"--num-classes {info.classes} --{'' if exported.qk_norm else 'no-'}qk-norm "
            f"--path-type {exported.path}{extra}"
        )
    return f"class SiT in {cls} ({exported.arguments(**more)})"


def _hidden(heads: State) -> int:
    """Return the hidden width of the projectors; the published one if there are none."""
    first = (v.shape[0] for k, v in heads.items() if re.fullmatch(r"projectors\.(\d+\.)?0\.weight", k))
    return next(first, PROJECTOR_DIM)


def _encoder_widths(heads: State) -> list[int]:
    """Return the output width of each of REPA's projectors; Self-Transcendence's has no number."""
    count = len([key for key in heads if re.fullmatch(r"projectors\.\d+\.4\.weight", key)])
    return [heads[f"projectors.{k}.4.weight"].shape[0] for k in range(count)]
